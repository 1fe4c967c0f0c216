"""Image folders: which images are listed, in which order, and how a bad folder is refused."""

import contextlib
import json
import os
import re
import socket
from pathlib import Path

import pytest

from pipeline.data.source import DataSettings, inputs_sha256, open_source
from pipeline.system.errors import UserError


def folder(tmp_path, *lines):
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return tmp_path


def row(name, text="a caption", **more):
    return {"file_name": name, "text": text, **more}


def open_folder(path, image_column=None, caption_column=None, **chosen):
    return open_source(DataSettings(data=str(path), image_column=image_column, caption_column=caption_column, **chosen))


def test_records_are_sorted_and_blank_lines_are_ignored(tmp_path):
    source = open_folder(folder(tmp_path, row("b.png"), "", row("a.png", "eins"), "  "))
    assert [(r.source_id, r.caption) for r in source.records] == [("a.png", "eins"), ("b.png", "a caption")]


def test_a_file_listed_twice_gives_two_records(tmp_path):
    source = open_folder(folder(tmp_path, row("a.png", "one"), row("a.png", "two")))
    assert [(r.source_id, r.location, r.caption) for r in source.records] == [
        ("a.png", "a.png", "one"),
        ("a.png#2", "a.png", "two"),
    ]


def test_the_first_caption_or_all_or_a_random_one_is_taken(tmp_path):
    lines = [row(f"{i}.png", ["", "one", "two", "three"]) for i in range(30)]
    data = folder(tmp_path, *lines)
    assert {record.caption for record in open_folder(data).records} == {"one"}
    everything = open_folder(data, captions="all").records
    assert [(r.source_id, r.caption) for r in everything[:4]] == [
        ("0.png", "one"),
        ("0.png#2", "two"),
        ("0.png#3", "three"),
        ("1.png", "one"),
    ]
    drawn = [record.caption for record in open_folder(data, captions="random").records]
    assert len(drawn) == 30
    assert set(drawn) == {"one", "two", "three"}
    assert drawn == [record.caption for record in open_folder(data, captions="random").records]
    assert drawn != [record.caption for record in open_folder(data, captions="random", seed=1).records]


def test_a_sample_is_drawn_by_the_seed_and_keeps_the_order(tmp_path):
    data = folder(tmp_path, *(row(f"{i:02d}.png") for i in range(30)))
    few = [record.source_id for record in open_folder(data, max_samples=7).records]
    assert len(few) == 7
    assert few == sorted(few)
    assert few != [f"{i:02d}.png" for i in range(7)]
    assert few == [record.source_id for record in open_folder(data, max_samples=7).records]
    assert few != [record.source_id for record in open_folder(data, max_samples=7, seed=1).records]
    assert len(open_folder(data, max_samples=31).records) == 30


def test_captions_in_text_files_next_to_the_images(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jpg", "deep/a.PNG", "deep/b.webp", "c.png", "notes.pdf", "d.gif"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b.txt").write_text("one\n", encoding="utf-8-sig")
    (tmp_path / "deep" / "a.txt").write_text("zwei")
    (tmp_path / "deep" / "b.txt").write_bytes(b"\xff")
    (tmp_path / "d.txt").write_text("\n")
    (tmp_path / "alone.txt").write_text("no image")
    source = open_folder(tmp_path)
    assert [(record.source_id, record.caption, record.problem) for record in source.records] == [
        ("b.jpg", "one", None),
        ("c.png", "", "no caption file c.txt"),
        ("d.gif", "", "the caption is empty"),
        ("deep/a.PNG", "zwei", None),
        ("deep/b.webp", "", "the caption in deep/b.txt is not UTF-8 (byte 0)"),
    ]
    assert source.read(source.records[3]) == b"x"
    with pytest.raises(UserError, match="no columns to choose from"):
        open_folder(tmp_path, caption_column="text")


