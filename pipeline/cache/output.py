"""The output directory of a stage that writes shards: claiming it, and sharing out the shards still to write."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pipeline.cache.parts import is_bound
from pipeline.cache.remote_parts import checksums_of, parts_of
from pipeline.system.echo import plural, say
from pipeline.system.errors import UserError
from pipeline.system.options import range_of
from shards.files import remove_leftovers
from shards.location import Location
from shards.manifest import Manifest, read_manifest, refuse_other_spec, write_manifest
from shards.plan import PlannedShard, share
from shards.reader import placed_head
from shards.schema import IMAGES, MANIFEST
from shards.sidecar import Head
from shards.store import Store, at_once, open_store


def existing_manifest(out: Location, stage: str) -> Manifest | None:
    """The manifest of `out`, if it has one."""
    store = open_store(out)
    return read_manifest(store, stage) if store.exists(MANIFEST) else None


def claim(
    out: Location,
    stage: str,
    spec: dict[str, Any],
    *,
    alone: bool,
    rounds: int | None = None,
    files: dict[str, bytes] | None = None,
    window: int | None = None,
) -> Manifest:
    """The manifest of `out`, an address or an existing directory, for `spec`: written now together with its `files`, or
    an existing one with the same spec.

    More `rounds` than it has extend it; fewer leave it unchanged. The `window` of a rolling cache may change. If this
    job is `alone` there, partial files of killed runs are removed. Raises ShardError, with the difference, if `out` was
    made for another spec, and UserError if it is a rolling cache and is not to be one, or the other way round.
    """
    store = open_store(out)
    found = existing_manifest(out, stage)
    if found is not None:
        refuse_other_spec(out, found.spec, spec)
        refuse_other_window(out, found, window)
    if alone and isinstance(out, Path):
        remove_leftovers(out, out / "students", out / IMAGES)
    if found is None:
        hashes = {name: _write(store, name, data) for name, data in (files or {}).items()}
        manifest = Manifest(spec, rounds, hashes, window=window)
    elif found.rounds is None or (max(rounds or 1, found.rounds), window) == (found.rounds, found.window):
        return found
    else:
        manifest = replace(found, rounds=max(rounds or 1, found.rounds), window=window, sealed=True)
    write_manifest(store, manifest)
    return manifest


def refuse_other_window(out: Location, found: Manifest, window: int | None) -> None:
    """Raise UserError for a cache that keeps all rounds and is to delete some, and for the opposite."""
    if found.window is None and window is not None:
        raise UserError(
            f"--window {window}: {out} holds a cache that keeps all its rounds, and none of them is deleted. Leave "
            "--window out, or choose another --out."
        )
    if found.window is not None and window is None:
        raise UserError(
            f"{out} holds a rolling cache. Add --window {found.window} to go on with it, or choose another --out for a "
            "cache that keeps all rounds."
        )


def bind_parts(out: Location, manifest: Manifest, saved: list[str]) -> Manifest:
    """The manifest of a cache with the checksums of its folders of weights, of which the `saved` ones are new.

    A finished cache of an earlier version, to which nothing is added, stays as it is.
    """
    unbound = [part for part in parts_of(out) if not is_bound(manifest, part)] if manifest.sealed else []
    checksums = checksums_of(out, {*saved, *unbound})
    if not checksums:
        return manifest
    # Another job may have added to it, where the disk has no locks.
    manifest = read_manifest(open_store(out), "cache")
    manifest = replace(manifest, files={**manifest.files, **checksums}, sealed=True)
    write_manifest(open_store(out), manifest)
    return manifest


def _write(store: Store, name: str, data: bytes) -> str:
    """Write a file. Returns its sha256."""
    with store.write(name) as stream:
        stream.write(data)
    return hashlib.sha256(data).hexdigest()


def share_unfinished(
    out: Location, manifest: Manifest, state: PartialState, shard_range: str | None
) -> tuple[list[PlannedShard], list[PlannedShard]]:
    """All unfinished shards of the range (see `range_of`), and those of them that this process writes.

    No process starts to write before all have looked; otherwise they would share out different lists.
    """
    unfinished = manifest.plan.unfinished(open_store(out), range_of(shard_range))
    state.wait_for_everyone()
    return unfinished, share(unfinished, state.process_index, state.num_processes)


def finished_heads(out: Location, manifest: Manifest) -> list[Head] | None:
    """The heads of a finished directory's sidecars, in the plan's order. None, after a line on what is left, if it is
    unfinished."""
    store, plan = open_store(out), manifest.plan
    left = plan.unfinished(store)
    if left:
        done = len(plan) - len(left)
        say(f"{out} holds {done} of {plural(len(plan), 'shard')} so far; the next one to write is {left[0].name}")
        return None
    return list(at_once(store, lambda shard: placed_head(store, shard, manifest), plan))
