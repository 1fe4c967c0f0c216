"""Files with a JSON object per line, which a killed process may have left incomplete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.system.text_files import lines_in


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects in a file, without lines that hold none, such as one that was cut short. Empty without a file."""
    if not path.is_file():
        return []
    lines = lines_in(path.read_text(encoding="utf-8", errors="replace"))
    return [value for value in map(_value, lines) if isinstance(value, dict)]


def _value(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
