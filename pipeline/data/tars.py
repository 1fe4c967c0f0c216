"""Images in WebDataset tars, such as img2dataset writes: the members with the same key are one sample."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from webdataset.shardlists import expand_urls

from pipeline.data.fields import field
from pipeline.data.files import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    files_in,
    is_mac_metadata,
    parse_json,
    refuse_special,
    state_of,
)
from pipeline.data.images import is_image_name
from pipeline.data.records import ListedImage
from pipeline.system.errors import UserError
from pipeline.system.text_files import lines_in
from shards.regular import open_regular

TEXT_ENDINGS = ("txt", "caption", "json")
# More than any header takes, however long its names are.
MAX_HEADER_BYTES = 1 << 20
END_OF_ARCHIVE = bytes(1024)
# Of one pattern. The largest public data sets have fewer.
MAX_TARS = 1_000_000
# What matters in a brace pattern: an escaped character, a range of numbers, one of letters, and the signs themselves.
BRACES = re.compile(r"\\.|\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}|\{[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d+)?\}|[{},]")
LETTERS = 52


class Member(NamedTuple):
    """Where a file's bytes are in a tar, and its name without the dot between `key` and `ending`."""

    key: str
    ending: str
    offset: int
    length: int


class Tars:
    """The images of several tars, in the order of the tars and of their members. An image's name is its member's name.

    Members are one sample if their names are the same up to the first dot of the base name, wherever in the tar they
    lie; `with_dotted_names` says when a later dot counts. `image_column` is the image's file extension (jpg, or several
    as jpg;png), by default any that `decode` takes. `caption_column` is the extension of a text member or a field of
    the .json, by default the .txt, else the .caption, else the field `caption`. All tars are listed at once, and image
    bytes are read later, directly from their place in the tar. `passed_over` counts the members that are not files.
    Raises UserError for a file that is truncated, damaged or not a tar.
    """

    def __init__(self, tars: list[Path], image_column: str | None, caption_column: str | None) -> None:
        self.tars = tars
        self.image_endings = image_column.lower().split(";") if image_column else None
        self.caption_column = caption_column
        self.passed_over: Counter[str] = Counter()

    def images(self) -> list[ListedImage]:
        return [image for tar_index in range(len(self.tars)) for image in self._list(tar_index)]

    def read(self, location: tuple[int, int, int]) -> bytes:
        tar_index, offset, length = location
        with open_regular(self.tars[tar_index]) as stream:
            data = os.pread(stream.fileno(), length, offset)
        if len(data) != length:
            raise OSError(f"{self.tars[tar_index].name} is shorter than when it was listed")
        return data

    def _list(self, tar_index: int) -> Iterator[ListedImage]:
        modified = state_of(self.tars[tar_index]).modified
        members = list(_members(self.tars[tar_index], self.passed_over))
        named = {*(self.image_endings or ()), self.caption_column}
        with open(self.tars[tar_index], "rb") as stream:
            for sample in samples_of(with_dotted_names(members, named)):
                for image in self._images_of(tar_index, sample, stream.fileno()):
                    yield replace(image, modified=modified)

    def _images_of(self, tar_index: int, sample: dict[str, Member], fd: int) -> Iterator[ListedImage]:
        """The sample's image. Further ones, and a sample without one, are listed with a problem."""
        found = [member for member in sample.values() if self._is_image(member)]
        if not found:
            key, endings = next(iter(sample.values())).key, ", ".join(f".{ending}" for ending in sample)
            yield ListedImage(_as_text(key), None, None, f"the sample has no image, only {_as_text(endings)}")
            return
        image, *others = found
        name, captions, problem = _name_of(image), None, None
        try:
            captions = _captions(sample, self.caption_column, fd)
        except ValueError as error:
            problem = str(error)
        if image.length > MAX_IMAGE_BYTES:
            problem = f"the image has {image.length} bytes, more than {MAX_IMAGE_BYTES}"
        yield ListedImage(name, (tar_index, image.offset, image.length), captions, problem, image.length)
        for other in others:
            problem = f"the image of its sample is {name}. To use this one, choose its ending with --image-column"
            yield ListedImage(_name_of(other), None, None, problem)

    def _is_image(self, member: Member) -> bool:
        if self.image_endings is None:
            return is_image_name(f"_.{member.ending}")
        return member.ending in self.image_endings


