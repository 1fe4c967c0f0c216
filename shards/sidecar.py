"""The sidecar of a shard: what its tar holds and where. It is written last, so it marks the shard as finished.

Format 2, `s00000.index`: a line of JSON, the head, then the table, one row of little-endian int64 per entry:

    image, image_crc32, then of each member its offset, length, raw_bytes and crc32

so that one row can be read without the others. Format 1, `s00000.json`: one JSON object, which is read whole.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shards.expected import check_key
from shards.manifest import Manifest
from shards.regular import NotRegularError
from shards.schema import (
    BLOCK,
    CALIBRATION,
    COLUMNS,
    MANIFEST,
    ShardError,
    entry_key,
    image_key,
    image_of,
    json_bytes,
    round_of,
)
from shards.store import Store

# The head is filled up to a multiple of this, so that the table is aligned.
ALIGNMENT = 64
# Read at first; the heads of shards without skipped images are shorter.
HEAD_BYTES = 2048
MAX_HEAD_BYTES = 1 << 26
NUMBERS = 2
ITEM = np.dtype("<i8")
SIXTY_FOUR_BITS = 1 << 63
OUTSIDE = "it places members outside the shard"


class ForeignShardError(ShardError):
    """The sidecar of a shard was written for another spec than the manifest's."""


class OtherCalibrationError(ForeignShardError):
    """A shard was written with other calibrations than the manifest's. With its own it is sound."""


