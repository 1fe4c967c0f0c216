"""Fields of nested objects, by dotted names: `captions.en` of {"captions": {"en": "a cat"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def field(row: Any, name: str) -> Any:
    """What `name` leads to: the key itself where there is one, else key by key between its dots. None if nothing."""
    if not isinstance(row, Mapping):
        return None
    if name in row:
        return row[name]
    # A key may hold dots itself.
    for place, character in enumerate(name):
        if character == "." and (found := field(row.get(name[:place]), name[place + 1 :])) is not None:
            return found
    return None