def tars_named(data: str) -> list[Path]:
    """The tars that `--data` names: a single tar, a brace pattern (tars/{00000..00012}.tar), or a directory of tars.

    Raises UserError for a tar that does not exist or is no regular file.
    """
    if Path(data).is_dir():
        return files_in(Path(data), ".tar")
    return _expand(data) if data.endswith(".tar") else []


def _expand(pattern: str) -> list[Path]:
    if ":" in pattern.split("{")[0]:
        raise UserError(
            f"--data {pattern}: tars can be read from a disk, or from an address such as s3://bucket/0.tar. Download "
            "them first."
        )
    tars = [Path(name) for name in expanded(pattern, pattern)]
    for tar in tars:
        refuse_special(tar)
    missing = [tar for tar in tars if not tar.is_file()]
    if missing:
        raise UserError(
            f"--data {pattern}: {missing[0]} does not exist ({len(missing)} of {len(tars)} tars are missing). "
            "Fix the pattern or restore the tars."
        )
    return tars


def expanded(pattern: str, shown: str) -> list[str]:
    """The names that a brace pattern stands for. Raises UserError, which calls it `shown`, for too many and for what is
    no pattern."""
    if (count := count_expansions(pattern)) > MAX_TARS:
        raise UserError(f"--data {shown} stands for {count} tars, more than {MAX_TARS}. Correct the numbers in it.")
    try:
        return list(expand_urls(pattern))
    except ValueError as error:
        raise UserError(f"--data {shown} is not a pattern ({error}). Write it as tars/{{00000..00012}}.tar.") from None


def count_expansions(pattern: str) -> int:
    """At most so many names does a brace pattern stand for. To expand it, as `expand_urls` does, may take all memory.

    In a brace the alternatives add up, and what stands side by side multiplies.
    """
    sums, products = [0], [1]
    for token in BRACES.finditer(pattern):
        start, end, step = token.groups()
        if start:
            products[-1] *= abs(int(end) - int(start)) // max(1, abs(int(step or 1))) + 1
        elif token[0] == "{":
            sums.append(0)
            products.append(1)
        elif len(sums) > 1 and token[0] in ",}":
            sums[-1] += products[-1]
            products[-1] = 1
            if token[0] == "}":
                products.pop()
                products[-1] *= sums.pop()
        elif ".." in token[0]:
            products[-1] *= LETTERS
    return products[0]


