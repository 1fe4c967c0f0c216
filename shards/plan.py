"""The plan of a shard set: which shards it has once finished, which entries each covers, and which are still to write.

The plan follows from counts alone, so every process knows the same one, after any crash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from shards.schema import FORMAT_VERSION, ShardError, shard_name, sidecar_name
from shards.store import Store

EVERYTHING = slice(None)
# A key has nine digits. A plan of so many shards takes 270 MB and several seconds.
MAX_ENTRIES, MAX_SHARDS, LARGEST = 10**9, 1_000_000, 2**63 - 1


class PlannedShard(NamedTuple):
    """One shard: its name, its round (None for latents), the indices of the inputs that it is made from, and the bucket
    that these are of."""

    name: str
    round: int | None
    indices: range
    bucket: int = 0


class ShardPlan:
    """The shards of a finished set, in order; each round has shards of its own. Built in one pass over them.

    `buckets` are the entries of each bucket, which follow one another; no shard crosses from one to the next. Raises
    ShardError for counts that no set has.
    """

    def __init__(
        self,
        entries: int,
        entries_per_shard: int,
        rounds: int | None = None,
        version: int = FORMAT_VERSION,
        buckets: Sequence[int] | None = None,
    ) -> None:
        self.version = version
        if problem := counts_problem(entries, entries_per_shard, rounds, buckets):
            raise ShardError(problem)
        covered = list(_covered([entries] if buckets is None else buckets, entries_per_shard))
        self.in_round = len(covered)
        self.shards = [
            PlannedShard(shard_name(place, number), number, indices, bucket)
            for number in ([None] if rounds is None else range(rounds))
            for place, (bucket, indices) in enumerate(covered)
        ]

    def __len__(self) -> int:
        return len(self.shards)

    def __iter__(self) -> Iterator[PlannedShard]:
        return iter(self.shards)

    def names(self) -> list[str]:
        return [shard.name for shard in self.shards]

    def part_of(self, number: int) -> slice:
        """The part of the plan that is round `number`."""
        return slice(number * self.in_round, (number + 1) * self.in_round)

    def unfinished(self, store: Store, part: slice = EVERYTHING) -> list[PlannedShard]:
        """The shards of a part of the plan that have no sidecar yet."""
        existing = set(store.list())
        return [shard for shard in self.shards[part] if sidecar_name(shard.name, self.version) not in existing]


def _covered(buckets: Sequence[int], entries_per_shard: int) -> Iterator[tuple[int, range]]:
    """The bucket and the indices of each shard of a round."""
    first = 0
    for bucket, count in enumerate(buckets):
        end = first + count
        for start in range(first, end, entries_per_shard):
            yield bucket, range(start, min(start + entries_per_shard, end))
        first = end


def counts_problem(
    entries: Any, entries_per_shard: Any, rounds: Any = None, buckets: Sequence[Any] | None = None
) -> str | None:
    """Why no set has these counts, in words; None if one may."""
    limits = {"entries": (entries, 0, MAX_ENTRIES), "entries per shard": (entries_per_shard, 1, LARGEST)}
    limits |= {} if rounds is None else {"rounds": (rounds, 1, LARGEST)}
    for name, (count, least, most) in limits.items():
        if type(count) is not int or not least <= count <= most:
            return f"the number of {name} is {count!r:.40}, not one from {least} to {most}"
    of_buckets = [entries] if buckets is None else buckets
    if any(type(count) is not int or count < 0 for count in of_buckets) or sum(of_buckets) != entries:
        return f"its buckets have {of_buckets!r:.80} entries, which are not {entries} together"
    shards = sum(-(-count // entries_per_shard) for count in of_buckets) * (rounds or 1)
    if shards > MAX_SHARDS:
        return f"the plan has {shards} shards, more than {MAX_SHARDS}; more entries per shard make fewer of them"
    return None


def share(shards: list[PlannedShard], process: int, processes: int) -> list[PlannedShard]:
    """The shards that process number `process` writes: every `processes`-th."""
    return shards[process::processes]


def count_entries(shards: list[PlannedShard]) -> int:
    return sum(len(shard.indices) for shard in shards)
