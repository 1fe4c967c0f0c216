"""The window of a rolling cache, as its writer moves it: what to write next, and what to delete."""

from __future__ import annotations

from collections.abc import Sequence

from shards.manifest import Manifest
from shards.plan import PlannedShard
from shards.readers import DELETING, Reader, announce, kept_rounds, read_readers, wanted_rounds
from shards.schema import round_of
from shards.store import Store
from shards.survey import SHARD_FILE, remove_shard


def wanted_shards(manifest: Manifest, readers: Sequence[Reader]) -> list[list[PlannedShard]] | None:
    """The shards of each round that must be there for these readers, the most urgent round first; None once all of them
    are done."""
    if readers and all(reader.is_done for reader in readers):
        return None
    wanted = wanted_rounds(readers, manifest.window or 0, manifest.rounds or 0)
    return [manifest.plan.shards[manifest.plan.part_of(number)] for number in wanted]


def delete_passed(store: Store, manifest: Manifest, readers: Sequence[Reader]) -> None:
    """Delete the rounds that none of these readers needs any more, announced before, unless one says meanwhile that it
    does.

    One process does this at a time. What one that was killed has left is deleted by the next.
    """
    if doomed := _passed(store, manifest, readers):
        announce(store, doomed)
        for number in sorted(doomed & _passed(store, manifest, read_readers(store))):
            for shard in manifest.plan.shards[manifest.plan.part_of(number)]:
                remove_shard(store, shard.name, manifest)
    store.delete(DELETING)


def _passed(store: Store, manifest: Manifest, readers: Sequence[Reader]) -> set[int]:
    """The rounds of which anything is there, and which no reader needs."""
    kept = kept_rounds(readers, manifest.window or 0)
    names = (name.removeprefix(".").removesuffix(".kept") for name in store.list())
    there = {round_of(name) for name in names if SHARD_FILE.fullmatch(name)}
    return set() if kept is None else {number for number in there if number is not None} - kept
