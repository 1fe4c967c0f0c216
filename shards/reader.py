"""Reading a finished shard set by position: one seek and one read a member, checked before use."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.codec import decode_npy, unpack_quantised
from shards.expected import Expected, check_key, expected_tensors
from shards.manifest import STAGE_COMMANDS, Manifest, read_manifest
from shards.schema import BLOCK, COLUMNS, FORMAT_VERSION, ShardError, round_of, sidecar_name

# A tar's header begins with the member's name.
NAME_BYTES = 100


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
class StoredEntry:
    """One entry: its key, its .json member, and the tensors asked for, by name without file ending."""

    key: str
    meta: dict[str, Any]
    tensors: dict[str, StoredTensor]


class ForeignShardError(ShardError):
    """A shard whose sidecar was written for another spec than the manifest's."""


class ShardSet:
    """The entries of a finished directory, numbered from 0 in the order of the plan.

    With `rounds` N, those of a cache's first N rounds alone, whether or not later ones are finished.
    Opening one reads the manifest and every sidecar once for its count; memory stays flat after that.
    Raises ShardError for a set that is unfinished, mixed from several specs, or cut short.
    """

    def __init__(self, directory: Path, stage: str, rounds: int | None = None) -> None:
        self.directory = Path(directory)
        manifest = read_manifest(self.directory, stage)
        if rounds is not None and rounds > manifest.rounds:
            raise ShardError(
                f"{self.directory} has {manifest.rounds} rounds, not {rounds}: run `teacher-cache --rounds {rounds}`, "
                "with the other settings as they were, to add them"
            )
        self.manifest: Manifest = manifest if rounds is None else replace(manifest, rounds=rounds)
        self.shards = self.manifest.shard_names()
        missing = [s for s in self.shards if not (self.directory / sidecar_name(s)).is_file()]
        if missing:
            finished = round_of(missing[0])
            raise ShardError(
                f"{self.directory} is unfinished: {len(missing)} of {len(self.shards)} shards are missing, "
                f"the first {missing[0]}; run the same `distill-sd {STAGE_COMMANDS[stage]}` again to complete it"
                + (f", or `distill-sd distill --rounds {finished}` to train on what is finished" if finished else "")
            )
        self.expected = expected_tensors(self.manifest.spec)
        self.counts = [sound_sidecar(self.directory, shard, self.manifest.spec_sha256).count for shard in self.shards]
        self._ends = list(itertools.accumulate(self.counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[str, int]:
        """The shard that holds entry `index`, and the entry's place in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return self.shards[shard], index - (self._ends[shard] - self.counts[shard])

    def read(self, index: int, tensors: Iterable[str]) -> StoredEntry:
        """Entry `index` with the tensors named; ShardError if one is not there, is damaged or not as the spec says."""
        shard, place = self.locate(index)
        sidecar = _cached_sidecar(self.directory, shard, self.manifest.spec_sha256)
        return read_entry(self.directory, sidecar, place, tensors, self.expected)


def read_entry(
    directory: Path, sidecar: Sidecar, place: int, tensors: Iterable[str], expected: dict[str, Expected]
) -> StoredEntry:
    """One entry of a shard with the tensors named, each held against what is `expected` of it; else ShardError."""
    key, members = sidecar.keys[place], sidecar.locate(place)
    path = directory / sidecar.shard
    with open(path, "rb", buffering=0) as stream:
        descriptor = stream.fileno()
        meta = _read_meta(path, descriptor, key, members)
        found = {name: _read_tensor(path, descriptor, key, name, members, expected.get(name)) for name in tensors}
    return StoredEntry(key, meta, found)


@functools.lru_cache(maxsize=256)
def _cached_sidecar(directory: Path, shard: str, spec_sha256: str) -> Sidecar:
    return read_sidecar(directory, shard, spec_sha256)


def sound_sidecar(directory: Path, shard: str, spec_sha256: str) -> Sidecar:
    """The sidecar of a shard whose tar is there with the size that it states; else ShardError."""
    sidecar = read_sidecar(directory, shard, spec_sha256)
    path = directory / shard
    size = path.stat().st_size if path.is_file() else None
    if size != sidecar.bytes:
        raise damaged(path, "it is missing" if size is None else f"it has {size} bytes, not {sidecar.bytes}")
    return sidecar


def read_sidecar(directory: Path, shard: str, spec_sha256: str) -> Sidecar:
    """The sidecar of `shard`; ShardError when it is damaged or belongs to another spec."""
    path = directory / sidecar_name(shard)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT_VERSION or content["spec_sha256"] != spec_sha256:
            raise ForeignShardError(
                f"{path} belongs to another shard set than {directory}/manifest.json: "
                "delete it and its tar, and run the stage again"
            )
        keys, members = list(content["keys"]), list(content["members"])
        table = np.array(content["table"], np.int64).reshape(len(keys), len(members), len(COLUMNS))
        sidecar = Sidecar(shard, content["bytes"], content["sha256"], content["skipped"], keys, members, table)
        if content["shard"] != shard or content["count"] != len(keys):
            raise ValueError("it does not describe that shard")
        for key in keys:
            check_key(key, round_of(shard))
        outside = (table[..., 0] < BLOCK) | (table[..., 0] + table[..., 1] > sidecar.bytes)
        if (table < 0).any() or outside.any():
            raise ValueError("it places members outside the shard")
        return sidecar
    except ForeignShardError:
        raise
    except ShardError as error:
        raise damaged(path, str(error)) from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise damaged(path, f"{error!r}") from None


def _read_meta(path: Path, descriptor: int, key: str, members: dict[str, list[int]]) -> dict[str, Any]:
    data = _read_member(path, descriptor, key, "json", members)
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"member {key}.json is no JSON ({error})") from None


def _read_tensor(
    path: Path, descriptor: int, key: str, tensor: str, members: dict[str, list[int]], expected: Expected | None
) -> StoredTensor:
    plain, compressed = f"{tensor}.npy", f"{tensor}.npy.zst"
    name = compressed if compressed in members else plain
    data = _read_member(path, descriptor, key, name, members)
    try:
        if expected and tensor + expected.ending != name:
            raise ShardError(f"the spec has it as {expected.ending}")
        if name == compressed:
            if expected:
                expected.check_size(members[name][2])
            stored = StoredTensor(*unpack_quantised(data, members[name][2]))
        else:
            stored = StoredTensor(decode_npy(data))
        if expected:
            expected.check_values(stored.values)
        return stored
    except ShardError as error:
        raise damaged(path, f"member {key}.{name}: {error}") from None


def _read_member(path: Path, descriptor: int, key: str, name: str, members: dict[str, list[int]]) -> memoryview:
    """The bytes of a member whose checksum is right, and whose name in the tar is the one that was asked for."""
    if name not in members:
        raise ShardError(f"{path} holds no {name} for entry {key}; it has {', '.join(sorted(members))}")
    offset, length, _, crc32 = members[name]
    block = memoryview(os.pread(descriptor, BLOCK + length, offset - BLOCK))
    header, data = block[:BLOCK], block[BLOCK:]
    if bytes(header[:NAME_BYTES]).rstrip(b"\0") != f"{key}.{name}".encode():
        raise damaged(path, f"member {key}.{name} is not where its sidecar says")
    if len(data) != length or zlib.crc32(data) != crc32:
        raise damaged(path, f"member {key}.{name} does not have its checksum")
    return data


def damaged(path: Path, what: str) -> ShardError:
    """The error that names a shard's file, what is wrong with it, and the remedy."""
    return ShardError(
        f"{path} is damaged: {what}. Delete it and its sidecar, and run the stage again: only this shard is rewritten"
    )