def test_a_caption_outside_the_folder_is_not_read(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    for name in ("a.png", "b.png"):
        (inside / name).write_bytes(b"x")
    (inside / "a.txt").symlink_to(tmp_path / "secret.txt")
    (inside / "b.txt").write_text("fine")
    assert "lies outside" in open_folder(inside).records[0].problem


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_file_names_that_are_not_text(tmp_path):
    for name in (b"\xff.png", "größe 大.png".encode(), b"new\nline.png"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(name)
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).with_suffix(".txt").write_text("a caption")
    source = open_folder(tmp_path)
    assert [record.source_id for record in source.records] == ["?.png", "größe 大.png", "new\nline.png"]
    assert [source.read(record) for record in source.records][0] == b"\xff.png"


def test_other_columns(tmp_path):
    source = open_folder(folder(tmp_path, {"image": "a.png", "label": "x"}), "image", "label")
    assert source.records[0].caption == "x"


@pytest.mark.parametrize(
    ("caption", "problem"),
    [
        (None, "there is no caption"),
        (3, "the caption is 3, not text"),
        (["a", 4], "the caption is 4, not text"),
        ("", "the caption is empty"),
        (" \n", "the caption is empty"),
        ([], "the caption is empty"),
        ({"en": "a"}, "the caption is {'en': 'a'}, not text"),
    ],
)
def test_a_caption_that_is_not_text_is_a_problem_of_its_record(tmp_path, caption, problem):
    source = open_folder(folder(tmp_path, row("a.png", caption), row("b.png")))
    assert source.records[0].problem == problem
    assert source.records[1].problem is None


def test_a_line_without_a_caption_is_a_problem_of_its_record(tmp_path):
    source = open_folder(folder(tmp_path, row("a.png"), {"file_name": "b.png"}))
    assert [record.problem for record in source.records] == [None, "there is no caption"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((row("a.png"), "{broken"), "metadata.jsonl, line 2 is not JSON .*Fix or delete the line"),
        (("[1]",), "line 1 is not a JSON object"),
        (
            ({"file_name": "a.png", "caption": "x"},),
            r"no 'text' in any line\. It has 'file_name', 'caption': .*--caption-column",
        ),
        (({"text": "x"},), "no 'file_name' in any line.*--image-column"),
        ((row("a.png"), {"text": "x"}), "line 2 has no 'file_name'. Add the file's name or delete the line"),
        ((row(7),), "'file_name' is 7, which is not a file name"),
        ((row("a.png"), '{"file_name": "b.png", "text": "a", "text": "b"}'), "line 2 has the key 'text' twice. Fix or"),
        ((), "lists no images"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        open_folder(folder(tmp_path, *lines))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,text\n0.png,a circle\n1.png,a circle, red, big\n", 'line 3 has 4 fields, not 2.* in quotes: .*"'),
        ("file_name,text,text\n0.png,a,b\n", "names the column 'text' twice. Rename or delete"),
    ],
)
def test_a_csv_that_would_lose_a_part_of_a_caption_is_refused(tmp_path, text, message):
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=f"metadata.csv,? {message}"):
        open_folder(tmp_path)


def test_a_csv_takes_quoted_commas_and_columns_without_names(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name,text,,\n0.png,"a circle, red",,\n')
    assert [record.caption for record in open_folder(tmp_path).records] == ["a circle, red"]


def test_an_absolute_file_name_counts_from_the_folder(tmp_path):
    """Random draws depend on the name, and no one's paths are stored."""
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "sub" / "a.png").write_bytes(b"a")
    (tmp_path / "outside.png").write_bytes(b"o")
    (tmp_path / "link").symlink_to(data)
    listed_names = [data / "sub" / "a.png", tmp_path / "link" / "sub" / "a.png", tmp_path / "outside.png"]
    folder(data, *(row(str(name)) for name in listed_names), row("sub/../sub/a.png"))
    for opened in (data, tmp_path / "link"):
        source = open_folder(opened)
        assert [r.source_id for r in source.records] == ["outside.png", "sub/../sub/a.png", "sub/a.png", "sub/a.png#2"]
        outside, *inside = source.records
        assert [source.read(record) for record in inside] == [b"a"] * 3
        with pytest.raises(OSError, match="^it lies outside the folder$"):
            source.read(outside)


def test_a_caption_that_is_not_unicode_is_a_problem_of_its_record(tmp_path):
    source = open_folder(folder(tmp_path, '{"file_name": "a.png", "text": "half \\ud83d"}', row("b.png")))
    assert source.records[0].problem == "the caption is not valid Unicode"
    with pytest.raises(UserError, match="which is not a file name"):
        open_folder(folder(tmp_path, '{"file_name": "\\ud83d.png", "text": "x"}'))


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row("a.png")), encoding="utf-8-sig")
    assert len(open_folder(tmp_path).records) == 1


def test_a_folder_with_a_list_is_an_image_folder_whatever_else_it_contains(tmp_path):
    for name in ("a.tar", "b.parquet", "state.json"):
        (tmp_path / name).write_bytes(b"something else")
    assert [record.source_id for record in open_folder(folder(tmp_path, row("a.png"))).records] == ["a.png"]


