"""Images in WebDataset tars, such as img2dataset writes: the members with the same key are one sample."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.shardlists import expand_urls

from pipeline.data.images import is_image_name
from pipeline.data.records import ListedImage, is_unicode
from pipeline.system.errors import UserError

# A larger .txt or .json is not taken for a caption.
MAX_TEXT_BYTES = 1 << 20
END_OF_ARCHIVE = bytes(1024)


class Member(NamedTuple):
    """Where a file's bytes are in a tar, and its name, split at the first dot of the base name as WebDataset does."""

    key: str
    ending: str
    offset: int
    length: int


class Tars:
    """The images of several tars, in the order of the tars and of their members. An image's name is its member's name.

    `image_column` is the image's file extension (jpg, or several as jpg;png), by default any that Pillow opens.
    `caption_column` is the extension of a text member or a field of the .json, by default the .txt, else the field
    `caption`. All tars are listed at once, and image bytes are read later, directly from their place in the tar.
    Raises UserError for a file that is truncated, damaged or not a tar.
    """

    def __init__(self, tars: list[Path], image_column: str | None, caption_column: str | None) -> None:
        self.tars = tars
        self.image_endings = image_column.lower().split(";") if image_column else None
        self.caption_column = caption_column

    def images(self) -> list[ListedImage]:
        return [image for tar_index in range(len(self.tars)) for image in self._list(tar_index)]

    def read(self, location: tuple[int, int, int]) -> bytes:
        tar_index, offset, length = location
        with open(self.tars[tar_index], "rb") as stream:
            data = os.pread(stream.fileno(), length, offset)
        if len(data) != length:
            raise OSError(f"{self.tars[tar_index]} is shorter than when it was listed")
        return data

    def _list(self, tar_index: int) -> Iterator[ListedImage]:
        with open(self.tars[tar_index], "rb") as stream:
            for key, members in groupby(_members(self.tars[tar_index]), key=lambda member: member.key):
                yield self._image_of(tar_index, key, list(members), stream.fileno())

    def _image_of(self, tar_index: int, key: str, members: list[Member], fd: int) -> ListedImage:
        image = next((member for member in members if self._is_image(member)), None)
        if image is None:
            endings = ", ".join(f".{member.ending}" for member in members)
            return ListedImage(key, None, None, f"the sample has no image, only {endings}")
        location = (tar_index, image.offset, image.length)
        try:
            caption = _caption({member.ending: member for member in members}, self.caption_column, fd)
        except ValueError as error:
            return ListedImage(f"{key}.{image.ending}", location, None, str(error))
        return ListedImage(f"{key}.{image.ending}", location, caption)

    def _is_image(self, member: Member) -> bool:
        if self.image_endings is None:
            return is_image_name(f"_.{member.ending}")
        return member.ending in self.image_endings


def tars_named(data: str) -> list[Path]:
    """The tars that `--data` names: a single tar, a brace pattern (tars/{00000..00012}.tar), or a directory of tars."""
    if data.endswith(".tar"):
        return _expand(data)
    return sorted(Path(data).glob("*.tar")) if Path(data).is_dir() else []


def _expand(pattern: str) -> list[Path]:
    if ":" in pattern.split("{")[0]:
        raise UserError(f"--data {pattern}: tars can be read only from a local disk. Download them first.")
    tars = [Path(name) for name in expand_urls(pattern)]
    missing = [tar for tar in tars if not tar.is_file()]
    if missing:
        raise UserError(
            f"--data {pattern}: {missing[0]} does not exist ({len(missing)} of {len(tars)} tars are missing). "
            "Fix the pattern or restore the tars."
        )
    return tars


def _members(tar: Path) -> Iterator[Member]:
    """The regular files in a tar. Directories, links and devices are skipped."""
    if not _has_end(tar):
        raise UserError(f"{tar} is truncated or not a tar: it has no end marker. Create it again or remove it.")
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                # tarfile would keep every member's header in memory.
                archive.members = []  # type: ignore[attr-defined]
                if info.isreg() and not info.issparse() and is_unicode(info.name):
                    folder, _, base = info.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    yield Member(key, ending.lower(), info.offset_data, info.size)
            # tarfile treats an unreadable header as the end of the archive.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except tarfile.TarError as error:
        raise UserError(f"{tar} is damaged ({error}). Create it again or remove it.") from None


def _has_end(tar: Path) -> bool:
    """Whether the file ends with the end-of-archive marker. tarfile accepts a tar truncated between two members."""
    with open(tar, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size < len(END_OF_ARCHIVE) or size % tarfile.BLOCKSIZE:
            return False
        stream.seek(-len(END_OF_ARCHIVE), os.SEEK_END)
        return stream.read() == END_OF_ARCHIVE


def _caption(members: dict[str, Member], column: str | None, fd: int) -> Any:
    """The caption of a sample, or None if it has none. Raises ValueError with the problem if it cannot be read."""
    ending = "txt" if column is None else column
    if ending in members:
        return _text(members[ending], fd).strip()
    if "json" not in members:
        return None
    try:
        fields = json.loads(_text(members["json"], fd))
    except json.JSONDecodeError as error:
        raise ValueError(f"the .json is not JSON ({error})") from None
    return fields.get(column or "caption") if isinstance(fields, dict) else None


def _text(member: Member, fd: int) -> str:
    if member.length > MAX_TEXT_BYTES:
        raise ValueError(f"the .{member.ending} has {member.length} bytes, too many for a caption")
    try:
        return os.pread(fd, member.length, member.offset).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the .{member.ending} is not UTF-8 (byte {error.start})") from None
