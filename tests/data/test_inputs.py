"""Latents whose inputs changed: an image that was replaced, a caption that was corrected."""

import io
import json
import os
import re
import tarfile

import datasets
import pytest
from click.testing import CliRunner
from PIL import Image
from support.stages import read_entries, reset_accelerate, run_encode, shard_files, tree
from support.tiny import write_images

from pipeline.cli import main
from pipeline.data.image_folder import ImageFolder
from pipeline.system.errors import UserError


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data", 13)


@pytest.fixture
def out(teacher, data, tmp_path):
    return run_encode(teacher, data, tmp_path / "out")


def caption(data, changes):
    """Write other captions in the list of a folder."""
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = changes.get(row["file_name"], row["text"])
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def replace(data, name, colour="red"):
    stream = io.BytesIO()
    Image.new("RGB", (50, 40), colour).save(stream, "PNG")
    (data / name).write_bytes(stream.getvalue())


def refusal(teacher, data, out, **changes):
    """The message with which a run is refused, which must change nothing."""
    before = tree(out)
    with pytest.raises(UserError) as caught:
        run_encode(teacher, data, out, **changes)
    reset_accelerate()
    assert tree(out) == before
    return str(caught.value)


def captions(out):
    return {entry.meta["source_id"]: entry.meta["caption"] for entry in read_entries(out, "latents", [])}


def test_a_replaced_image_is_refused_with_what_to_delete(teacher, data, out, tmp_path):
    before = shard_files(out)
    size = (data / "007.png").stat().st_size
    replace(data, "007.png")
    message = refusal(teacher, data, out)
    assert f"the image 007.png was replaced after {out}/s00001.tar was written: it had {size} bytes" in message
    assert "1 image in 1 shard." in message
    assert f"delete s00001.tar and s00001.index in {out}, and rerun the same command" in message
    # The plan of a run says so too.
    options = ["--device", "cpu", "--resolution", 32, "--batch-size", 4, "--entries-per-shard", 5]
    options += ["--teacher", teacher, "--data", data, "--out", out]
    result = CliRunner().invoke(main, ["encode", "--dry-run", *map(str, options)])
    assert (result.exit_code, "the image 007.png was replaced" in result.output) == (2, True)
    # The remedy works.
    for name in re.search(r"delete (.*) in ", message)[1].split(" and "):
        (out / name).unlink()
    run_encode(teacher, data, out)
    assert shard_files(out) == shard_files(run_encode(teacher, data, tmp_path / "fresh"))
    assert {name for name, content in shard_files(out).items() if before[name] != content} == {
        "s00001.tar",
        "s00001.index",
    }


def rewrite(path, later=0):
    """Write a file's bytes again, `later` seconds after it was last modified."""
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + later * 10**9))


def test_an_image_replaced_by_one_of_equal_size_is_noticed(teacher, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), "red").save(data / f"{number}.bmp")
        (data / f"{number}.txt").write_text("a caption")
    out = run_encode(teacher, data, tmp_path / "out")
    Image.new("RGB", (32, 32), "blue").save(data / "1.bmp")
    rewrite(data / "1.bmp", later=5)
    message = refusal(teacher, data, out)
    assert "the image 1.bmp was replaced" in message
    assert "it had 3126 bytes and has other contents now. That is so for 1 image in 1 shard." in message


def test_images_that_were_copied_are_compared_once(teacher, data, out, monkeypatch):
    for path in data.glob("*.png"):
        rewrite(path, later=5)
    read, original = [], ImageFolder.read
    monkeypatch.setattr(ImageFolder, "read", lambda self, location: read.append(location) or original(self, location))
    before = shard_files(out)
    run_encode(teacher, data, out)
    assert len(read) == 13
    run_encode(teacher, data, out)
    assert len(read) == 13
    assert shard_files(out) == before


def test_latents_that_remember_no_sizes_are_used_as_before(teacher, data, out, capsys):
    for path in out.glob("inputs-*"):
        path.unlink()
    replace(data, "007.png")
    before = tree(out)
    run_encode(teacher, data, out)
    assert "already finished" in capsys.readouterr().out
    assert tree(out) == before


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_an_image_replaced_in_a_tar_or_a_table_is_noticed(teacher, data, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "library")

    def pack():
        images = [data / f"{i:03d}.png" for i in range(7)]
        if kind == "parquet":
            table = datasets.Dataset.from_dict({"image": [i.read_bytes() for i in images], "text": ["c"] * 7})
            table.to_parquet(tmp_path / "data.parquet")
            return tmp_path / "data.parquet"
        with tarfile.open(tmp_path / "data.tar", "w") as tar:
            for image in images:
                image.with_suffix(".txt").write_text("c")
                tar.add(image, image.name)
                tar.add(image.with_suffix(".txt"), image.with_suffix(".txt").name)
        return tmp_path / "data.tar"

    out = run_encode(teacher, pack(), tmp_path / "out")
    run_encode(teacher, pack(), out)
    replace(data, "006.png")
    name = "006.png" if kind == "tar" else "000000006"
    assert f"the image {name} was replaced" in refusal(teacher, pack(), out)


