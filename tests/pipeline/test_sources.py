"""Image folders: what is listed, in which order, and how a bad one is refused."""

import json

import pytest

from pipeline.errors import UserError
from pipeline.sources import inputs_sha256, open_source


def folder(tmp_path, *lines):
    (tmp_path / "metadata.jsonl").write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return tmp_path


def row(name, text="a caption", **more):
    return {"file_name": name, "text": text, **more}


def open_folder(path, image_column="file_name", caption_column="text"):
    return open_source(path, image_column, caption_column)


def test_records_are_sorted_and_blank_lines_left_out(tmp_path):
    source = open_folder(folder(tmp_path, row("b.png"), "", row("a.png", "eins"), "  "))
    assert [(r.source_id, r.caption) for r in source.records] == [("a.png", "eins"), ("b.png", "a caption")]


def test_a_file_listed_again_is_a_record_of_its_own(tmp_path):
    source = open_folder(folder(tmp_path, row("a.png", "one"), row("a.png", "two")))
    assert [(r.source_id, r.location, r.caption) for r in source.records] == [
        ("a.png", "a.png", "one"), ("a.png#2", "a.png", "two"),
    ]  # fmt: skip


def test_other_columns(tmp_path):
    source = open_folder(folder(tmp_path, {"image": "a.png", "label": "x"}), "image", "label")
    assert source.records[0].caption == "x"


@pytest.mark.parametrize("caption", [None, 3, ["a", "b"]])
def test_a_caption_that_is_no_text_is_a_problem_of_that_record(tmp_path, caption):
    source = open_folder(folder(tmp_path, row("a.png", caption), row("b.png")))
    assert source.records[0].problem.startswith("the caption is")
    assert source.records[1].problem is None


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((row("a.png"), "{broken"), "metadata.jsonl, line 2 is no JSON"),
        (("[1]",), "line 1 is no JSON object"),
        (({"file_name": "a.png", "caption": "x"},), "line 1 has no 'text'; it has 'file_name', .*--caption-column"),
        (({"text": "x"},), "no 'file_name'.*--image-column"),
        ((row(7),), "'file_name' is 7, not a file name"),
        ((), "lists no images"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_used_is_named(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        open_folder(folder(tmp_path, *lines))


def test_a_caption_that_is_no_unicode_is_a_problem_of_that_record(tmp_path):
    source = open_folder(folder(tmp_path, '{"file_name": "a.png", "text": "half \\ud83d"}', row("b.png")))
    assert source.records[0].problem == "the caption is not valid Unicode"
    with pytest.raises(UserError, match="not a file name"):
        open_folder(folder(tmp_path, '{"file_name": "\\ud83d.png", "text": "x"}'))


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row("a.png")), encoding="utf-8-sig")
    assert len(open_folder(tmp_path).records) == 1


def test_a_folder_that_is_not_there_or_has_no_list(tmp_path):
    with pytest.raises(UserError, match="--data .*nowhere does not exist"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no metadata.jsonl: put one beside the images.*\"file_name\""):
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


def test_the_inputs_hash_tells_captions_and_order_apart(tmp_path):
    hashes = set()
    for number, lines in enumerate(
        [(row("a"), row("b")), (row("b"), row("a")), (row("a"), row("b", "x")), (row("a"),)]
    ):
        path = tmp_path / str(number)
        path.mkdir()
        hashes.add(inputs_sha256(open_folder(folder(path, *lines)).records))
    assert len(hashes) == 3
