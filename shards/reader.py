"""Reading a finished shard set by position: one range per member, checked before use."""

from __future__ import annotations

import bisect
import itertools
import json
import zlib
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shards.codec import decode_npy, unpack_quantised
from shards.expected import Expected, check_key, expected_tensors
from shards.manifest import STAGE_COMMANDS, Manifest, read_manifest
from shards.plan import PlannedShard
from shards.regular import NotRegularError
from shards.schema import BLOCK, COLUMNS, FORMAT_VERSION, MANIFEST, ShardError, image_of, round_of, sidecar_name
from shards.store import Store

# The header of a tar member begins with its name.
NAME_BYTES = 100
# Parsed sidecars that a ShardSet keeps. Those of 1,000 entries take 100 (latents) to 500 kB (a cache).
CACHED_SIDECARS = 256
REWRITE = "Delete this shard's .tar and .json and rerun the stage, which rewrites only them."


@dataclass(frozen=True)
class Sidecar:
    """The index of one finished shard. `table` (entries, members, 4) int64 has the columns of schema.COLUMNS."""

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

    @property
    def images(self) -> np.ndarray:
        """The place in the input of each entry's image."""
        return np.array([image_of(key) for key in self.keys], dtype=np.int64)

    def checksums(self, tensor: str) -> np.ndarray:
        """The crc32 of a tensor's stored bytes in each entry."""
        name = _member_name(tensor, self.members)
        if not self.keys:
            return np.empty(0, np.int64)
        if name not in self.members:
            raise ShardError(f"the sidecar of {self.shard} lists no {name}. {REWRITE}")
        return self.table[:, self.members.index(name), COLUMNS.index("crc32")]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored. An exact one has only `values`; a quantised one has `mu` as well."""

    values: np.ndarray
    mu: np.ndarray | None = None


@dataclass(frozen=True)
class StoredEntry:
    """One entry: its key, its .json member, and the requested tensors, by name without file ending."""

    key: str
    meta: dict[str, Any]
    tensors: dict[str, StoredTensor]


class ForeignShardError(ShardError):
    """The sidecar of a shard was written for another spec than the manifest's."""


