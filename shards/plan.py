"""The plan of a shard set: which shards it has once finished, which entries each covers, and which are still to write.

The plan follows from three counts alone, so every process knows the same one, after any crash.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from shards.schema import shard_name, sidecar_name
from shards.store import Store

EVERYTHING = slice(None)


class PlannedShard(NamedTuple):
    """One shard: its name, its round (None for latents), and the indices of the inputs that it is made from."""

    name: str
    round: int | None
    indices: range


class ShardPlan:
    """The shards of a finished set, in order; each round has shards of its own. Built in one pass over them."""

    def __init__(self, entries: int, entries_per_shard: int, rounds: int | None = None) -> None:
        starts = range(0, entries, entries_per_shard)
        self.shards = [
            PlannedShard(shard_name(place, number), number, range(start, min(start + entries_per_shard, entries)))
            for number in ([None] if rounds is None else range(rounds))
            for place, start in enumerate(starts)
        ]

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[PlannedShard]:
        return iter(self.shards)

    def names(self) -> list[str]:
        return [shard.name for shard in self.shards]

    def unfinished(self, store: Store, part: slice = EVERYTHING) -> list[PlannedShard]:
        """The shards of a part of the plan that have no sidecar yet."""
        existing = set(store.list())
        return [shard for shard in self.shards[part] if sidecar_name(shard.name) not in existing]


def share(shards: list[PlannedShard], process: int, processes: int) -> list[PlannedShard]:
    """The shards that process number `process` writes: every `processes`-th."""
    return shards[process::processes]


def count_entries(shards: list[PlannedShard]) -> int:
    return sum(len(shard.indices) for shard in shards)
