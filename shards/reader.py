"""Reading a finished shard set by position: one range of a tar per entry, checked before use."""

from __future__ import annotations

import bisect
import itertools
import json
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shards.buckets import counts
from shards.codec import decode_npy, unpack_quantised
from shards.expected import Expected, expected_tensors
from shards.manifest import Manifest, read_manifest, sha256_of_json
from shards.packing import unpack
from shards.plan import EVERYTHING, PlannedShard
from shards.schema import BLOCK, ShardError, image_of, round_of
from shards.sidecar import Head, Row, Sidecar, damaged, read_head, read_row, read_sidecar
from shards.store import Store, at_once

# The header of a tar member begins with its name.
NAME_BYTES = 100
# Bytes between two members that are read with them: that takes less time than another read.
BRIDGED = 1 << 16
# Bytes of parsed sidecars that a ShardSet keeps, of format 1 and where reads wait. An entry takes 100 to 500 bytes.
KEPT_BYTES, KEPT_REMOTE_BYTES = 1 << 27, 1 << 30


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is stored. An exact one has floats as `values`, a quantised one integers, and `mu` as well if it
    was not rotated."""

    values: np.ndarray
    mu: np.ndarray | None = None


@dataclass(frozen=True)
class StoredEntry:
    """One entry: its key, its .json member, and the requested tensors, by name without file ending."""

    key: str
    meta: dict[str, Any]
    tensors: dict[str, StoredTensor]


class KeptSidecars:
    """The sidecars that were used last, up to a number of bytes. Several threads may share them; a process that they
    are sent to starts without any."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._kept: OrderedDict[str, Sidecar] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[KeptSidecars], tuple[int]]:
        return KeptSidecars, (self.limit,)

    def get(self, shard: str, read: Callable[[], Sidecar]) -> Sidecar:
        """The sidecar of a shard, by `read` if it is not kept."""
        with self._lock:
            if shard in self._kept:
                self._kept.move_to_end(shard)
                return self._kept[shard]
        found = read()
        with self._lock:
            if shard not in self._kept:
                self._kept[shard] = found
                self.bytes += found.table.nbytes
            while self.bytes > self.limit and len(self._kept) > 1:
                self.bytes -= self._kept.popitem(last=False)[1].table.nbytes
        return found


class ShardSet:
    """The entries of a finished set, numbered from 0 in the order of the plan.

    With `rounds` N, only the entries of a cache's first N rounds, whether or not later rounds are finished; with a
    `part` of the plan, only those of its shards. Opening a set reads its manifest, unless that is given, and the head
    of every sidecar; an entry is found by reading its row. Where a read waits for an answer, whole sidecars are read
    instead, when they are first needed, and kept in memory. Raises ShardError for a set that is unfinished, mixed from
    several specs, or truncated, and for a rolling cache, which is no finished set.
    """

    def __init__(
        self,
        store: Store,
        stage: str,
        rounds: int | None = None,
        manifest: Manifest | None = None,
        part: slice = EVERYTHING,
    ) -> None:
        self.store = store
        self.manifest: Manifest = first_rounds(store, manifest or read_manifest(store, stage), rounds)
        if self.manifest.window is not None and part == EVERYTHING:
            raise ShardError(
                f"{store} is a rolling cache (--window {self.manifest.window}): its rounds come and go. Train on it "
                "with `distill --order rounds`; for anything else, make a cache without --window."
            )
        self.shards = self.manifest.plan.shards[part]
        missing = self.manifest.plan.unfinished(store, part)
        if missing:
            finished = missing[0].round
            raise ShardError(
                f"{store} is unfinished. Missing shards: {len(missing)} of {len(self.manifest.plan)}, from "
                f"{missing[0].name} on. Rerun the same `distill-sd {self.manifest.command}` to complete it"
                + (f", or train on the finished rounds with `distill --rounds {finished}`." if finished else ".")
            )
        buckets = range(len(counts(self.manifest.spec)))
        self._expected = [expected_tensors(self.manifest, bucket) for bucket in buckets]
        self.heads: list[Head] = []
        members, last = member_names(self._expected[0]), None
        lists: dict[tuple[str, ...], list[str]] = {}
        for head in at_once(store, lambda shard: placed_head(store, shard, self.manifest), self.shards):
            check_order(store, last, head, self.manifest)
            if self._expected[0]:
                check_members(store, head, members, self.manifest)
            # One list for all, since there may be very many.
            self.heads.append(replace(head, members=lists.setdefault(tuple(head.members), head.members)))
            last = head if head.count else last
        self._ends = list(itertools.accumulate(head.count for head in self.heads))
        self._keeps_sidecars = self.manifest.version == 1 or store.in_flight > 1
        self._sidecars = KeptSidecars(KEPT_BYTES if store.in_flight == 1 else KEPT_REMOTE_BYTES)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def tensors(self) -> list[str]:
        """The names of the tensors of each entry."""
        return list(self._expected[0])

    def expected_of(self, key: str) -> dict[str, Expected]:
        """The tensors of the entry with a key, by name, which depend on its bucket."""
        return self._expected[self.manifest.bucket_of(image_of(key))]

    def counts(self) -> list[int]:
        """The entries of each bucket, in all rounds; of a set without buckets all of them."""
        found = [0] * len(self._expected)
        for shard, head in zip(self.shards, self.heads, strict=True):
            found[shard.bucket] += head.count
        return found

    def digest(self) -> str:
        """A sha256 of the contents that the sidecars state. It changes if a shard was made again otherwise."""
        return sha256_of_json([[head.shard, head.sha256, head.table_crc32] for head in self.heads])

    def locate(self, index: int) -> tuple[int, int]:
        """The number of the shard that holds entry `index`, and the entry's place in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"entry {index} of {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def row(self, index: int) -> tuple[str, Row]:
        """The shard that holds entry `index`, and the entry's row."""
        number, place = self.locate(index)
        head = self.heads[number]
        if self._keeps_sidecars:
            return head.shard, self._sidecar(head.shard).row(place)
        return head.shard, read_row(self.store, head, place, self.manifest)

    def read(self, index: int, tensors: Iterable[str]) -> StoredEntry:
        """Entry `index` with the named tensors. Raises ShardError for one that is missing, damaged or not as the spec
        says."""
        shard, row = self.row(index)
        return read_entry(self.store, shard, row, tensors, self.manifest, self.expected_of(row.key))

    def _sidecar(self, shard: str) -> Sidecar:
        return self._sidecars.get(shard, lambda: read_sidecar(self.store, shard, self.manifest))


