"""Checksums of a folder of weights: checksums.json, written last, gives the sha256 of every file beside it.

A folder of an earlier version has none; it is used as it is.
"""

from __future__ import annotations

import json
from pathlib import Path

from shards.files import file_sha256, write_json

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Take the sha256 of every file below `folder`, which must be whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / CHECKSUMS, {path.relative_to(folder).as_posix(): file_sha256(path) for path in files})


def has_checksums(folder: Path) -> bool:
    return (folder / CHECKSUMS).is_file()


def changed_files(folder: Path) -> list[str]:
    """What in `folder` is not as it was written: `config.json is missing`, `x.safetensors was changed`.

    Nothing for a folder without checksums.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return []
    try:
        stated = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        return [f"{CHECKSUMS} cannot be read ({error})"]
    return [what for name, sha256 in stated.items() if (what := _change(folder, name, sha256))]


def _change(folder: Path, name: str, sha256: str) -> str | None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{name!r} in {CHECKSUMS} lies outside the folder"
    if not path.is_file():
        return f"{name} is missing"
    return None if file_sha256(path) == sha256 else f"{name} was changed"
