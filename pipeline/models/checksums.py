"""Checksums of a folder of weights: checksums.json, written last, holds the sha256 of the files next to it.

Folders written by earlier versions have no checksums and are used unchecked.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.system.disk import size_of
from pipeline.system.echo import say_wait
from pipeline.system.text_files import read_text
from shards.files import file_sha256, write_json

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path, pattern: str = "*") -> None:
    """Write {relative path: sha256} of the files below `folder` whose names match. The folder must be complete."""
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    write_json(folder / CHECKSUMS, {path.relative_to(folder).as_posix(): file_sha256(path) for path in files})


def has_checksums(folder: Path) -> bool:
    return (folder / CHECKSUMS).is_file()


def changed_files(folder: Path, *, contents: bool = True) -> list[str]:
    """What differs from when `folder` was written: `config.json is missing`, `x.safetensors was changed`.

    Without `contents`, the files are only looked for and not read. Empty if the folder is intact or has no checksums.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return []
    try:
        checksums = dict(json.loads(read_text(path)))
    except (ValueError, TypeError, RecursionError) as error:
        return [f"{CHECKSUMS} cannot be read ({error})"]
    if not checksums:
        return [f"{CHECKSUMS} lists no files"]
    stated = {name: sha256 if contents else None for name, sha256 in checksums.items()}
    return [problem for name, sha256 in stated.items() if (problem := _problem(folder, name, sha256))]


def _problem(folder: Path, name: str, sha256: str | None) -> str | None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{name!r} in {CHECKSUMS} lies outside the folder"
    if not path.is_file():
        return f"{name} is missing"
    return None if sha256 is None or hashed(path) == sha256 else f"{name} was changed"


def hashed(path: Path) -> str:
    """The sha256 of a file of weights. Says so if that takes long."""
    say_wait(f"hashing {path}", size_of([path]))
    return file_sha256(path)