class ShardSet:
    """The entries of a finished set, numbered from 0 in the order of the plan.

    With `rounds` N, only the entries of a cache's first N rounds, whether or not later rounds are finished. Opening a
    set reads the manifest and the count of every sidecar once; after that memory stays flat.
    Raises ShardError for a set that is unfinished, mixed from several specs, or truncated.
    """

    def __init__(self, store: Store, stage: str, rounds: int | None = None) -> None:
        self.store = store
        manifest = read_manifest(store, stage)
        if rounds is not None and rounds > (manifest.rounds or 0):
            raise ShardError(
                f"{store} has {manifest.rounds} round{'s' * (manifest.rounds != 1)}, not {rounds}. To add rounds, run "
                f"`teacher-cache --rounds {rounds}` with the other settings unchanged."
            )
        self.manifest: Manifest = manifest if rounds is None else replace(manifest, rounds=rounds)
        missing = self.manifest.plan.unfinished(store)
        if missing:
            finished = missing[0].round
            raise ShardError(
                f"{store} is unfinished. Missing shards: {len(missing)} of {len(self.manifest.plan)}, from "
                f"{missing[0].name} on. Rerun the same `distill-sd {STAGE_COMMANDS[stage]}` to complete it"
                + (f", or train on the finished rounds with `distill --rounds {finished}`." if finished else ".")
            )
        self.expected = expected_tensors(self.manifest.spec)
        self.shards = self.manifest.plan.names()
        self.counts, last = [], None
        for shard in self.manifest.plan:
            sidecar = placed_sidecar(store, shard, self.manifest)
            check_order(store, last, sidecar)
            self.counts.append(sidecar.count)
            last = sidecar if sidecar.keys else last
        self._ends = list(itertools.accumulate(self.counts))
        self._sidecars: OrderedDict[str, Sidecar] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[str, int]:
        """The shard that holds entry `index`, and the entry's place in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return self.shards[shard], index - (self._ends[shard] - self.counts[shard])

    def read(self, index: int, tensors: Iterable[str]) -> StoredEntry:
        """Entry `index` with the named tensors. Raises ShardError for one that is missing, damaged or not as the spec
        says."""
        shard, place = self.locate(index)
        return read_entry(self.store, self._sidecar(shard), place, tensors, self.expected)

    def checksums(self, tensor: str) -> tuple[np.ndarray, np.ndarray]:
        """(place in the input of its image, crc32 of a stored tensor) of every entry, from the sidecars alone."""
        images, checksums = [], []
        for shard in self.shards:
            sidecar = self._sidecar(shard)
            images.append(sidecar.images)
            checksums.append(sidecar.checksums(tensor))
        return np.concatenate(images), np.concatenate(checksums)

    def _sidecar(self, shard: str) -> Sidecar:
        """The sidecar of a shard; the most recently used ones are kept."""
        if shard not in self._sidecars:
            if len(self._sidecars) >= CACHED_SIDECARS:
                self._sidecars.popitem(last=False)
            self._sidecars[shard] = read_sidecar(self.store, shard, self.manifest.spec_sha256)
        self._sidecars.move_to_end(shard)
        return self._sidecars[shard]


def read_entry(
    store: Store, sidecar: Sidecar, place: int, tensors: Iterable[str], expected: dict[str, Expected]
) -> StoredEntry:
    """One entry of a shard with the named tensors, each checked against what is `expected`; else ShardError."""
    key, members, path = sidecar.keys[place], sidecar.locate(place), f"{store}/{sidecar.shard}"
    names = {tensor: _member_name(tensor, members) for tensor in tensors}
    for name in names.values():
        if name not in members:
            raise ShardError(f"{path} holds no {name} for entry {key}; it has {', '.join(sorted(members))}")
    wanted = ["json", *names.values()]
    # A member is read together with its header, which is the block before it.
    ranges = [(members[name][0] - BLOCK, BLOCK + members[name][1]) for name in wanted]
    try:
        blocks = store.read_ranges(sidecar.shard, ranges)
    except FileNotFoundError:
        raise damaged(path, "it is missing") from None
    data = {
        name: _member_bytes(path, key, name, members[name], block) for name, block in zip(wanted, blocks, strict=True)
    }
    meta = _parse_meta(path, key, data["json"])
    found = {
        tensor: _parse_tensor(path, key, name, members[name][2], data[name], expected.get(tensor))
        for tensor, name in names.items()
    }
    return StoredEntry(key, meta, found)


def sound_sidecar(store: Store, shard: str, spec_sha256: str) -> Sidecar:
    """The sidecar of a shard whose tar exists and has the size that the sidecar states; else ShardError."""
    sidecar = read_sidecar(store, shard, spec_sha256)
    size = store.size(shard)
    if size != sidecar.bytes:
        what = "it is missing" if size is None else f"it has {size} bytes, not {sidecar.bytes}"
        raise damaged(f"{store}/{shard}", what)
    return sidecar


def placed_sidecar(store: Store, shard: PlannedShard, manifest: Manifest) -> Sidecar:
    """The sound sidecar of a shard whose number of entries and whose keys are those of its place in the plan; else
    ShardError. Of the keys, the first and the last are looked at: they rise in between."""
    sidecar = sound_sidecar(store, shard.name, manifest.spec_sha256)
    entries, indices = sidecar.count + len(sidecar.skipped), shard.indices
    path = f"{store}/{sidecar_name(shard.name)}"
    if entries != len(indices):
        raise damaged(path, f"it lists {entries} entries, not the {len(indices)} of its place")
    # The entries of a cache are numbered without the images that `encode` skipped, and their keys are the images' own.
    images = manifest.spec.get("latents", manifest.spec).get("entries", manifest.spec["entries"])
    later = images - manifest.spec["entries"]
    for key in sidecar.keys[:1] + sidecar.keys[-1:]:
        if not indices.start <= image_of(key) < indices.stop + later:
            raise damaged(path, f"it lists the entry {key}, which has another place")
    return sidecar


def check_order(store: Store, before: Sidecar | None, after: Sidecar) -> None:
    """Raise ShardError if a shard begins with an entry that the one before it, in its round, has reached already."""
    if before is None or not after.keys or round_of(before.shard) != round_of(after.shard):
        return
    if image_of(after.keys[0]) <= image_of(before.keys[-1]):
        raise ShardError(
            f"{store}/{before.shard} and {store}/{after.shard} hold the same entries, so one of them is not in its "
            "place. Delete the .tar and .json of both and rerun the stage, which rewrites only them."
        )


def read_sidecar(store: Store, shard: str, spec_sha256: str) -> Sidecar:
    """The sidecar of `shard`. Raises ShardError if it is damaged or of another spec, OSError if it cannot be read."""
    path = f"{store}/{sidecar_name(shard)}"
    try:
        content = json.loads(store.read(sidecar_name(shard)).decode("utf-8"))
        if content["format"] != FORMAT_VERSION or content["spec_sha256"] != spec_sha256:
            raise ForeignShardError(f"{path} belongs to another shard set than {store}/{MANIFEST}. " + REWRITE)
        keys, members = list(content["keys"]), list(content["members"])
        table = np.array(content["table"], np.int64).reshape(len(keys), len(members), len(COLUMNS))
        sidecar = Sidecar(shard, content["bytes"], content["sha256"], list(content["skipped"]), keys, members, table)
        if content["shard"] != shard or content["count"] != len(keys):
            raise ValueError("it describes another shard")
        if type(sidecar.bytes) is not int:
            raise ValueError(f"it states {sidecar.bytes!r} bytes")
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
    except (FileNotFoundError, IsADirectoryError) as error:
        raise damaged(path, "it is missing" if isinstance(error, FileNotFoundError) else "it is a directory") from None
    except NotRegularError:
        raise damaged(path, "it is not a regular file") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise damaged(path, f"{error!r}") from None


def _member_name(tensor: str, members: Collection[str]) -> str:
    compressed = f"{tensor}.npy.zst"
    return compressed if compressed in members else f"{tensor}.npy"


def _member_bytes(path: str, key: str, name: str, row: list[int], block: bytes) -> memoryview:
    """The bytes of a member, without its header, once its name in the tar and its checksum are right."""
    _, length, _, crc32 = row
    header, data = memoryview(block)[:BLOCK], memoryview(block)[BLOCK:]
    if bytes(header[:NAME_BYTES]).rstrip(b"\0") != f"{key}.{name}".encode():
        raise damaged(path, f"member {key}.{name} is not where its sidecar says")
    if len(data) != length or zlib.crc32(data) != crc32:
        raise damaged(path, f"member {key}.{name} does not have its checksum")
    return data


def _parse_meta(path: str, key: str, data: memoryview) -> dict[str, Any]:
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"member {key}.json is not JSON ({error})") from None


def _parse_tensor(
    path: str, key: str, name: str, raw_bytes: int, data: memoryview, expected: Expected | None
) -> StoredTensor:
    compressed = name.endswith(".zst")
    try:
        if expected and not name.endswith(expected.ending):
            raise ShardError(f"by the spec it ends in {expected.ending}")
        if compressed:
            if expected:
                expected.check_size(raw_bytes)
            stored = StoredTensor(*unpack_quantised(data, raw_bytes))
        else:
            stored = StoredTensor(decode_npy(data))
        if expected:
            expected.check_values(stored.values)
        return stored
    except ShardError as error:
        raise damaged(path, f"member {key}.{name}: {error}") from None


def damaged(path: str, what: str) -> ShardError:
    """The error for a damaged file of a shard: its name, what is wrong with it, and the remedy."""
    return ShardError(f"{path} is damaged: {what}. {REWRITE}")
