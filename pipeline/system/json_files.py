"""Reading the JSON files that a command left for a later one, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.system.errors import UserError
from pipeline.system.text_files import read_text


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, which ends with the remedy, if it holds something else."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is corrupt ({error}). {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is corrupt: it holds a {type(content).__name__}, not an object. {remedy}")
    return content