def test_a_changed_caption_is_shown(teacher, data, out):
    caption(data, {"003.png": "another", "004.png": "x\x1b[2J", "011.png": "y"})
    message = refusal(teacher, data, out)
    assert "3 captions changed. The first is that of 003.png: 'picture 3' -> 'another'" in message
    caption(data, {"003.png": None, "004.png": "picture 4", "011.png": "picture 11"})
    assert "'picture 3' -> cannot be used (there is no caption)" in refusal(teacher, data, out)


def test_images_that_were_added_or_taken_away_are_named(teacher, data, out):
    lines = (data / "metadata.jsonl").read_text().splitlines(keepends=True)
    (data / "metadata.jsonl").write_text("".join(sorted(lines)[1:]))
    message = refusal(teacher, data, out)
    assert "entry 0 was the image 000.png and is now 001.png (13 entries -> 12)" in message
    (data / "metadata.jsonl").write_text("".join([*lines, lines[0].replace("picture", "other")]))
    assert "(13 entries -> 14)" in refusal(teacher, data, out)


@pytest.mark.parametrize("remembers", [True, False])
def test_an_image_whose_caption_was_added_is_taken_up(teacher, data, tmp_path, capsys, remembers):
    """It gives the latents that it would have given, its caption is known from then on, and no other shard changes."""
    caption(data, {"006.png": None, "007.png": ""})
    out = run_encode(teacher, data, tmp_path / "out")
    if not remembers:
        for path in out.glob("inputs-*"):
            path.unlink()
    before = shard_files(out)
    caption(data, {"006.png": "picture 6"})
    run_encode(teacher, data, out)
    assert shard_files(out) == before
    run_encode(teacher, data, out, retry_skipped=True)
    assert "rewriting s00001.tar: 1 of its 2 skipped images can be read now" in capsys.readouterr().out
    after = shard_files(out)
    assert {name for name in after if after[name] != before[name]} == {"s00001.tar", "s00001.index"}
    assert captions(out)["006.png"] == "picture 6"
    assert [json.loads(line)["source_id"] for line in (out / "skipped.jsonl").read_text().splitlines()] == ["007.png"]

    capsys.readouterr()
    run_encode(teacher, data, out)
    assert "already finished" in capsys.readouterr().out
    caption(data, {"006.png": "changed"})
    assert "1 caption changed. The first is that of 006.png: 'picture 6' -> 'changed'" in refusal(teacher, data, out)
    caption(data, {"006.png": "picture 6", "007.png": "picture 7"})
    run_encode(teacher, data, out, retry_skipped=True)
    undisturbed = run_encode(teacher, write_images(tmp_path / "whole", 13), tmp_path / "undisturbed")
    assert captions(out) == captions(undisturbed)
    tars = [{n: c for n, c in shard_files(path).items() if n.endswith(".tar")} for path in (out, undisturbed)]
    assert tars[0] == tars[1]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"sizes": [1], "without_caption": []}', b"[" * 100_000])
def test_a_damaged_memory_names_its_file(teacher, data, out, content):
    (out / "inputs-s00001.json").write_bytes(content)
    assert f"{out}/inputs-s00001.json is damaged" in refusal(teacher, data, out)
    (out / "inputs-s00001.json").unlink()
    run_encode(teacher, data, out)


def test_notes_are_printed_by_the_run_and_its_plan(teacher, tmp_path):
    data = write_images(tmp_path / "data", 3)
    (data / "metadata.jsonl").unlink()
    for number in range(2):
        (data / f"{number:03d}.txt").write_text("a caption")
    (data / "drawing.svg").write_text("<svg/>")
    options = ["--teacher", teacher, "--data", data, "--out", tmp_path / "out", "--device", "cpu", "--resolution", 32]
    for more in (["--dry-run"], []):
        result = CliRunner().invoke(main, ["encode", *map(str, options), *more])
        assert result.exit_code == 0, result.output
        assert "note: passed over 1 file of other kinds: 1 .svg" in result.output
        assert "note: 1 of 3 entries will be skipped. The first is 002.png: no caption file 002.txt" in result.output


def test_latents_are_no_images(teacher, out, tmp_path):
    with pytest.raises(UserError, match=f"--data {out} holds latents or a cache, not images. Give the images"):
        run_encode(teacher, out, tmp_path / "others")
    reset_accelerate()
    assert not (tmp_path / "others").exists()
