"""Reading the JSON files that a command left for a later one, with errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.system.errors import UserError
from pipeline.system.text_files import read_text
from shards.location import Location
from shards.store import open_store


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, which ends with the remedy, if it holds something else."""
    return _object(path, lambda: read_text(path), remedy)


def read_json_at(place: Location, name: str, remedy: str) -> dict[str, Any] | None:
    """As `read_json`, of a file in a directory or at an address; None if there is none."""
    if isinstance(place, Path):
        return read_json(place / name, remedy) if (place / name).is_file() else None
    try:
        data = open_store(place).read(name)
    except FileNotFoundError:
        return None
    return _object(place / name, lambda: data.decode("utf-8"), remedy)


def _object(path: Location, read: Callable[[], str], remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(read())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is corrupt ({error}). {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is corrupt: it holds a {type(content).__name__}, not an object. {remedy}")
    return content
