"""A folder of images, either listed in a metadata file or each with its caption in a text file next to it."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.fields import field
from pipeline.data.files import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    is_mac_metadata,
    parse_json,
    reason_of,
    state_of,
    twice,
)
from pipeline.data.images import is_image_name
from pipeline.data.records import ListedImage
from pipeline.system.echo import plural
from pipeline.system.errors import UserError
from pipeline.system.text_files import is_unicode, lines_in
from shards.regular import open_regular, read_regular

# Lists of images, the first that exists is taken; and the endings of captions, likewise.
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_ENDINGS = (".txt", ".caption")
# A longer line of a list is a mistake, or an attack.
MAX_LINE_BYTES = 1 << 24


class ImageFolder:
    """The images of a folder, sorted by file name. An image's name is its file name, relative to the folder.

    With a metadata.jsonl (one JSON object per line, with a file name and a caption) or a metadata.csv, these are the
    images that it lists; a file listed twice, with another caption, counts as two images. Without one, these are all
    images below the folder, with the captions of `a.jpg` in `a.txt` or `a.caption`, one per line. Files outside the
    folder are never read, not even through links. `passed_over` counts the files of other kinds, by ending.
    Raises UserError for a folder, a file or a line that cannot be used.
    """

    def __init__(self, folder: Path, image_column: str | None, caption_column: str | None) -> None:
        self.folder = folder
        self.columns = image_column, caption_column
        self.passed_over: Counter[str] = Counter()

    def images(self) -> list[ListedImage]:
        metadata = metadata_in(self.folder)
        if metadata:
            image_column, caption_column = self.columns
            listed = _listed_in(metadata, image_column or "file_name", caption_column or "text")
        elif any(self.columns):
            raise UserError(
                f"--data {self.folder} has no {METADATA[0]}, so there are no columns to choose from. "
                "Remove --image-column and --caption-column."
            )
        else:
            listed = self._found()
        return sorted(listed, key=lambda image: image.name)

    def read(self, location: str) -> bytes:
        return read_regular(_inside(self.folder, location), MAX_IMAGE_BYTES)

    def _found(self) -> list[ListedImage]:
        images = []
        for relative in self._files():
            if is_image_name(relative.name):
                images.append(_with_captions(self.folder, relative))
            elif relative.suffix.lower() not in CAPTION_ENDINGS and not relative.name.startswith("."):
                self.passed_over[relative.suffix.lower() or "without an ending"] += 1
        if not any(image.problem is None for image in images):
            raise UserError(_nothing_usable(self.folder, images))
        return images

    def _files(self) -> Iterator[Path]:
        """All that is not a folder, relative to the folder. Links to folders are not followed, and what macOS adds is
        left out."""

        def pass_over(_: OSError) -> None:
            self.passed_over["folder that cannot be read"] += 1

        for parent, _, names in os.walk(self.folder, onerror=pass_over):
            for name in names:
                relative = Path(parent, name).relative_to(self.folder)
                if not is_mac_metadata(relative.as_posix()):
                    yield relative


def metadata_in(folder: Path) -> Path | None:
    """The folder's list of images. A link to nothing and what is not a file count as well, and are refused later."""
    return next((folder / name for name in METADATA if os.path.lexists(folder / name)), None)


def _inside(folder: Path, location: str | Path) -> Path:
    """The file at `location` below the folder. Raises OSError if that leads out of the folder."""
    path = folder / location
    # Path.resolve would raise RuntimeError, not OSError, for a link to itself.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise OSError("it lies outside the folder")
    return path


def _with_captions(folder: Path, relative: Path) -> ListedImage:
    # A file name can be any bytes, but a record's name must be text.
    name = relative.as_posix().encode(errors="replace").decode()
    captions, problem = _captions_beside(folder, relative)
    return ListedImage(name, str(relative), captions, problem, *state_of(folder / relative))


def _captions_beside(folder: Path, image: Path) -> tuple[list[str], str | None]:
    """The captions in the text file next to an image, or the reason why they cannot be read."""
    candidates = [image.with_suffix(ending) for ending in CAPTION_ENDINGS]
    file = next((path for path in candidates if os.path.lexists(folder / path)), candidates[0])
    try:
        return lines_in(read_regular(_inside(folder, file), MAX_TEXT_BYTES).decode("utf-8-sig")), None
    except UnicodeDecodeError as error:
        return [], f"the caption in {file} is not UTF-8 (byte {error.start})"
    except FileNotFoundError:
        return [], f"no caption file {file}"
    except OSError as error:
        return [], f"the caption cannot be read: {reason_of(error)}"


