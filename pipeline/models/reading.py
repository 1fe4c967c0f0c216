"""Reading the files of a pipeline, with errors that name the file."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pipeline.system.errors import UserError, first_line
from pipeline.system.text_files import read_text
from shards.regular import NotRegularError

Part = TypeVar("Part")


def reading(folder: Path, load: Callable[[], Part], kind: Any = None) -> Part:
    """`load()`, a library's reading of `folder`. Raises UserError, with the folder and the cause, if that fails.

    What the libraries raise for a damaged file is not limited to a few classes. If it is a network of class `kind`, the
    message names keys of its config that are null where a number belongs.
    """
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        cause, remedy = first_line(error).rstrip("."), "Fix its files, or copy them again."
        nulls = null_keys(kind, folder) if kind and isinstance(error, TypeError) else []
        if nulls:
            cause = f"its config.json has null for {', '.join(nulls)}"
            remedy = "Write the numbers there, or copy it again."
        raise UserError(f"{folder} cannot be loaded: {cause}. {remedy}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file is missing or holds none."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        raise UserError(f"{path} is missing. Copy or download the pipeline again.") from None
    except NotRegularError:
        raise UserError(f"{path} is not a regular file. Copy or download the pipeline again.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is corrupt ({first_line(error)}). Copy or download the pipeline again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is corrupt (it holds no JSON object). Copy or download the pipeline again.")
    return value


def read_part(kind: Any, folder: Path, part: str) -> Any:
    """A config, tokenizer or scheduler of class `kind` from a part of the pipeline in `folder`."""
    if not (folder / part).is_dir():
        raise UserError(f"{folder / part} is missing. Copy or download the pipeline again.")
    return reading(folder / part, lambda: kind.from_pretrained(folder / part))


def read_config(kind: Any, folder: Path) -> dict[str, Any]:
    """The config.json of a network of class `kind`, with the class's defaults filled in."""
    return {**defaults_of(kind), **read_json(folder / "config.json")}


def null_keys(kind: Any, folder: Path) -> list[str]:
    """The keys of a config.json that are null where class `kind` has numbers by default."""
    config = read_json(folder / "config.json")
    numbers = [
        key
        for key, value in defaults_of(kind).items()
        if isinstance(value, int | float | tuple) and not isinstance(value, bool)
    ]
    return [key for key in numbers if config.get(key, 0) is None]


def defaults_of(kind: Any) -> dict[str, Any]:
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
