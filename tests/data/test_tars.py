"""WebDataset tars as a source: samples with their images and captions, and damaged or hostile tars."""

import io
import json
import tarfile

import pytest

from pipeline.data.source import DataSettings, open_source
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


@pytest.mark.parametrize("data", ["pipe:echo x > hacked.tar", "http://127.0.0.1/{0..3}.tar", "s3://bucket/a.tar"])
def test_commands_and_addresses_are_not_opened(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="can be read only from a local disk"):
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
    }


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