def _nothing_usable(folder: Path, images: list[ListedImage]) -> str:
    holds = f"contains {plural(len(images), 'image')}, but no captions" if images else "contains no images"
    others = sorted(
        path.relative_to(folder).as_posix()
        for pattern in ("*", "*/*")
        for path in folder.glob(pattern)
        if path.name in METADATA or path.suffix in (".csv", ".json", ".jsonl", ".tsv")
    )
    lists = " or ".join(METADATA)
    there = f" It has {', '.join(others[:3])}, which is not read there or under that name." if others else ""
    return (
        f"--data {folder} {holds}: it has neither a {lists} nor an image with a .txt next to it.{there} "
        f'Put the captions in {METADATA[0]}, one JSON object per line, such as {{"file_name": "0001.jpg", '
        '"text": "a caption"}, or put the caption of 0001.jpg in 0001.txt.'
    )


def _listed_in(metadata: Path, image_column: str, caption_column: str) -> list[ListedImage]:
    """The images of a list. One without a caption has None in its place; a line without a file name is refused."""
    rows = _csv_rows(metadata) if metadata.suffix == ".csv" else _json_rows(metadata)
    images, columns, nameless = [], dict[str, None](), 0
    for number, row in rows:
        columns |= dict.fromkeys(row)
        if image_column in row:
            images.append(_image_of(row, metadata, number, image_column, caption_column))
        else:
            nameless = nameless or number
    if not columns:
        raise UserError(
            f"{metadata} lists no images. Write one JSON object per line, such as "
            f'{{"{image_column}": "0001.jpg", "{caption_column}": "a caption"}}'
        )
    captioned = caption_column in columns or any(image.captions is not None for image in images)
    for column, flag, found in (
        (image_column, "--image-column", image_column in columns),
        (caption_column, "--caption-column", captioned),
    ):
        if not found:
            raise UserError(
                f"{metadata} has no {column!r} in any line. It has {', '.join(map(repr, columns))}: "
                f"choose one with {flag}."
            )
    if nameless:
        raise UserError(f"{metadata}, line {nameless} has no {image_column!r}. Add the file's name or delete the line.")
    return images


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} {error}. Fix or delete the line.") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is not a JSON object: {line[:80]}. Fix or delete the line.")
        yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, fields by column) of each row. The first row names the columns."""
    reader = csv.DictReader(_lines(path))
    try:
        columns = reader.fieldnames or []
        # Spreadsheets add columns without a name.
        if name := twice(filter(None, columns)):
            raise UserError(f"{path} names the column {name!r} twice. Rename or delete one of them.")
        for row in reader:
            if more := row.pop(None, None):
                raise UserError(
                    f"{path}, line {reader.line_num} has {len(columns) + len(more)} fields, not {len(columns)}. "
                    'Put a caption that holds a comma in quotes: 0001.jpg,"red, round".'
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not CSV ({error}). Fix or delete the line.") from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a list, with their ends. Raises UserError if it cannot be read as lines of UTF-8."""
    position = 0
    try:
        with open_regular(path) as stream:
            while line := stream.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(f"{path} has a line of more than {MAX_LINE_BYTES} bytes. Is it a list of images?")
                yield line.decode("utf-8" if position else "utf-8-sig")
                position += len(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {position + error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}). Replace or remove it.") from None


def _image_of(row: dict[str, Any], path: Path, number: int, image_column: str, caption_column: str) -> ListedImage:
    name = row[image_column]
    if not isinstance(name, str) or not name or not is_unicode(name):
        raise UserError(f"{path}, line {number}: {image_column!r} is {name!r}, which is not a file name")
    state = state_of(path.parent / name)
    return ListedImage(_own_name(path.parent, name), name, field(row, caption_column), None, *state)


def _own_name(folder: Path, name: str) -> str:
    """The name of a listed file, which is the same wherever the folder lies: as it is listed, if that is relative.

    Of an absolute path, what comes after the folder; of a file elsewhere, which is never read, the last part.
    """
    if not os.path.isabs(name):
        return name
    place = Path(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
    folder = Path(os.path.realpath(folder))
    return place.relative_to(folder).as_posix() if place.is_relative_to(folder) else place.name
