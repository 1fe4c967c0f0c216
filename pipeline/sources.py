"""Where captioned images come from. A source lists its records in a fixed order and reads one's bytes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.errors import UserError

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Record:
    """One captioned image. `source_id` names it for good: every random draw of its entries hangs on it.

    `problem` says why it cannot be used, when the listing alone shows that.
    """

    source_id: str
    location: str
    caption: str
    problem: str | None = None


class Source(Protocol):
    """What `encode` needs of a source; a new kind of input is a class with these two."""

    records: list[Record]

    def read(self, record: Record) -> bytes:
        """The encoded image. Raises OSError if it is not there."""


class ImageFolder:
    """A folder of images with a metadata.jsonl: one JSON object a line, a file name and a caption each.

    Records are sorted by file name. A file that is listed again (another caption) is a record of its own.
    Raises UserError for a folder, a file or a line that cannot be used.
    """

    def __init__(self, folder: Path, image_column: str, caption_column: str) -> None:
        self.folder = folder
        rows = _rows(folder / METADATA)
        listed = [_record(row, folder / METADATA, number, image_column, caption_column) for number, row in rows]
        if not listed:
            raise UserError(f"{folder / METADATA} lists no images: give one JSON object a line, as in "
                            f'{{"{image_column}": "0001.jpg", "{caption_column}": "a caption"}}')  # fmt: skip
        self.records = sorted(_numbered(listed), key=lambda record: record.source_id)

    def read(self, record: Record) -> bytes:
        path = self.folder / record.location
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise OSError(f"{record.location} lies outside {self.folder}")
        return path.read_bytes()


def open_source(data: Path, image_column: str, caption_column: str) -> Source:
    """The source that `--data` names. Raises UserError for one that is not there or not known."""
    if not data.exists():
        raise UserError(f"--data {data} does not exist")
    if not (data / METADATA).is_file():
        raise UserError(
            f"--data {data} has no {METADATA}: put one beside the images, one JSON object a line, as in "
            f'{{"{image_column}": "0001.jpg", "{caption_column}": "a caption"}}'
        )
    return ImageFolder(data, image_column, caption_column)


def inputs_sha256(records: list[Record]) -> str:
    """A hash of which images a run takes, and their captions; not of the pixels."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.source_id, record.caption], ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


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


def _record(row: dict, path: Path, number: int, image_column: str, caption_column: str) -> Record:
    for column, flag in ((image_column, "--image-column"), (caption_column, "--caption-column")):
        if column not in row:
            raise UserError(
                f"{path}, line {number} has no {column!r}; it has {', '.join(map(repr, row))}: choose one with {flag}"
            )
    name, caption = row[image_column], row[caption_column]
    if not isinstance(name, str) or not name or not _is_unicode(name):
        raise UserError(f"{path}, line {number}: {image_column!r} is {name!r}, not a file name")
    if not isinstance(caption, str):
        return Record(name, name, "", problem=f"the caption is {type(caption).__name__}, not text")
    if not _is_unicode(caption):
        return Record(name, name, "", problem="the caption is not valid Unicode")
    return Record(name, name, caption)


def _is_unicode(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can carry and UTF-8 cannot."""
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


def _numbered(records: list[Record]) -> list[Record]:
    """The same records; the second and later ones of a file get a `#2`, `#3` behind their id."""
    seen: Counter[str] = Counter()
    numbered = []
    for record in records:
        seen[record.source_id] += 1
        again = seen[record.source_id]
        name = record.source_id if again == 1 else f"{record.source_id}#{again}"
        numbered.append(Record(name, record.location, record.caption, record.problem))
    return numbered
