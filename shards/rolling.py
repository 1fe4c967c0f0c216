"""The entries of a rolling cache, of whose rounds a few are there at a time."""

from __future__ import annotations

import threading
from collections import OrderedDict

from shards.buckets import counts as bucket_counts
from shards.expected import Expected, expected_tensors
from shards.manifest import Manifest, read_manifest
from shards.reader import ShardSet, first_rounds
from shards.schema import ShardError, image_of
from shards.sidecar import Row
from shards.store import Store

# Rounds that stay open: a step takes from two or a few.
OPEN = 8


class RollingSet:
    """The targets of a rolling cache, numbered as in a ShardSet of all its rounds. A round is opened when the first of
    its entries is read; it must be complete by then, and stay until its last one is read.

    Raises ShardError for a round that is not there.
    """

    def __init__(self, store: Store, rounds: int | None = None, manifest: Manifest | None = None) -> None:
        self.store = store
        self.manifest = first_rounds(store, manifest or read_manifest(store, "cache"), rounds)
        self._expected = [expected_tensors(self.manifest, bucket) for bucket in range(len(self._counts))]
        self._open: OrderedDict[int, ShardSet] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[RollingSet], tuple[Store, None, Manifest]]:
        """A process that it is sent to opens the rounds itself."""
        return RollingSet, (self.store, None, self.manifest)

    def __len__(self) -> int:
        return sum(self.counts())

    @property
    def rounds(self) -> int:
        return self.manifest.rounds or 1

    @property
    def _counts(self) -> list[int]:
        return bucket_counts(self.manifest.spec)

    def counts(self) -> list[int]:
        """The entries of each bucket, in all rounds."""
        return [count * self.rounds for count in self._counts]

    def expected_of(self, key: str) -> dict[str, Expected]:
        """As of a ShardSet."""
        return self._expected[self.manifest.bucket_of(image_of(key))]

    def row(self, index: int) -> tuple[str, Row]:
        """The shard that holds entry `index`, and the entry's row."""
        number, place = divmod(index, sum(self._counts))
        return self.round(number).row(place)

    def round(self, number: int) -> ShardSet:
        """The entries of one round."""
        with self._lock:
            if number not in self._open:
                self._open[number] = self._opened(number)
                if len(self._open) > OPEN:
                    self._open.popitem(last=False)
            return self._open[number]

    def _opened(self, number: int) -> ShardSet:
        part = self.manifest.plan.part_of(number)
        if self.manifest.plan.unfinished(self.store, part):
            raise ShardError(
                f"round {number} of {self.store} is not there. It comes when this training's reader needs it: look "
                "whether `teacher-cache` runs and the reader was not dropped (`distill-sd inspect`), and rerun the "
                "same command."
            )
        return ShardSet(self.store, "cache", manifest=self.manifest, part=part)
