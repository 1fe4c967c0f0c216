"""Reading a finished shard set by position: one seek and one read a member, checked before use."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.codec import decode_npy, unpack_quantised
from shards.manifest import Manifest, read_manifest
from shards.schema import COLUMNS, FORMAT_VERSION, ShardError, sidecar_name


@dataclass(frozen=True)
class Sidecar:
    """The index of one finished shard. `table` (entries, members, 4) int64 has schema.COLUMNS."""

    shard: str
    bytes: int
    sha256: str
    skipped: list[dict[str, str]]
    keys: list[str]
    members: list[str]
    table: np.ndarray

    @property
    def count(self) -> int:
        return len(self.keys)

    def locate(self, place: int) -> dict[str, list[int]]:
        """The members of one entry: {name: [offset, length, raw_bytes, crc32]}."""
        return dict(zip(self.members, self.table[place].tolist(), strict=True))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in the shard. An exact one has `values` alone; a quantised one its mu too."""

    values: np.ndarray
    mu: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """One entry: its key, its .json member, and the tensors asked for, by name without file ending."""

    key: str
    meta: dict[str, Any]
    tensors: dict[str, StoredTensor]


class ShardSet:
    """The entries of a finished directory, numbered from 0 in the order of the plan.

    Opening one reads the manifest and every sidecar once for its count; memory stays flat after that.
    Raises ShardError for a set that is unfinished, mixed from several specs, or cut short.
    """

    def __init__(self, directory: Path, stage: str) -> None:
        self.directory = Path(directory)
        self.manifest: Manifest = read_manifest(self.directory, stage)
        self.shards = self.manifest.shard_names()
        missing = [s for s in self.shards if not (self.directory / sidecar_name(s)).is_file()]
        if missing:
            command = {"latents": "encode", "cache": "teacher-cache"}[stage]
            raise ShardError(
                f"{self.directory} is unfinished: {len(missing)} of {len(self.shards)} shards are missing, "
                f"the first {missing[0]}; run the same `distill-sd {command}` again to complete it"
            )
        self.counts = [self._check(shard) for shard in self.shards]
        self._ends = list(itertools.accumulate(self.counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _check(self, shard: str) -> int:
        """The count of a shard whose sidecar and size are right."""
        sidecar = read_sidecar(self.directory, shard, self.manifest.spec_sha256)
        path = self.directory / shard
        size = path.stat().st_size if path.is_file() else None
        if size != sidecar.bytes:
            raise _damaged(path, "it is missing" if size is None else f"it has {size} bytes, not {sidecar.bytes}")
        return sidecar.count

    def locate(self, index: int) -> tuple[str, int]:
        """The shard that holds entry `index`, and the entry's place in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return self.shards[shard], index - (self._ends[shard] - self.counts[shard])

    def read(self, index: int, tensors: Iterable[str]) -> Sample:
        """Entry `index` with the tensors named; ShardError if one is not there or is damaged."""
        shard, place = self.locate(index)
        sidecar = _cached_sidecar(self.directory, shard, self.manifest.spec_sha256)
        key, members = sidecar.keys[place], sidecar.locate(place)
        path = self.directory / shard
        with open(path, "rb", buffering=0) as stream:
            descriptor = stream.fileno()
            meta = json.loads(_read_member(path, descriptor, key, "json", members))
            found = {name: _read_tensor(path, descriptor, key, name, members) for name in tensors}
        return Sample(key, meta, found)


@functools.lru_cache(maxsize=256)
def _cached_sidecar(directory: Path, shard: str, spec_sha256: str) -> Sidecar:
    return read_sidecar(directory, shard, spec_sha256)


def read_sidecar(directory: Path, shard: str, spec_sha256: str) -> Sidecar:
    """The sidecar of `shard`; ShardError when it is damaged or belongs to another spec."""
    path = directory / sidecar_name(shard)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT_VERSION or content["spec_sha256"] != spec_sha256:
            raise ShardError(
                f"{path} belongs to another shard set than {directory}/manifest.json: "
                "delete it and its tar, and run the stage again"
            )
        keys, members = list(content["keys"]), list(content["members"])
        table = np.array(content["table"], np.int64).reshape(len(keys), len(members), len(COLUMNS))
        sidecar = Sidecar(shard, content["bytes"], content["sha256"], content["skipped"], keys, members, table)
        if content["shard"] != shard or content["count"] != len(keys):
            raise ValueError("it does not describe that shard")
        if (table < 0).any() or (table[..., 0] + table[..., 1] > sidecar.bytes).any():
            raise ValueError("it places members outside the shard")
        return sidecar
    except ShardError:
        raise
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise _damaged(path, f"{error!r}") from None


def _read_tensor(path: Path, descriptor: int, key: str, tensor: str, members: dict[str, list[int]]) -> StoredTensor:
    plain, compressed = f"{tensor}.npy", f"{tensor}.npy.zst"
    try:
        if compressed in members:
            data = _read_member(path, descriptor, key, compressed, members)
            return StoredTensor(*unpack_quantised(data, members[compressed][2]))
        return StoredTensor(decode_npy(_read_member(path, descriptor, key, plain, members)))
    except ShardError as error:
        raise ShardError(f"{path}, entry {key}, {tensor}: {error}") from None


def _read_member(path: Path, descriptor: int, key: str, name: str, members: dict[str, list[int]]) -> bytes:
    if name not in members:
        raise ShardError(f"{path} holds no {name} for entry {key}; it has {', '.join(sorted(members))}")
    offset, length, _, crc32 = members[name]
    data = os.pread(descriptor, length, offset)
    if len(data) != length or zlib.crc32(data) != crc32:
        raise _damaged(path, f"member {key}.{name} does not have its checksum")
    return data


def _damaged(path: Path, what: str) -> ShardError:
    return ShardError(
        f"{path} is damaged: {what}. Delete it and its sidecar, and run the stage again: only this shard is rewritten"
    )
