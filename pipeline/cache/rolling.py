"""The writer of a rolling cache: which shards are next, when to wait, and when all is done."""

from __future__ import annotations

import time
from collections.abc import Iterator

from accelerate import PartialState

from pipeline.system.echo import say
from shards.manifest import Manifest
from shards.plan import PlannedShard, share
from shards.readers import read_readers
from shards.store import Store
from shards.window import delete_passed, wanted_shards

# Seconds between two looks at the readers.
POLL = 5.0


def rolling_shards(store: Store, manifest: Manifest, state: PartialState) -> Iterator[list[PlannedShard]]:
    """What this process writes next, a round or a part of one at a time, until all readers are done.

    Whoever iterates writes the shards before it asks for more. In between, the main process deletes what all readers
    have passed. The processes of a job agree without a word: of each round every one has the same shards to write,
    whenever it looks.
    """
    told = False
    while True:
        readers = read_readers(store)
        if state.is_main_process:
            delete_passed(store, manifest, readers)
        # For the same readers: what they have passed is deleted before more is written.
        wanted = wanted_shards(manifest, readers)
        if wanted is None:
            return
        existing = set(store.list())
        own = (
            unfinished(share(shards, state.process_index, state.num_processes), manifest, existing) for shards in wanted
        )
        todo = next(filter(None, own), None)
        if todo:
            yield todo
            continue
        if state.is_main_process and not told and not readers:
            say(
                f"{store}: the first {manifest.window} of {manifest.rounds} rounds are written. Waiting for a reader: "
                f"`distill-sd distill --cache {store} --order rounds`",
                err=True,
            )
            told = True
        time.sleep(POLL)


def unfinished(shards: list[PlannedShard], manifest: Manifest, existing: set[str]) -> list[PlannedShard]:
    return [shard for shard in shards if manifest.sidecar_name(shard.name) not in existing]
