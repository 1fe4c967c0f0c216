"""Text files of a user: prompts, configs and options."""

import os

import click
import pytest

from pipeline.models.provenance import card_text
from pipeline.models.reading import read_json
from pipeline.settings.sample import SampleSettings
from pipeline.system import text_files
from pipeline.system.config_file import section_of
from pipeline.system.errors import UserError
from pipeline.system.jsonl import read_jsonl
from pipeline.system.output import description
from pipeline.system.prompts import gather_prompts, read_prompts


@pytest.fixture(params=["fifo", "device", "long"])
def endless(request, tmp_path, monkeypatch):
    """A file that a plain read would never come to the end of."""
    path = tmp_path / "endless"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    else:
        monkeypatch.setattr(text_files, "MAX_TEXT_BYTES", 100)
        path.write_bytes(b"x" * 101)
    return path


def test_an_endless_file_is_never_read_to_its_end(endless):
    what = "endless (is not a regular file|has more than 100 bytes)"
    with pytest.raises(UserError, match=f"cannot be read .{what}"):
        read_prompts(endless)
    with pytest.raises(click.UsageError, match=f"--config .*endless cannot be read: {what}"):
        section_of(endless, SampleSettings)
    with pytest.raises((UserError, OSError), match=what):
        read_json(endless)


def test_an_endless_card_or_manifest_counts_as_none(endless):
    for name in ("README.md", "manifest.json"):
        endless.with_name(name).symlink_to(endless)
    assert card_text("teacher", endless.parent, None, hub=False) == ""
    assert description(endless.parent) is None


def test_only_line_ends_end_a_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\x0ctwo\u2028three\x1cfour\u0085five\r\n \n\tsix \rseven".encode())
    assert read_prompts(file) == ["one\x0ctwo\u2028three\x1cfour\u0085five", "six", "seven"]


def test_a_line_of_json_may_hold_any_character(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "one\u2028two"}\n{"cut\n', encoding="utf-8")
    assert read_jsonl(file) == [{"text": "one\u2028two"}]


def test_a_prompt_may_be_longer_than_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = ("a lighthouse " * 40, "灯台" * 100)
    assert gather_prompts(prompts) == list(prompts)


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_the_name_of_something_else_is_no_prompt(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    (os.mkdir if kind == "folder" else os.mkfifo)("cat")
    with pytest.raises(UserError, match="--prompts cat is the name of something that is not a text file"):
        gather_prompts(("a dog", "cat"))