def test_a_folder_that_does_not_exist_or_has_no_list(tmp_path):
    with pytest.raises(UserError, match="--data .*nowhere"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(
        UserError,
        match=r"has neither a metadata.jsonl or metadata.csv nor an image with a .txt next to it.*\"file_name\"",
    ):
        open_folder(tmp_path)


def test_a_list_that_is_not_utf8(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a", "text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link/secret.png"])
def test_files_outside_the_folder_are_not_read(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(b"secret")
    (inside / "link").symlink_to(tmp_path)
    source = open_folder(folder(inside, row(name)))
    with pytest.raises(OSError, match="lies outside"):
        source.read(source.records[0])


def test_the_inputs_hash_depends_on_captions_and_order(tmp_path):
    hashes = set()
    for number, lines in enumerate(
        [(row("a"), row("b")), (row("b"), row("a")), (row("a"), row("b", "x")), (row("a"),)]
    ):
        path = tmp_path / str(number)
        path.mkdir()
        hashes.add(inputs_sha256(open_folder(folder(path, *lines)).records))
    assert len(hashes) == 3


def with_captions(path, captions):
    """A folder of images, each with the text file of its caption."""
    path.mkdir(exist_ok=True)
    for name, caption in captions.items():
        (path / name).write_bytes(b"x")
        (path / name).with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return path


def listed(source):
    return [(record.source_id, record.problem or record.caption) for record in source.records]


def test_each_line_of_a_text_file_is_a_caption_and_the_first_is_the_default(tmp_path):
    text = "\ufeff\r\n  A frog. \nach=Ogwal ogwal\r\n\r\naf=padda\u2028one line\n"
    data = with_captions(tmp_path / "data", {"a.png": text, "b.png": "one line\n"})
    assert listed(open_folder(data)) == [("a.png", "A frog."), ("b.png", "one line")]
    assert listed(open_folder(data, captions="all")) == [
        ("a.png", "A frog."),
        ("a.png#2", "ach=Ogwal ogwal"),
        ("a.png#3", "af=padda\u2028one line"),
        ("b.png", "one line"),
    ]
    drawn = {open_folder(data, captions="random", seed=seed).records[0].caption for seed in range(20)}
    assert drawn == {"A frog.", "ach=Ogwal ogwal", "af=padda\u2028one line"}


def test_a_caption_in_a_list_keeps_its_lines(tmp_path):
    assert listed(open_folder(folder(tmp_path, row("a.png", "two\nlines")))) == [("a.png", "two\nlines")]


def test_captions_may_lie_in_caption_files(tmp_path):
    data = with_captions(tmp_path / "data", {"a.png": "from the txt"})
    (data / "a.caption").write_text("not used")
    (data / "b.png").write_bytes(b"x")
    (data / "b.caption").write_text("from the caption\n")
    assert listed(open_folder(data)) == [("a.png", "from the txt"), ("b.png", "from the caption")]


def test_a_metadata_csv_is_a_list_too(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name,text,more\nb.png,"two\nlines, quoted",x\na.png\n', "utf-8-sig")
    (tmp_path / "b.png").write_bytes(b"xyz")
    source = open_folder(tmp_path)
    assert listed(source) == [("a.png", "there is no caption"), ("b.png", "two\nlines, quoted")]
    assert source.read(source.records[1]) == b"xyz"
    assert listed(open_folder(tmp_path, caption_column="more"))[1] == ("b.png", "x")
    (tmp_path / "metadata.csv").write_text("image, caption\na.png,a\n")
    with pytest.raises(UserError, match=r"csv has no 'file_name' in any line\. It has 'image', ' caption': choose"):
        open_folder(tmp_path)


def test_a_list_in_the_folder_of_the_split_is_used(tmp_path):
    for split, caption in (("train", "one"), ("test", "two")):
        (tmp_path / split).mkdir()
        folder(tmp_path / split, row("a.png", caption))
        (tmp_path / split / "a.png").write_bytes(caption.encode())
    assert listed(open_folder(tmp_path)) == [("a.png", "one")]
    source = open_folder(tmp_path, split="test")
    assert (listed(source), source.read(source.records[0])) == ([("a.png", "two")], b"two")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "contains no images"),
        (("a.svg", "a.txt"), "contains no images"),
        (("a.png",), "contains 1 image, but no captions"),
        (("images/a.png", "captions.csv"), "no captions: .*It has captions.csv, which is not read"),
        (("a.png", "metadata.json"), "It has metadata.json, which is not read"),
        (("images/a.png", "images/metadata.jsonl"), "It has images/metadata.jsonl, which is not read there"),
    ],
)
def test_a_folder_without_captions_is_refused_with_what_lies_there(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


def test_what_macos_adds_is_no_image(tmp_path):
    data = with_captions(tmp_path / "data", {"a.png": "one", "._a.png": b"\0\5\x16\7", "b.png": "two"})
    with_captions(data / "__MACOSX", {"a.png": "one", "._a.png": b"\0\5\x16\7"})
    assert listed(open_folder(data)) == [("a.png", "one"), ("b.png", "two")]


def test_files_of_other_kinds_and_records_without_a_caption_are_noted(tmp_path):
    data = with_captions(tmp_path / "data", {"a.png": "one", "b.svg": "two", "c.SVG": "x", "d.heic": "x", "e.eps": "x"})
    (data / "alone.png").write_bytes(b"x")
    (data / "read\x1b[2Jme").write_bytes(b"x")
    assert open_folder(data).notes() == [
        "note: passed over 5 files of other kinds: 2 .svg, 1 .eps, 1 .heic, 1 without an ending",
        "note: 1 of 2 entries will be skipped. The first is alone.png: no caption file alone.txt",
    ]


def test_names_from_the_input_do_not_steer_the_terminal(tmp_path):
    with pytest.raises(UserError) as caught:
        open_folder(folder(tmp_path, "{\x1b]0;title\x07"))
    assert "\x1b" not in str(caught.value)
    assert "not JSON" in str(caught.value)


@pytest.fixture
def special(tmp_path, monkeypatch):
    """Makes a FIFO, a socket or a sparse file of 40 GB."""

    def make(kind, path):
        path.unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            # The name of a socket must be short.
            monkeypatch.chdir(path.parent)
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
                server.bind(path.name)
        elif kind == "loop":
            path.symlink_to(path)
        else:
            with open(path, "wb") as stream:
                stream.truncate(40 << 30)

    return make


SPECIAL = ["fifo", "socket", "sparse", "loop"]


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("with_list", [True, False])
def test_an_image_that_is_no_file_or_endless_is_skipped(tmp_path, special, kind, with_list):
    data = with_captions(tmp_path / "data", {"a.png": "one", "b.png": "two"})
    special(kind, data / "a.png")
    if with_list:
        folder(data, row("a.png"), row("b.png"))
    source = open_folder(data)
    assert source.records[0].source_id == "a.png"
    with pytest.raises(OSError, match="a.png is not a regular file|a.png has more than|lies outside|Too many levels"):
        source.read(source.records[0])
    assert source.read(source.records[1]) == b"x"


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_caption_that_is_no_file_or_endless_is_a_problem_of_its_record(tmp_path, special, kind):
    data = with_captions(tmp_path / "data", {"a.png": "one", "b.png": "two"})
    special(kind, data / "a.txt")
    (_, problem), second = listed(open_folder(data))
    assert re.match("the caption cannot be read: ", problem)
    assert str(tmp_path) not in problem
    assert second == ("b.png", "two")


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "0.tar", "0.parquet"])
def test_an_input_that_is_no_file_or_endless_is_refused(tmp_path, special, kind, name):
    data = with_captions(tmp_path / "data", {"a.png": "one"})
    special(kind, data / name)
    reason = "is not a regular file|cannot be read|has a line of more|contains no images"
    with pytest.raises(UserError, match=reason):
        open_folder(data)


def test_deep_and_long_lines_are_refused(tmp_path):
    for line in ("[" * 100_000, '{"file_name": "a.png", "text": ' + "[" * 100_000, "1" * 5000):
        with pytest.raises(UserError, match=r"metadata.jsonl, line 1 is not JSON \(.{,200}Fix or delete the line"):
            open_folder(folder(tmp_path, line))
    with pytest.raises(UserError, match="has a line of more than"):
        open_folder(folder(tmp_path, row("a.png", "x" * (1 << 24))))


def test_captions_without_measure_are_a_problem_of_their_record(tmp_path):
    data = folder(tmp_path, row("a.png", "x" * (1 << 20)), row("b.png", "é" * (1 << 20)), row("c.png", ["x"] * 1001))
    assert [record.problem for record in open_folder(data).records] == [
        None,
        "the caption has more than 1048576 bytes",
        None,
    ]
    everything = open_folder(data, captions="all")
    assert everything.records[-1].problem == "there are 1001 captions, more than 1000"
