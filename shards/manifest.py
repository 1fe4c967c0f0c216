"""The manifest: an immutable spec that says what the shards of a directory are, with its own hash."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.files import write_json
from shards.schema import FORMAT_VERSION, MANIFEST, ShardError, shard_names

# What a directory can hold, and the command that writes it.
STAGE_COMMANDS = {"latents": "encode", "cache": "teacher-cache"}


@dataclass(frozen=True)
class Manifest:
    """`spec` never changes once written; `rounds` (None for latents) may grow and touches no shard.

    `files` gives the sha256 of what lies beside the shards, by name.
    """

    spec: dict[str, Any]
    rounds: int | None = None
    files: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def spec_sha256(self) -> str:
        return sha256_of_json(self.spec)

    def shard_names(self) -> list[str]:
        return shard_names(self.spec["entries"], self.spec["entries_per_shard"], self.rounds)


def sha256_of_json(value: Any) -> str:
    """The sha256 of a value's canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    content = {
        "format": FORMAT_VERSION,
        "spec_sha256": manifest.spec_sha256,
        "rounds": manifest.rounds,
        "files": manifest.files,
        "spec": manifest.spec,
    }
    write_json(directory / MANIFEST, content)


def read_manifest(directory: Path, stage: str | None = None) -> Manifest:
    """The manifest of a directory of `stage` (latents or cache; None takes either).

    Raises ShardError when there is none, when it was edited, or when it is of another kind or version.
    """
    path = directory / MANIFEST
    wanted = [stage] if stage else list(STAGE_COMMANDS)
    commands = " or ".join(f"`distill-sd {STAGE_COMMANDS[s]}`" for s in wanted)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, stated = content["format"], content["spec_sha256"]
        manifest = Manifest(dict(content["spec"]), content["rounds"], dict(content["files"]))
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(
            f"{directory} has no {MANIFEST}: it is no {' or '.join(wanted)} directory; make one with {commands}"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(
            f"{path} cannot be read ({error!r}): restore it from a copy, or write the directory anew"
        ) from None
    if version != FORMAT_VERSION:
        raise ShardError(f"{path} has format {version}; this version reads format {FORMAT_VERSION}")
    if manifest.spec_sha256 != stated:
        raise ShardError(
            f"{path} was changed after it was written: its spec no longer has the hash it states; "
            "restore it from a copy, or write the directory anew"
        )
    found = manifest.spec.get("stage")
    if found not in wanted:
        raise ShardError(f"{path} describes {found}, not {' or '.join(wanted)}: give the directory of {commands}")
    rounds = manifest.rounds
    if not (rounds is None if found == "latents" else type(rounds) is int and rounds >= 1):
        raise ShardError(f"{path} has rounds {rounds!r}: restore it from a copy, or write the directory anew")
    return manifest


def read_file(directory: Path, manifest: Manifest, name: str) -> bytes:
    """One of the manifest's files, as it was when the manifest was written; else ShardError."""
    path = directory / name
    data = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(data).hexdigest() != manifest.files.get(name):
        raise ShardError(f"{path} is missing or was changed: restore it from a copy, or write {directory} anew")
    return data


def difference(old: Any, new: Any, name: str = "") -> list[str]:
    """Lines that say where two JSON values differ, one field a line: `codec.snr_db: 15.0 -> 10.0`."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(key for key in new if key not in old)]
        return [
            line for key in names for line in difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if old == new else [f"{name}: {json.dumps(old)} -> {json.dumps(new)}"]


def refuse_other_spec(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise ShardError with the difference when `path`, written for spec `old`, is asked to serve `new`.

    Both are compared as JSON, in which a tuple is a list.
    """
    lines = difference(old, json.loads(json.dumps(new)))
    if lines:
        shown = "\n".join(f"  {line}" for line in lines)
        raise ShardError(
            f"{path} was made with other settings (there -> now):\n{shown}\n"
            "Run with the settings it was made with, or choose another output directory."
        )