@dataclass(frozen=True)
class Row:
    """One entry: its key, the `image_crc32` (see `crc32_of_tensors`), and {name: [offset, length, raw_bytes, crc32]} of
    its members."""

    key: str
    image_crc32: int
    members: dict[str, list[int]]

    @property
    def end(self) -> int:
        """Where its padded data ends in the tar."""
        return max(offset + -(-length // BLOCK) * BLOCK for offset, length, _, _ in self.members.values())


@dataclass(frozen=True, slots=True)
class Head:
    """What a sidecar says of the whole shard. `images` are the places in the input of its first and last image, and
    `start` is where the table begins in the file."""

    shard: str
    count: int
    bytes: int
    sha256: str
    skipped: list[dict[str, str]]
    members: list[str]
    images: tuple[int, int] | None
    table_crc32: int = 0
    start: int = 0

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.members)


@dataclass(frozen=True)
class Sidecar:
    """A whole sidecar. `table` is (entries, 2 + 4 x members) int64."""

    head: Head
    table: np.ndarray = field(repr=False)

    @property
    def shard(self) -> str:
        return self.head.shard

    @property
    def count(self) -> int:
        return self.head.count

    @property
    def images(self) -> np.ndarray:
        """(entries,): the place in the input of each entry's image."""
        return self.table[:, 0]

    @property
    def image_crc32(self) -> np.ndarray:
        """(entries,): see `crc32_of_tensors`."""
        return self.table[:, 1]

    @property
    def places(self) -> np.ndarray:
        """(entries, members, 4): the columns of schema.COLUMNS."""
        return self.table[:, NUMBERS:].reshape(self.count, len(self.head.members), len(COLUMNS))

    @property
    def keys(self) -> list[str]:
        return [key_of(self.shard, image) for image in self.images.tolist()]

    def row(self, place: int) -> Row:
        return row_of(self.shard, self.head.members, self.table[place].tolist())

    def crc32_of_tensors(self) -> np.ndarray:
        """(entries,): `crc32_of_tensors` of each entry's members."""
        tensors = [number for number, name in enumerate(self.head.members) if name != "json"]
        crcs = self.places[:, tensors, COLUMNS.index("crc32")].astype("<u4")
        return np.array([zlib.crc32(row.tobytes()) for row in crcs], np.int64)


def row_bytes(members: list[str]) -> int:
    return ITEM.itemsize * (NUMBERS + len(COLUMNS) * len(members))


def row_of(shard: str, members: list[str], numbers: Sequence[int]) -> Row:
    image, crc32, *places = numbers
    located = [places[i : i + len(COLUMNS)] for i in range(0, len(places), len(COLUMNS))]
    return Row(key_of(shard, image), crc32, dict(zip(members, located, strict=True)))


def key_of(shard: str, image: int) -> str:
    """The key of an image's entry in a shard."""
    number = round_of(shard)
    return image_key(image) if number is None else entry_key(image_key(image), number)


def crc32_of_tensors(members: dict[str, list[int]]) -> int:
    """One number for an image's tensors: the crc32 of the crc32s of their members, four bytes each, by name.

    The entries of a cache state that of the image that they were made from.
    """
    crcs = b"".join(members[name][3].to_bytes(4, "little") for name in sorted(members) if name != "json")
    return zlib.crc32(crcs)


def make_sidecar(
    manifest: Manifest, shard: str, rows: list[Row], length: int, sha256: str, skipped: list[dict[str, str]]
) -> bytes:
    """The bytes of the sidecar of a tar of `length` bytes, in the manifest's format."""
    members = sorted(rows[0].members) if rows else []
    images = (image_of(rows[0].key), image_of(rows[-1].key)) if rows else None
    head = Head(shard, len(rows), length, sha256, skipped, members, images)
    if manifest.version == 1:
        places = [[row.members[name] for name in members] for row in rows]
        more = {"columns": COLUMNS, "members": members, "keys": [row.key for row in rows], "table": places}
        return json_bytes({**_stated(head, manifest), **more}, indent=None)
    numbers = [
        [image_of(row.key), row.image_crc32, *(n for name in members for n in row.members[name])] for row in rows
    ]
    return sidecar_bytes(manifest, head, np.array(numbers, ITEM).tobytes())


def sidecar_bytes(manifest: Manifest, head: Head, table: bytes) -> bytes:
    """A sidecar of format 2."""
    own: dict[str, Any] = {"members": head.members, "images": head.images, "table_crc32": zlib.crc32(table)}
    if manifest.calibration_sha256:
        own["calibration_sha256"] = manifest.calibration_sha256
    line = json_bytes({**_stated(head, manifest), **own}, indent=None).rstrip()
    filled = -(-(len(line) + 1) // ALIGNMENT) * ALIGNMENT
    return line.ljust(filled - 1) + b"\n" + table


def _stated(head: Head, manifest: Manifest) -> dict[str, Any]:
    """The fields that the sidecars of both formats begin with."""
    return {
        "format": manifest.version,
        "spec_sha256": manifest.spec_sha256,
        "shard": head.shard,
        "count": head.count,
        "bytes": head.bytes,
        "sha256": head.sha256,
        "skipped": head.skipped,
    }


def read_head(store: Store, shard: str, manifest: Manifest) -> Head:
    """What the sidecar of `shard` says of the whole shard; its table is not read. Raises as `read_sidecar` does."""
    if manifest.version == 1:
        return read_sidecar(store, shard, manifest).head
    with _naming(store, shard, manifest) as path:
        name, length = manifest.sidecar_name(shard), HEAD_BYTES
        while True:
            (data,) = store.read_ranges(name, [(0, length)])
            if b"\n" in data or len(data) < length or length > MAX_HEAD_BYTES:
                return _head(path, data, shard, manifest)
            length *= 8


def read_row(store: Store, head: Head, place: int, manifest: Manifest) -> Row:
    """Row `place` of a sidecar. Whether it tells the truth shows when the members are read. Of format 1 everything has
    to be read."""
    if manifest.version == 1:
        return read_sidecar(store, head.shard, manifest).row(place)
    with _naming(store, head.shard, manifest):
        start = head.start + place * head.row_bytes
        (data,) = store.read_ranges(manifest.sidecar_name(head.shard), [(start, head.row_bytes)])
        if len(data) != head.row_bytes:
            raise ValueError("its table is cut off")
        row = row_of(head.shard, head.members, struct.unpack(f"<{len(data) // ITEM.itemsize}q", data))
        for offset, length, raw_bytes, crc32 in row.members.values():
            if offset < BLOCK or length < 0 or offset + length > head.bytes or min(raw_bytes, crc32) < 0:
                raise ValueError(OUTSIDE)
        return row


def read_sidecar(store: Store, shard: str, manifest: Manifest) -> Sidecar:
    """The sidecar of `shard`. Raises ShardError if it is damaged or of another spec, OSError if it cannot be read."""
    with _naming(store, shard, manifest) as path:
        data = store.read(manifest.sidecar_name(shard))
        parsed = _parsed_json if manifest.version == 1 else _parsed
        sidecar = parsed(path, data, shard, manifest)
        _check_table(sidecar.table, sidecar.head.bytes)
        return sidecar


def _head(path: str, data: bytes, shard: str, manifest: Manifest) -> Head:
    line, newline, _ = data.partition(b"\n")
    if not newline:
        raise ValueError("its first line does not end")
    content = json.loads(line.decode("utf-8"))
    _check_spec(path, content, shard, manifest)
    images = content["images"] if content["images"] is None else tuple(map(_count, content["images"]))
    if (images is None) != (content["count"] == 0) or (images is not None and len(images) != 2):
        raise ValueError(f"it states the images {images!r:.40} of {content['count']!r:.40} entries")
    return Head(
        shard,
        _count(content["count"]),
        _count(content["bytes"]),
        str(content["sha256"]),
        _skipped(content["skipped"]),
        [str(name) for name in content["members"]],
        images,
        _count(content["table_crc32"]),
        len(line) + 1,
    )


def _parsed(path: str, data: bytes, shard: str, manifest: Manifest) -> Sidecar:
    head = _head(path, data, shard, manifest)
    body = memoryview(data)[head.start :]
    if len(body) != head.count * head.row_bytes:
        raise ValueError(f"its table has {len(body)} bytes, not {head.count * head.row_bytes}")
    if zlib.crc32(body) != head.table_crc32:
        raise ValueError("its table does not have its checksum")
    table = np.frombuffer(body, ITEM).reshape(head.count, head.row_bytes // ITEM.itemsize)
    ends = (int(table[0, 0]), int(table[-1, 0])) if head.count else None
    if head.images != ends:
        raise ValueError(f"its head states the images {head.images}, but its table has {ends}")
    return Sidecar(head, table)


def _parsed_json(path: str, data: bytes, shard: str, manifest: Manifest) -> Sidecar:
    content = json.loads(data.decode("utf-8"))
    _check_spec(path, content, shard, manifest)
    keys, members = list(content["keys"]), list(content["members"])
    for key in keys:
        check_key(key, round_of(shard))
    if content["count"] != len(keys):
        raise ValueError("it describes another shard")
    places = np.array(content["table"], np.int64).reshape(len(keys), len(members), len(COLUMNS))
    table = np.zeros((len(keys), NUMBERS + len(COLUMNS) * len(members)), np.int64)
    table[:, 0] = [image_of(key) for key in keys]
    table[:, NUMBERS:] = places.reshape(len(keys), -1)
    ends = (image_of(keys[0]), image_of(keys[-1])) if keys else None
    head = Head(
        shard, len(keys), _count(content["bytes"]), content["sha256"], _skipped(content["skipped"]), members, ends
    )
    sidecar = Sidecar(head, table)
    if not manifest.is_cache:
        table[:, 1] = sidecar.crc32_of_tensors()
    return sidecar


def _skipped(items: Any) -> list[dict[str, str]]:
    for item in items:
        if not isinstance(item, dict) or not all(isinstance(item.get(name), str) for name in ("source_id", "reason")):
            raise ValueError(f"it states the skipped image {item!r:.80}, not its source_id and the reason")
    return list(items)


def _check_spec(path: str, content: dict[str, Any], shard: str, manifest: Manifest) -> None:
    if content["format"] != manifest.version or content["spec_sha256"] != manifest.spec_sha256:
        raise ForeignShardError(f"{path} belongs to another shard set than its {MANIFEST}. {manifest.rewrite}")
    if content["shard"] != shard:
        raise ValueError("it describes another shard")
    if content.get("calibration_sha256") != manifest.calibration_sha256:
        raise OtherCalibrationError(
            f"{path} was written with another {CALIBRATION} than its {MANIFEST} states, so its taps would be decoded "
            "wrong. Restore both files, which belong together, from a backup."
        )


def _check_table(table: np.ndarray, length: int) -> None:
    """Raise ValueError unless the rows place all members in a tar of that length."""
    offsets, lengths = table[:, NUMBERS :: len(COLUMNS)], table[:, NUMBERS + 1 :: len(COLUMNS)]
    if (table < 0).any() or (offsets < BLOCK).any() or (lengths > length).any() or (offsets > length - lengths).any():
        raise ValueError(OUTSIDE)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < SIXTY_FOUR_BITS:
        raise ValueError(f"it states {value!r:.40} where a number belongs")
    return value


def damaged(path: str, what: str, manifest: Manifest) -> ShardError:
    """The error for a damaged file of a shard: its name, what is wrong with it, and the remedy."""
    return ShardError(f"{path} is damaged: {what}. {manifest.rewrite}")


@contextmanager
def _naming(store: Store, shard: str, manifest: Manifest) -> Iterator[str]:
    """The path of a sidecar; what is wrong with the file becomes a ShardError that names it."""
    path = f"{store}/{manifest.sidecar_name(shard)}"
    try:
        yield path
    except ForeignShardError:
        raise
    except FileNotFoundError:
        raise damaged(path, "it is missing", manifest) from None
    except IsADirectoryError:
        raise damaged(path, "it is a directory", manifest) from None
    except NotRegularError:
        raise damaged(path, "it is not a regular file", manifest) from None
    except ShardError as error:
        raise damaged(path, str(error), manifest) from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise damaged(path, f"{error!r}", manifest) from None