def first_rounds(store: Store, manifest: Manifest, rounds: int | None) -> Manifest:
    """The manifest of a cache's first `rounds`, or of all. Raises ShardError if it has fewer."""
    if rounds is None:
        return manifest
    if rounds > (manifest.rounds or 0):
        raise ShardError(
            f"{store} has {manifest.rounds} round{'s' * (manifest.rounds != 1)}, not {rounds}. To add rounds, run "
            f"`teacher-cache --rounds {rounds}` with the other settings unchanged."
        )
    return replace(manifest, rounds=rounds)


def read_entry(
    store: Store, shard: str, row: Row, tensors: Iterable[str], manifest: Manifest, expected: dict[str, Expected]
) -> StoredEntry:
    """One entry of a shard with the named tensors, each checked against what is `expected`; else ShardError."""
    key, members, path = row.key, row.members, f"{store}/{shard}"
    names = {tensor: _member_name(tensor, members) for tensor in tensors}
    for name in names.values():
        if name not in members:
            raise ShardError(f"{path} holds no {name} for entry {key}; it has {', '.join(sorted(members))}")
    wanted = ["json", *names.values()]
    try:
        found = read_members(store, shard, {name: members[name] for name in wanted})
    except FileNotFoundError:
        raise damaged(path, "it is missing", manifest) from None
    try:
        data = {name: _checked(key, name, members[name], block) for name, block in found.items()}
        meta = _parse_meta(key, data["json"])
        parsed = {
            tensor: _parse_tensor(key, name, members[name][2], data[name], expected.get(tensor))
            for tensor, name in names.items()
        }
    except ShardError as error:
        raise damaged(path, str(error), manifest) from None
    return StoredEntry(key, meta, parsed)


def read_members(store: Store, shard: str, members: dict[str, list[int]]) -> dict[str, memoryview]:
    """The headers and data of members, by name. What lies close together is read at once, with what lies between."""
    spans: list[list[int]] = []
    for offset, length, _, _ in sorted(members.values()):
        # A member is read together with its header, which is the block before it.
        start, end = offset - BLOCK, offset + length
        if spans and start - spans[-1][1] <= BRIDGED:
            spans[-1][1] = max(end, spans[-1][1])
        else:
            spans.append([start, end])
    blocks = store.read_ranges(shard, [(start, end - start) for start, end in spans])
    found = {}
    for (start, end), block in zip(spans, blocks, strict=True):
        for name, (offset, length, _, _) in members.items():
            if start < offset <= end:
                found[name] = memoryview(block)[offset - BLOCK - start : offset + length - start]
    return found


