"""Reading files that may be anything: only regular ones, never more than a limit, and without waiting for anyone."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO


class NotRegularError(OSError):
    """There is a FIFO, a socket or a device, which could be read for ever."""


def open_regular(path: Path) -> IO[bytes]:
    """The regular file at `path`, opened to be read. Raises OSError, which names the path, for anything else."""
    return os.fdopen(open_descriptor(path), "rb")


def open_descriptor(path: Path) -> int:
    """The descriptor of the regular file at `path`. Raises OSError, which names the path, for anything else."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise NotRegularError(errno.EINVAL, f"{path.name} is not a regular file", str(path))
    # Should a FIFO take its place just now, this does not wait for a writer.
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))


def read_regular(path: Path, limit: int) -> bytes:
    """All bytes of a regular file. Raises OSError, which names the path, for anything else and for more bytes than
    `limit`."""
    with open_regular(path) as stream:
        data = stream.read(min(limit, os.fstat(stream.fileno()).st_size) + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"{path.name} has more than {limit} bytes", str(path))
    return data


def is_special(path: Path) -> bool:
    """Whether there is a FIFO, a socket or a device."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
