"""Reading the files of a pipeline, with errors that name the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.system.errors import UserError, first_line

Part = TypeVar("Part")


def reading(folder: Path, load: Callable[[], Part]) -> Part:
    """`load()`. Raises UserError, naming the folder, if that fails."""
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise UserError(f"{folder} cannot be loaded: {first_line(error)}. Is the download complete?") from error


def read_part(kind: Any, folder: Path, part: str) -> Any:
    """A config, tokenizer or scheduler of class `kind` from a part of the pipeline in `folder`."""
    return reading(folder, lambda: kind.from_pretrained(folder, subfolder=part))
