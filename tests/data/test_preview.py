"""What `encode` shows before a long run: captions as they are read, and what happens to images of odd sizes."""

import json

import numpy as np
import pytest
from PIL import Image
from support.stages import read_entries, run_encode
from support.tiny import write_images

from pipeline.data.preview import preview
from pipeline.data.source import open_source
from pipeline.settings.data import DataSettings


@pytest.fixture
def sizes(tmp_path):
    """Images of 64 x 64, 20 x 64, 40 x 64 and 31 x 31 pixels, and one that cannot be read."""
    folder = tmp_path / "sizes"
    folder.mkdir()
    for name, size in {"a": (64, 64), "b": (20, 64), "c": (40, 64), "d": (31, 31)}.items():
        Image.fromarray(np.zeros((*size[::-1], 3), np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"caption {name}")
    (folder / "e.png").write_bytes(b"nothing")
    (folder / "e.txt").write_text("x" * 300)
    return folder


def lines(folder, *sizes):
    return preview(open_source(DataSettings(data=str(folder))), *sizes)


def test_captions_and_sizes_are_told(sizes):
    assert lines(sizes, 32, 0) == [
        "caption of a.png: 'caption a'",
        "caption of b.png: 'caption b'",
        "caption of d.png: 'caption d'",
        "note: 1 of 5 images looked at cannot be read and will be skipped. The first is e.png: "
        "not decodable: not an image of a known format",
        "note: 2 of 5 images looked at have a side under 32 px and are enlarged. --min-size 32 skips them",
        "note: 2 of 5 images looked at lose more than a third to the square crop",
    ]
    assert lines(sizes, 32, 30)[4:] == [
        "note: 1 of 5 images looked at have a side under 30 px and are skipped",
        "note: 1 of 5 images looked at have a side under 32 px and are enlarged. --min-size 32 skips them",
        "note: 1 of 5 images looked at lose more than a third to the square crop",
    ]


def test_a_resolution_above_all_images_is_told_with_theirs(sizes):
    assert lines(sizes, 512, 0)[4] == (
        "note: all images looked at have a side under 512 px and are enlarged; the shorter side of the largest has "
        "64 px. Give a smaller --resolution to leave them as they are"
    )


def test_images_that_a_list_names_and_that_are_missing_are_told(tmp_path):
    folder = write_images(tmp_path / "images", 3)
    (folder / "001.png").unlink()
    assert lines(folder, 32, 0)[3] == (
        "note: 1 of 3 images looked at cannot be read and will be skipped. The first is 001.png: "
        "No such file or directory"
    )


def test_nothing_is_said_of_sizes_that_fit_and_long_captions_are_cut(tmp_path):
    folder = write_images(tmp_path / "images", 2)
    row = json.dumps({"file_name": "000.png", "text": "word\n" * 100})
    (folder / "metadata.jsonl").write_text(row + "\n")
    (line,) = lines(folder, 32, 0)
    assert line.startswith("caption of 000.png: 'word\\nword")
    assert len(line) < 160


def test_min_size_skips_and_says_why(teacher, sizes, tmp_path):
    out = run_encode(teacher, sizes, tmp_path / "out", min_size=30, max_skipped=0.9)
    assert [entry.meta["source_id"] for entry in read_entries(out, "latents", [])] == ["a.png", "c.png", "d.png"]
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {"source_id": "b.png", "reason": "too small: 20 x 64 pixels"} in skipped
    assert json.loads((out / "manifest.json").read_text())["spec"]["min_size"] == 30


def test_without_it_the_spec_is_that_of_earlier_versions(teacher, sizes, tmp_path):
    out = run_encode(teacher, sizes, tmp_path / "out", max_skipped=0.9)
    assert "min_size" not in json.loads((out / "manifest.json").read_text())["spec"]