class _Headers(io.BufferedReader):
    """A tar of which only headers are read. tarfile itself would believe any size and look for headers past the end."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        data = super().read(size)
        if size and not data:
            raise tarfile.ReadError("a header reaches past the end")
        return data


def _members(tar: Path, passed_over: Counter[str]) -> Iterator[Member]:
    """The regular files in a tar. Links, devices and sparse files are counted in `passed_over`."""
    if not _has_end(tar):
        raise UserError(f"{tar} is truncated or not a tar: it has no end marker. Create it again or remove it.")
    try:
        with (
            _Headers(io.FileIO(tar)) as stream,
            tarfile.open(fileobj=stream, mode="r:", encoding="utf-8") as archive,
        ):
            position, end = 0, os.fstat(stream.fileno()).st_size
            for info in archive:
                # tarfile would keep every member's header in memory.
                archive.members = []  # type: ignore[attr-defined]
                if info.size < 0 or not position < archive.offset <= end:
                    raise tarfile.ReadError(f"a member of {info.size} bytes at byte {info.offset}")
                position = archive.offset
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    passed_over["link, device or sparse file"] += 1
                elif not is_mac_metadata(info.name):
                    folder, _, base = info.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    yield Member(f"{folder}/{stem}" if folder else stem, ending.lower(), info.offset_data, info.size)
            # tarfile treats an unreadable header as the end of the archive.
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    # Hostile headers make tarfile recurse without end, or seek to places that do not exist.
    except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
        raise UserError(f"{tar} is damaged ({error}). Create it again or remove it.") from None


def _has_end(tar: Path) -> bool:
    """Whether the file ends with the end-of-archive marker. tarfile accepts a tar truncated between two members."""
    with open_regular(tar) as stream:
        size = stream.seek(0, os.SEEK_END)
        if size < len(END_OF_ARCHIVE) or size % tarfile.BLOCKSIZE:
            return False
        stream.seek(-len(END_OF_ARCHIVE), os.SEEK_END)
        return stream.read() == END_OF_ARCHIVE


def with_dotted_names(members: list[Member], named: set[str | None]) -> list[Member]:
    """The members in the same order, those with dots of their own in their names split at the last dot.

    WebDataset splits at the first: x.jpg, x.seg.png and x.txt are one sample x. But `10.15.00.png` and `10.15.00.txt`
    are a sample `10.15.00`, because an image and a text share that name, or because no name of theirs ends right after
    the first dot. `named` are endings that the user chose, which always follow the first dot.
    """
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(member.key, []).append(member)
    split = [member for group in groups.values() for member in _split_group(group, named)]
    return sorted(split, key=lambda member: member.offset)


def _split_group(group: list[Member], named: set[str | None]) -> list[Member]:
    later = [_split_at_last_dot(member) for member in group if "." in member.ending and member.ending not in named]
    if not any(_is_known(member.ending) for member in later):
        return group
    images = {member.key for member in later if is_image_name(f"_.{member.ending}")}
    own = images & {member.key for member in later if member.ending in TEXT_ENDINGS}
    if not any(member.ending in named or _is_known(member.ending) for member in group):
        own = {member.key for member in later}
    moved = {member.offset: member for member in later if member.key in own}
    return [moved.get(member.offset, member) for member in group]


def _split_at_last_dot(member: Member) -> Member:
    middle, _, ending = member.ending.rpartition(".")
    return member._replace(key=f"{member.key}.{middle}", ending=ending)


def _is_known(ending: str) -> bool:
    return "." not in ending and (ending in TEXT_ENDINGS or is_image_name(f"_.{ending}"))


def samples_of(members: Iterable[Member]) -> list[dict[str, Member]]:
    """The members of each key by their ending, in the order of the keys' first members.

    An ending that a sample has already begins another sample of that key.
    """
    samples: list[dict[str, Member]] = []
    latest: dict[str, dict[str, Member]] = {}
    for member in members:
        if member.ending in latest.get(member.key, {member.ending: member}):
            latest[member.key] = {}
            samples.append(latest[member.key])
        latest[member.key][member.ending] = member
    return samples


def _as_text(name: str) -> str:
    """A name in a tar can be any bytes, but a record's name must be text."""
    return name.encode(errors="replace").decode()


def _name_of(member: Member) -> str:
    return _as_text(f"{member.key}.{member.ending}")


def _captions(sample: dict[str, Member], column: str | None, fd: int) -> Any:
    """The captions of a sample, or None if it has none. Raises ValueError with the problem if they cannot be read."""
    for ending in ("txt", "caption") if column is None else (column,):
        if ending in sample:
            return lines_in(_text(sample[ending], fd))
    if "json" not in sample:
        return None
    text = _text(sample["json"], fd)
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise ValueError(f"the .json {error}") from None
    return field(fields, column or "caption")


def _text(member: Member, fd: int) -> str:
    if member.length > MAX_TEXT_BYTES:
        raise ValueError(f"the .{member.ending} has {member.length} bytes, too many for a caption")
    try:
        return os.pread(fd, member.length, member.offset).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the .{member.ending} is not UTF-8 (byte {error.start})") from None
