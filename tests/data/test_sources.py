"""Image folders: which images are listed, in which order, and how a bad folder is refused."""

import json
import os
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


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((row("a.png"), "{broken"), "metadata.jsonl, line 2 is not JSON .*Fix or delete the line"),
        (("[1]",), "line 1 is not a JSON object"),
        (({"file_name": "a.png", "caption": "x"},), r"line 1 has no 'text'\. It has 'file_name', .*--caption-column"),
        (({"text": "x"},), "no 'file_name'.*--image-column"),
        ((row(7),), "'file_name' is 7, which is not a file name"),
        ((), "lists no images"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        open_folder(folder(tmp_path, *lines))


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
        UserError, match=r"has neither a metadata.jsonl nor an image with a .txt next to it.*\"file_name\""
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
