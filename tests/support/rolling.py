"""A rolling cache whose rounds a fixed one lends, in place of a teacher that computes them."""

import shutil
from dataclasses import replace
from pathlib import Path

from shards.manifest import read_manifest, write_manifest
from shards.plan import PlannedShard
from shards.readers import read_readers
from shards.store import LocalStore
from shards.window import delete_passed, wanted_shards


def rolling_copy(fixed: Path, rolling: Path, window: int) -> Path:
    """All of a cache but its rounds, as a rolling one that begins."""
    shutil.copytree(fixed, rolling, ignore=lambda folder, names: [n for n in names if n.startswith("r0")])
    store = LocalStore(rolling)
    write_manifest(store, replace(read_manifest(store), window=window))
    return rolling


def teach(fixed: Path, rolling: Path) -> list[int]:
    """What the writer of a rolling cache does between two looks at its readers. Returns the rounds that are there."""
    store, manifest = LocalStore(rolling), read_manifest(LocalStore(rolling))
    readers = read_readers(store)
    delete_passed(store, manifest, readers)
    for shards in wanted_shards(manifest, readers) or []:
        lend(fixed, rolling, shards)
    return rounds_in(rolling)


def lend(fixed: Path, rolling: Path, shards: list[PlannedShard]) -> None:
    for shard in shards:
        for name in (shard.name, read_manifest(LocalStore(rolling)).sidecar_name(shard.name)):
            shutil.copy(fixed / name, rolling / name)


def rounds_in(rolling: Path) -> list[int]:
    """The rounds of which any file is there."""
    return sorted({int(path.name[1:5]) for path in rolling.glob("r0*")})