def sound_head(store: Store, shard: str, manifest: Manifest) -> Head:
    """The head of a shard's sidecar, if the tar exists and has the size that it states; else ShardError."""
    head = read_head(store, shard, manifest)
    size = store.size(shard)
    if size != head.bytes:
        what = "it is missing" if size is None else f"it has {size} bytes, not {head.bytes}"
        raise damaged(f"{store}/{shard}", what, manifest)
    return head


def placed_head(store: Store, shard: PlannedShard, manifest: Manifest) -> Head:
    """The sound head of a shard whose number of entries, and whose first and last image, are those of its place in the
    plan; else ShardError."""
    head = sound_head(store, shard.name, manifest)
    entries, indices = head.count + len(head.skipped), shard.indices
    path = f"{store}/{manifest.sidecar_name(shard.name)}"
    if entries != len(indices):
        raise damaged(path, f"it lists {entries} entries, not the {len(indices)} of its place", manifest)
    # The entries of a cache are numbered without the images that `encode` skipped, and their keys are the images' own.
    images = manifest.spec.get("latents", manifest.spec).get("entries", manifest.spec["entries"])
    later = images - manifest.spec["entries"]
    for image in head.images or ():
        placed = indices.start <= image < indices.stop + later
        if not placed or manifest.bucket_of(image) != shard.bucket:
            raise damaged(path, f"it lists image {image}, which has another place", manifest)
    return head


def check_order(store: Store, before: Head | None, after: Head, manifest: Manifest) -> None:
    """Raise ShardError if a shard begins with an entry that the one before it, in its round, has reached already."""
    if before is None or not (before.images and after.images) or round_of(before.shard) != round_of(after.shard):
        return
    if after.images[0] <= before.images[1]:
        raise ShardError(
            f"{store}/{before.shard} and {store}/{after.shard} hold the same entries, so one of them is not in its "
            f"place. For both: {manifest.rewrite}"
        )


def check_members(store: Store, head: Head, members: list[str], manifest: Manifest) -> None:
    """Raise ShardError unless a shard's entries have these members."""
    if head.count and head.members != members:
        what = f"its entries hold {', '.join(head.members)}, not {', '.join(members)}"
        raise damaged(f"{store}/{manifest.sidecar_name(head.shard)}", what, manifest)


def member_names(expected: dict[str, Expected]) -> list[str]:
    """The members of an entry with these tensors, in their order."""
    return sorted(["json", *(name + tensor.ending for name, tensor in expected.items())])


def _member_name(tensor: str, members: Collection[str]) -> str:
    compressed = f"{tensor}.npy.zst"
    return compressed if compressed in members else f"{tensor}.npy"


def _checked(key: str, name: str, place: list[int], block: memoryview) -> memoryview:
    """The bytes of a member, without its header, once its name in the tar and its checksum are right."""
    _, length, _, crc32 = place
    header, data = block[:BLOCK], block[BLOCK:]
    if bytes(header[:NAME_BYTES]).rstrip(b"\0") != f"{key}.{name}".encode():
        raise ShardError(f"member {key}.{name} is not where its sidecar says")
    if len(data) != length or zlib.crc32(data) != crc32:
        raise ShardError(f"member {key}.{name} does not have its checksum")
    return data


def _parse_meta(key: str, data: memoryview) -> dict[str, Any]:
    try:
        return json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"member {key}.json is not JSON ({error})") from None


def _parse_tensor(key: str, name: str, raw_bytes: int, data: memoryview, expected: Expected | None) -> StoredTensor:
    compressed = name.endswith(".zst")
    try:
        if expected and not name.endswith(expected.ending):
            raise ShardError(f"by the spec it ends in {expected.ending}")
        if compressed and expected and expected.rotated:
            stored = StoredTensor(unpack(data, raw_bytes, expected.shape))
        elif compressed:
            if expected:
                expected.check_size(raw_bytes)
            stored = StoredTensor(*unpack_quantised(data, raw_bytes))
        else:
            stored = StoredTensor(decode_npy(data))
        if expected:
            expected.check_values(stored.values)
        return stored
    except ShardError as error:
        raise ShardError(f"member {key}.{name}: {error}") from None
