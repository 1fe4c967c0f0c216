"""WebDataset tars as a source: samples with their images and captions, and damaged or hostile tars."""

import io
import json
import os
import tarfile

import pytest
from webdataset.shardlists import expand_urls

from pipeline.data.source import DataSettings, open_source
from pipeline.data.tars import count_expansions, tars_named
from pipeline.system.errors import UserError


def write_tar(path, *members):
    """A tar of members, which are (name, bytes) pairs or TarInfo objects."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def open_tars(data, **chosen):
    return open_source(DataSettings(data=str(data), **chosen))


def listed(source):
    return [(record.source_id, record.caption, record.problem) for record in source.records]


def fields(**values):
    return json.dumps(values).encode()


def test_samples_as_img2dataset_writes_them(tmp_path):
    tar = write_tar(
        tmp_path / "00000.tar",
        ("000000000.jpg", b"first"),
        ("000000000.json", fields(caption="no", key="0")),
        ("000000000.txt", b"one\n"),
        ("000000002.jpg", b"second"),
        ("000000002.json", fields(caption="two")),
    )
    source = open_tars(tar)
    assert listed(source) == [("000000000.jpg", "one", None), ("000000002.jpg", "two", None)]
    assert [source.read(record) for record in source.records] == [b"first", b"second"]


def test_a_directory_and_a_brace_pattern_name_the_same_tars(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number:05d}.tar", (f"{number}.png", b"%d" % number), (f"{number}.txt", b"c"))
    everything = open_tars(tmp_path)
    assert [everything.read(record) for record in everything.records] == [b"0", b"1", b"2"]
    assert listed(open_tars(tmp_path / "{00000..00002}.tar")) == listed(everything)
    assert listed(open_tars(tmp_path / "{00001..00002}.tar")) == listed(everything)[1:]
    with pytest.raises(UserError, match=r"00003.tar does not exist \(2 of 4 tars are missing\)"):
        open_tars(tmp_path / "{00001..00004}.tar")


@pytest.mark.parametrize("data", ["pipe:echo x > hacked.tar", "pipe:curl http://127.0.0.1/{0..3}.tar"])
def test_commands_are_not_run(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="can be read from a disk, or from an address"):
        open_tars(data)
    assert not list(tmp_path.iterdir())


def test_columns_choose_the_image_and_the_caption(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar",
        ("x.seg.png", b"mask"),
        ("x.jpg", b"photo"),
        ("x.json", fields(generated_caption="better")),
        ("x.txt", b"alt"),
    )
    assert open_tars(tar).read(open_tars(tar).records[0]) == b"mask"
    chosen = open_tars(tar, image_column="jpeg;jpg", caption_column="generated_caption")
    assert listed(chosen) == [("x.jpg", "better", None)]
    assert chosen.read(chosen.records[0]) == b"photo"


def test_a_sample_without_an_image_or_a_caption_has_a_problem(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar",
        ("a.json", fields(caption="no image")),
        ("b.jpg", b"x"),
        ("c.jpg", b"x"),
        ("c.txt", b"\xff"),
        ("d.jpg", b"x"),
        ("d.json", b"{broken"),
        ("e.jpg", b"x"),
        ("e.json", b"[1]"),
        ("f.jpg", b"x"),
        ("f.txt", b"y" * (1 << 20) + b"y"),
        ("g.jpg", b"x"),
        ("g.json", fields(caption=["two", "captions"])),
        ("h.jpg", b"x"),
        ("h.json", b'{"caption": "one", "caption": "two"}'),
    )
    found = {record.source_id: record.problem or record.caption for record in open_tars(tar).records}
    assert found == {
        "a": "the sample has no image, only .json",
        "b.jpg": "there is no caption",
        "c.jpg": "the .txt is not UTF-8 (byte 0)",
        "d.jpg": "the .json is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        "e.jpg": "there is no caption",
        "f.jpg": "the .txt has 1048577 bytes, too many for a caption",
        "g.jpg": "two",
        "h.jpg": "the .json has the key 'caption' twice",
    }


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("none/{0..9999999999}.tar", 10**10), ("{0..9}" * 8 + ".tar", 10**8), ("{a,b}" * 30 + ".tar", 2**30)],
)
def test_a_pattern_that_would_fill_the_memory_is_refused(pattern, count):
    with pytest.raises(UserError, match=f"stands for {count} tars, more than 1000000. Correct the numbers"):
        tars_named(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "a.tar",
            "{0..9}.tar",
            "{00..12}{a,b}.tar",
            "{{0..9},{0..9}{a,b}}.tar",
            "a{b}c{1..3}",
            "{9..1..2}",
            "{-3..3}",
        ),
        *("x{a,b,}{,c}.tar", "{1..{2,3}}", "a,b{c,d}", "{a,{b,c}}x{d,{0..3},e}", "{0..9..0}", r"\{{1,2}\}"),
    ],
)
def test_patterns_are_counted_as_they_are_expanded(pattern):
    assert count_expansions(pattern) == len(expand_urls(pattern))


def test_letters_count_as_many_and_a_pattern_that_is_none_is_refused():
    assert count_expansions("{a..e}.tar") >= 5
    with pytest.raises(UserError, match=r"--data \{1\{2,3\}.tar is not a pattern"):
        tars_named("{1{2,3}.tar")


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_and_devices_in_a_tar_are_not_followed(tmp_path):
    tar = write_tar(
        tmp_path / "a.tar",
        link("a.jpg", "/etc/hostname"),
        link("b.jpg", "/etc/hostname", tarfile.LNKTYPE),
        link("c.jpg", "", tarfile.CHRTYPE),
        ("../../d.jpg", b"inside"),
        ("../../d.txt", b"a name is only a name"),
    )
    source = open_tars(tar)
    assert listed(source) == [("../../d.jpg", "a name is only a name", None)]
    assert source.read(source.records[0]) == b"inside"


def test_a_key_in_two_tars_gives_two_images(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, ("0.jpg", name.encode()), ("0.txt", b"c"))
    source = open_tars(tmp_path)
    assert [record.source_id for record in source.records] == ["0.jpg", "0.jpg#2"]
    assert [source.read(record) for record in source.records] == [b"a.tar", b"b.tar"]


@pytest.mark.parametrize("keep", [0, 100, 512, 700, 1024, 2048, -1024, -1])
def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path, keep):
    tar = write_tar(tmp_path / "a.tar", *[(f"{i}.{end}", b"z" * 600) for i in range(4) for end in ("jpg", "txt")])
    complete = tar.read_bytes().rstrip(b"\0")
    complete += bytes(-len(complete) % 512 + 1024)
    tar.write_bytes(complete)
    assert len(open_tars(tar).records) == 4
    tar.write_bytes(complete[:keep])
    with pytest.raises(UserError, match=r"a.tar is (truncated|damaged)"):
        open_tars(tar)


def test_a_tar_with_a_broken_header_or_a_wrong_size_is_refused(tmp_path):
    tar = write_tar(tmp_path / "a.tar", ("0.jpg", b"x" * 600), ("0.txt", b"c"))
    data = bytearray(tar.read_bytes())
    data[512 + 1024 + 150] ^= 0xFF
    tar.write_bytes(data)
    with pytest.raises(UserError, match="a.tar is damaged"):
        open_tars(tar)
    huge = tarfile.TarInfo("0.jpg")
    huge.size = 1 << 40
    tar.write_bytes(huge.tobuf() + bytes(4096))
    with pytest.raises(UserError, match="a.tar is damaged"):
        open_tars(tar)


def test_a_file_that_is_not_a_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"text" * 2000)
    with pytest.raises(UserError, match="a.tar is truncated or not a tar"):
        open_tars(tmp_path / "a.tar")


def test_a_tar_that_shrinks_after_it_was_listed(tmp_path):
    tar = write_tar(tmp_path / "a.tar", ("0.jpg", b"x" * 600), ("0.txt", b"c"))
    source = open_tars(tar)
    tar.write_bytes(tar.read_bytes()[:700])
    with pytest.raises(OSError, match="is shorter than when it was listed"):
        source.read(source.records[0])


def names(source):
    return [(record.source_id, record.problem or record.caption) for record in source.records]


def test_names_with_dots_are_whole_names(tmp_path):
    """Eight photos of one minute, as phones name them, and eight with plain names."""
    dotted = [f"d/2023-01-05 10.15.0{i}" for i in range(8)]
    plain = [f"d/{i}" for i in range(8)]
    members = [(f"{name}.{end}", name.encode()) for name in dotted + plain for end in ("PNG", "txt", "xmp")]
    source = open_tars(write_tar(tmp_path / "a.tar", *members))
    assert names(source) == [(f"{name}.png", name) for name in dotted + plain]
    assert [source.read(record) for record in source.records] == [name.encode() for name in dotted + plain]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        # The common name is up to the first dot.
        (("x.seg.png", "x.txt", "x.jpg"), {"x.seg.png": "x.txt", "x.jpg": None}),
        (("x.jpg", "x.seg.png", "x.txt"), {"x.jpg": "x.txt", "x.seg.png": None}),
        (("x.left.jpg", "x.right.jpg", "x.txt"), {"x.left.jpg": "x.txt", "x.right.jpg": None}),
        # A later version beside the first has a caption of its own.
        (("v1.png", "v1.txt", "v1.5.png", "v1.5.txt"), {"v1.png": "v1.txt", "v1.5.png": "v1.5.txt"}),
        (("v1.5.png", "v1.5.txt", "v1.6.png", "v1.6.txt"), {"v1.5.png": "v1.5.txt", "v1.6.png": "v1.6.txt"}),
        (("x.left.jpg", "x.left.txt", "x.right.jpg"), {"x.left.jpg": "x.left.txt", "x.right.jpg": None}),
        # Members need not be neighbours.
        (("a.jpg", "b.jpg", "b.txt", "a.txt"), {"a.jpg": "a.txt", "b.jpg": "b.txt"}),
        (("a.jpg", "a.caption"), {"a.jpg": "a.caption"}),
        # macOS adds files.
        (("._a.jpg", "a.jpg", "._a.txt", "a.txt", "__MACOSX/a.jpg", "__MACOSX/._a.jpg"), {"a.jpg": "a.txt"}),
        # An archive that was appended to.
        (("a.jpg", "a.txt", "a.jpg", "a.txt"), {"a.jpg": "a.txt", "a.jpg#2": "a.txt"}),
    ],
)
def test_every_image_has_its_caption_or_a_problem(tmp_path, files, found):
    source = open_tars(write_tar(tmp_path / "a.tar", *[(name, name.encode()) for name in files]))
    assert {record.source_id: None if record.problem else record.caption for record in source.records} == found
    for record in source.records:
        assert record.problem or source.read(record).decode() == record.source_id.removesuffix("#2")


def test_a_second_image_of_a_sample_says_how_to_choose_it(tmp_path):
    tar = write_tar(tmp_path / "a.tar", ("x.jpg", b"photo"), ("x.seg.png", b"mask"), ("x.txt", b"c"))
    assert names(open_tars(tar))[1] == (
        "x.seg.png",
        "the image of its sample is x.jpg. To use this one, choose its ending with --image-column",
    )
    assert names(open_tars(tar, image_column="seg.png")) == [("x.seg.png", "c")]
    assert names(open_tars(tar, image_column="jpg")) == [("x.jpg", "c")]


def test_each_line_of_a_text_member_is_a_caption(tmp_path):
    tar = write_tar(tmp_path / "a.tar", ("x.jpg", b"photo"), ("x.txt", b"\none\r\ntwo\n"))
    assert [record.caption for record in open_tars(tar).records] == ["one"]
    assert [record.caption for record in open_tars(tar, captions="all").records] == ["one", "two"]


def test_names_that_are_not_text_are_kept_apart(tmp_path):
    members = [(f"{letter}.{end}", letter.encode("latin-1")) for letter in "\xe9\xe8" for end in ("jpg", "txt")]
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_tars(tmp_path / "a.tar")
    assert [record.source_id for record in source.records] == ["?.jpg", "?.jpg#2"]
    assert [source.read(record) for record in source.records] == [b"\xe9", b"\xe8"]


def test_members_that_are_no_files_are_noted(tmp_path):
    members = [link("folder", "", tarfile.DIRTYPE), ("folder/a.jpg", b"x"), ("folder/a.txt", b"c")]
    assert open_tars(write_tar(tmp_path / "a.tar", *members)).notes() == []
    tar = write_tar(tmp_path / "a.tar", *members, link("b.jpg", "/etc/hostname"))
    assert open_tars(tar).notes() == [
        "note: passed over 1 file of other kinds: 1 link, device or sparse file",
    ]


def header(name, size, kind=tarfile.REGTYPE, **more):
    """A header that may claim any size."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = 0o644
    fields = info.get_info() | {"size": 0} | more
    block = bytearray(info._create_header(fields, tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(*records):
    """A pax header of `keyword=value` records, each of 10 to 99 bytes with its length in front."""
    data = b"".join(f"{len(record) + 4} {record}\n".encode() for record in records)
    return header("pax", len(data), tarfile.XHDTYPE) + data + bytes(-len(data) % 512)


GOOD = header("good.jpg", 1) + b"x" + bytes(511) + header("good.txt", 1) + b"c" + bytes(511)
HOSTILE = {
    "member of -512 bytes": header("a.jpg", -512),
    "member of -1024 bytes": header("a.jpg", -1024),
    "member of -2^60 bytes": header("a.jpg", -(1 << 60)),
    "member of 2^62 bytes": header("a.jpg", 1 << 62),
    "pax size of -512": pax("size=-512") + header("a.jpg", 0),
    "pax header of 8 GB": header("p", 8 << 30, tarfile.XHDTYPE),
    "global pax header of -512": header("p", -512, tarfile.XGLTYPE),
    "long name of 8 GB": header("././@LongLink", 8 << 30, tarfile.GNUTYPE_LONGNAME),
    "long name of -512": header("././@LongLink", -512, tarfile.GNUTYPE_LONGNAME),
    "long link of 8 GB": header("././@LongLink", 8 << 30, tarfile.GNUTYPE_LONGLINK),
    "long names without end": (header("l", 1, tarfile.GNUTYPE_LONGNAME) + b"x" + bytes(511)) * 5000,
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("after", [b"", GOOD], ids=["last", "first"])
def test_sizes_that_cannot_be_are_refused(tmp_path, hostile, after):
    (tmp_path / "a.tar").write_bytes(GOOD + hostile + after + bytes(1024))
    with pytest.raises(UserError, match="a.tar is damaged"):
        open_tars(tmp_path / "a.tar")


def test_a_sparse_member_whose_map_has_no_end_is_refused(tmp_path):
    start = pax("GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=a.jpg", "GNU.sparse.realsize=9")
    (tmp_path / "a.tar").write_bytes(start + header("a.jpg", 512) + b"99999999\n".ljust(512, b"1") + bytes(1024))
    with pytest.raises(UserError, match="a.tar is damaged"):
        open_tars(tmp_path / "a.tar")


def test_huge_members_are_a_problem_of_their_sample(tmp_path):
    """A member of 30 GB of holes."""
    size = 30 << 30
    with open(tmp_path / "a.tar", "wb") as stream:
        stream.write(GOOD + header("a.jpg", size))
        stream.seek(size, os.SEEK_CUR)
        stream.write(header("a.txt", 1) + b"c" + bytes(511 + 1024))
    assert names(open_tars(tmp_path / "a.tar")) == [
        ("good.jpg", "c"),
        ("a.jpg", "the image has 32212254720 bytes, more than 536870912"),
    ]


def test_deeply_nested_fields_are_a_problem_of_their_sample(tmp_path):
    tar = write_tar(tmp_path / "a.tar", ("a.jpg", b"x"), ("a.json", b"[" * 100_000), ("b.jpg", b"x"), ("b.txt", b"c"))
    assert names(open_tars(tar)) == [("a.jpg", "the .json is not JSON (nested too deeply)"), ("b.jpg", "c")]


def test_a_fifo_is_no_tar(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    for data in (tmp_path, tmp_path / "0.tar", tmp_path / "{0..1}.tar"):
        with pytest.raises(UserError, match="0.tar is not a regular file"):
            open_tars(data)


def test_folders_and_macs_twins_are_no_tars(tmp_path):
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "._0.tar").write_bytes(b"\0\5\x16\7")
    write_tar(tmp_path / "0.tar", ("a.jpg", b"x"), ("a.txt", b"c"))
    assert names(open_tars(tmp_path)) == [("a.jpg", "c")]
