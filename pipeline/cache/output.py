"""The output directory of a stage that writes shards: claiming it, and sharing out what is left to write."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from accelerate import PartialState

from pipeline.system.errors import UserError
from shards.files import remove_leftovers, write_bytes
from shards.manifest import Manifest, read_manifest, refuse_other_spec, write_manifest
from shards.reader import Sidecar, read_sidecar
from shards.schema import MANIFEST
from shards.writer import is_finished


def existing_manifest(out: Path, stage: str) -> Manifest | None:
    return read_manifest(out, stage) if (out / MANIFEST).is_file() else None


def claim(
    out: Path, stage: str, spec: dict[str, Any], *, rounds: int | None = None, files: dict[str, bytes] | None = None
) -> Manifest:
    """The manifest of `out` for `spec`: written now with its `files`, or found there with the same spec.

    More `rounds` than are there extend it; fewer leave it. What killed runs left half written is cleared
    away. Raises ShardError with the difference if `out` was made for another spec.
    """
    found = existing_manifest(out, stage)
    if found is not None:
        refuse_other_spec(out, found.spec, spec)
        remove_leftovers(out, out / "students")
        if rounds is None or rounds <= found.rounds:
            return found
        manifest = replace(found, rounds=rounds)
    else:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        manifest = Manifest(spec, rounds, {name: write_bytes(out / name, data) for name, data in (files or {}).items()})
    write_manifest(out, manifest)
    return manifest


def unfinished_shards(out: Path, manifest: Manifest) -> list[str]:
    return [shard for shard in manifest.shard_names() if not is_finished(out, shard)]


def share_unfinished(
    out: Path, manifest: Manifest, state: PartialState, shard_range: str | None
) -> tuple[list[str], list[str]]:
    """All unfinished shards in the range (see `range_of`), and those of them that fall to this process: every n-th.

    No process starts to write before all have looked, or they would share out different lists.
    """
    wanted = set(manifest.shard_names()[range_of(shard_range)])
    unfinished = [shard for shard in unfinished_shards(out, manifest) if shard in wanted]
    state.wait_for_everyone()
    return unfinished, unfinished[state.process_index :: state.num_processes]


def range_of(shard_range: str | None) -> slice:
    """The part of the plan that `A:B` names: shards A to B-1; one end may be left out. None is all of it."""
    if shard_range is None:
        return slice(None)
    matched = re.fullmatch(r"(\d*):(\d*)", shard_range)
    ends = [int(end) if end else None for end in matched.groups()] if matched else []
    if not any(end is not None for end in ends) or (None not in ends and ends[0] >= ends[1]):
        raise UserError(f"--shard-range {shard_range!r} is no range; write it as 0:50 or 50:100, the end left out")
    return slice(*ends)


def finished_sidecars(out: Path, manifest: Manifest) -> list[Sidecar] | None:
    """The sidecars of a finished directory, in the plan's order; of another None, once it is said what is left."""
    left, planned = unfinished_shards(out, manifest), manifest.shard_names()
    if left:
        done = len(planned) - len(left)
        click.echo(f"{out} holds {done} of {len(planned)} shards so far; the first still to write is {left[0]}")
        return None
    return [read_sidecar(out, shard, manifest.spec_sha256) for shard in planned]
