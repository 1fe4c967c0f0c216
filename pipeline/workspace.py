"""The output directory of a stage that writes shards: claiming it, and sharing out what is left to write."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pipeline.settings import Settings
from shards.files import remove_leftovers, write_bytes, write_json
from shards.manifest import Manifest, read_manifest, refuse_other_spec, write_manifest
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


def write_settings(out: Path, name: str, settings: Settings) -> None:
    write_json(out / f"{name}.json", settings.as_json())


def unfinished_shards(out: Path, manifest: Manifest) -> list[str]:
    return [shard for shard in manifest.shard_names() if not is_finished(out, shard)]


def share_unfinished(out: Path, manifest: Manifest, state: PartialState) -> tuple[list[str], list[str]]:
    """All unfinished shards, and those of them that fall to this process: every n-th.

    No process starts to write before all have looked, or they would share out different lists.
    """
    unfinished = unfinished_shards(out, manifest)
    state.wait_for_everyone()
    return unfinished, unfinished[state.process_index :: state.num_processes]
