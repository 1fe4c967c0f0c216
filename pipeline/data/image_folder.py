"""A folder of pictures: listed in a metadata.jsonl, or each with a .txt of the same name beside it."""

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
    """The pictures of a folder, sorted by file name, which is their name.

    With a metadata.jsonl, one JSON object a line with a file name and a caption each, those that it lists; a file that
    is listed again (another caption) is a picture of its own. Without one, all pictures below the folder, the caption
    of `a.jpg` in `a.txt`. Files outside the folder are not read, links or not.
    Raises UserError for a folder, a file or a line that cannot be used.
    """

    def __init__(self, folder: Path, image_column: str | None, caption_column: str | None) -> None:
        self.folder = folder
        self.columns = image_column, caption_column

    def pictures(self) -> list[ListedImage]:
        metadata = self.folder / METADATA
        if metadata.is_file():
            image_column, caption_column = self.columns
            found = _listed(metadata, image_column or "file_name", caption_column or "text")
        elif any(self.columns):
            raise UserError(
                f"--data {self.folder} has no {METADATA}, so there are no columns to choose from: "
                "leave --image-column and --caption-column out"
            )
        else:
            found = _beside_captions(self.folder)
        return sorted(found, key=lambda picture: picture.name)

    def read(self, location: str) -> bytes:
        return _inside(self.folder, location).read_bytes()


def _inside(folder: Path, location: str | Path) -> Path:
    """The file at `location` below the folder. Raises OSError if that leads out of it."""
    path = folder / location
    # Path.resolve raises another error for a link to itself.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise OSError(f"{location} lies outside {folder}")
    return path


def _listed(metadata: Path, image_column: str, caption_column: str) -> list[ListedImage]:
    pictures = [_picture(row, metadata, number, image_column, caption_column) for number, row in _rows(metadata)]
    if not pictures:
        raise UserError(
            f"{metadata} lists no images: give one JSON object a line, as in "
            f'{{"{image_column}": "0001.jpg", "{caption_column}": "a caption"}}'
        )
    return pictures


def _beside_captions(folder: Path) -> list[ListedImage]:
    paths = [path for path in folder.rglob("*") if is_image_name(path.name) and path.is_file()]
    pictures = [_with_caption(folder, path.relative_to(folder)) for path in paths]
    if not any(picture.problem is None for picture in pictures):
        raise UserError(
            f"--data {folder} has no {METADATA}, and no picture with a .txt beside it: put the captions in "
            f'{METADATA}, one JSON object a line, as in {{"file_name": "0001.jpg", "text": "a caption"}}, '
            "or that of 0001.jpg in 0001.txt"
        )
    return pictures


def _with_caption(folder: Path, relative: Path) -> ListedImage:
    # A file's name can be any bytes; a record's is text.
    name = relative.as_posix().encode(errors="replace").decode()
    beside = relative.with_suffix(".txt")
    caption, problem = None, None
    try:
        caption = _inside(folder, beside).read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        problem = f"the caption in {beside} is not UTF-8 (byte {error.start})"
    except FileNotFoundError:
        problem = f"there is no caption: {beside} is not there"
    except OSError as error:
        problem = f"the caption cannot be read: {error}"
    return ListedImage(name, str(relative), caption, problem)


def _rows(path: Path) -> list[tuple[int, dict]]:
    """(line number, object) of each line that is not blank."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is no JSON ({error}): mend or delete the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is no JSON object: {line[:80]}")
        rows.append((number, row))
    return rows


def _picture(row: dict[str, Any], path: Path, number: int, image_column: str, caption_column: str) -> ListedImage:
    for column, flag in ((image_column, "--image-column"), (caption_column, "--caption-column")):
        if column not in row:
            raise UserError(
                f"{path}, line {number} has no {column!r}; it has {', '.join(map(repr, row))}: choose one with {flag}"
            )
    name = row[image_column]
    if not isinstance(name, str) or not name or not is_unicode(name):
        raise UserError(f"{path}, line {number}: {image_column!r} is {name!r}, not a file name")
    return ListedImage(name, name, row[caption_column])
