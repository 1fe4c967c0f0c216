"""A folder of images, either listed in a metadata.jsonl or each with its caption in a .txt next to it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pipeline.data.images import is_image_name
from pipeline.data.records import ListedImage, is_unicode
from pipeline.system.errors import UserError

METADATA = "metadata.jsonl"


class ImageFolder:
    """The images of a folder, sorted by file name. An image's name is its file name.

    With a metadata.jsonl (one JSON object per line, with a file name and a caption), these are the images that it
    lists; a file listed twice, with another caption, counts as two images. Without one, these are all images below the
    folder, with the caption of `a.jpg` in `a.txt`. Files outside the folder are never read, not even through links.
    Raises UserError for a folder, a file or a line that cannot be used.
    """

    def __init__(self, folder: Path, image_column: str | None, caption_column: str | None) -> None:
        self.folder = folder
        self.columns = image_column, caption_column

    def images(self) -> list[ListedImage]:
        metadata = self.folder / METADATA
        if metadata.is_file():
            image_column, caption_column = self.columns
            listed = _listed_in(metadata, image_column or "file_name", caption_column or "text")
        elif any(self.columns):
            raise UserError(
                f"--data {self.folder} has no {METADATA}, so there are no columns to choose from. "
                "Remove --image-column and --caption-column."
            )
        else:
            listed = _found_in(self.folder)
        return sorted(listed, key=lambda image: image.name)

    def read(self, location: str) -> bytes:
        return _inside(self.folder, location).read_bytes()


def _inside(folder: Path, location: str | Path) -> Path:
    """The file at `location` below the folder. Raises OSError if that leads out of the folder."""
    path = folder / location
    # Path.resolve would raise RuntimeError, not OSError, for a link to itself.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise OSError(f"{location} lies outside {folder}")
    return path


def _listed_in(metadata: Path, image_column: str, caption_column: str) -> list[ListedImage]:
    images = [_image_of(row, metadata, number, image_column, caption_column) for number, row in _rows(metadata)]
    if not images:
        raise UserError(
            f"{metadata} lists no images. Write one JSON object per line, such as "
            f'{{"{image_column}": "0001.jpg", "{caption_column}": "a caption"}}'
        )
    return images


def _found_in(folder: Path) -> list[ListedImage]:
    paths = [path for path in folder.rglob("*") if is_image_name(path.name) and path.is_file()]
    images = [_with_caption(folder, path.relative_to(folder)) for path in paths]
    if not any(image.problem is None for image in images):
        raise UserError(
            f"--data {folder} has neither a {METADATA} nor an image with a .txt next to it. Put the captions in "
            f'{METADATA}, one JSON object per line, such as {{"file_name": "0001.jpg", "text": "a caption"}}, '
            "or put the caption of 0001.jpg in 0001.txt."
        )
    return images


def _with_caption(folder: Path, relative: Path) -> ListedImage:
    # A file name can be any bytes, but a record's name must be text.
    name = relative.as_posix().encode(errors="replace").decode()
    caption_file = relative.with_suffix(".txt")
    caption, problem = None, None
    try:
        caption = _inside(folder, caption_file).read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        problem = f"the caption in {caption_file} is not UTF-8 (byte {error.start})"
    except FileNotFoundError:
        problem = f"no caption file {caption_file}"
    except OSError as error:
        problem = f"the caption cannot be read: {error}"
    return ListedImage(name, str(relative), caption, problem)


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}). Fix or delete the line.") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is not a JSON object: {line[:80]}. Fix or delete the line.")
        rows.append((number, row))
    return rows


def _image_of(row: dict[str, Any], path: Path, number: int, image_column: str, caption_column: str) -> ListedImage:
    for column, flag in ((image_column, "--image-column"), (caption_column, "--caption-column")):
        if column not in row:
            raise UserError(
                f"{path}, line {number} has no {column!r}. It has {', '.join(map(repr, row))}: choose one with {flag}."
            )
    name = row[image_column]
    if not isinstance(name, str) or not name or not is_unicode(name):
        raise UserError(f"{path}, line {number}: {image_column!r} is {name!r}, which is not a file name")
    return ListedImage(name, name, row[caption_column])
