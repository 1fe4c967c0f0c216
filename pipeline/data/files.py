"""Reading files that may be anything: only regular ones, and never more than a limit."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from pathlib import Path
from typing import IO, Any

from pipeline.system.errors import UserError

# No more than this is read for one image, or for one caption.
MAX_IMAGE_BYTES = 1 << 29
MAX_TEXT_BYTES = 1 << 20


def open_regular(path: Path) -> IO[bytes]:
    """The regular file at `path`, opened to be read. Raises OSError for anything else, and never waits for a FIFO."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path.name} is not a regular file")
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


def read_regular(path: Path, limit: int) -> bytes:
    """All bytes of a regular file. Raises OSError for anything else and for more bytes than `limit`."""
    with open_regular(path) as stream:
        data = stream.read(min(limit, os.fstat(stream.fileno()).st_size) + 1)
    if len(data) > limit:
        raise OSError(f"{path.name} has more than {limit} bytes")
    return data


def regular_size(path: Path) -> int | None:
    """The length of a regular file in bytes. None for anything else."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


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


def captions_in(text: str) -> list[str]:
    """The captions in a text file: its lines, stripped, without the blank ones."""
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError if it is not JSON or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def reason_of(error: OSError) -> str:
    """Why a file cannot be read, without its path, which differs between machines."""
    return error.strerror or str(error)
