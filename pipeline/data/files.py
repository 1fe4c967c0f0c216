"""Reading a user's files, which may be anything."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.system.errors import UserError

# No more than this is read for one image, or for one caption.
MAX_IMAGE_BYTES = 1 << 29
MAX_TEXT_BYTES = 1 << 20


class FileState(NamedTuple):
    """The length of a file in bytes, and when it was last modified, in nanoseconds, as far as they are known."""

    size: int | None = None
    modified: int | None = None


def state_of(path: Path) -> FileState:
    """The state of a regular file. Nothing is known of anything else."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return FileState()
    return FileState(status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else FileState()


def files_in(folder: Path, ending: str) -> list[Path]:
    """The files of a folder with this ending, sorted. A Mac's `._` files do not count.

    Raises UserError if one of them is neither a regular file nor a folder, because reading it could take for ever.
    """
    paths = [path for path in sorted(folder.glob(f"*{ending}")) if not path.name.startswith("._") and not path.is_dir()]
    for path in paths:
        refuse_special(path)
    return paths


def refuse_special(path: Path) -> None:
    """Raise UserError for a FIFO, a socket, a device, or a link that leads nowhere."""
    if os.path.lexists(path) and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is not a regular file. Replace or remove it.")


def is_mac_metadata(name: str) -> bool:
    """Whether a path names what macOS adds to folders and archives: `._photo.jpg` beside photo.jpg, and `__MACOSX/`."""
    return os.path.basename(name).startswith("._") or "__MACOSX" in name.split("/")


class TwiceError(ValueError):
    """An object in a JSON text has two values under one key."""


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, whose message goes on from the text's name, if it is not JSON, is
    nested too deeply, or has a key twice in one object."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except TwiceError:
        raise
    except RecursionError:
        raise ValueError("is not JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise TwiceError(f"has the key {twice(key for key, _ in pairs)!r} twice")
    return content


def twice(names: Iterable[str]) -> str | None:
    """The first of the names that was there before; None if each is there once."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def reason_of(error: OSError) -> str:
    """Why a file cannot be read, without its path, which differs between machines."""
    return error.strerror or str(error)
