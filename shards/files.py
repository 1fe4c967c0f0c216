"""Writing local files so that a crash leaves either the old file or the new one, never a part of it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from shards.schema import json_bytes

# The name carries host and process id, so that no two live processes share one, on a local disk or a shared one.
LEFTOVER = re.compile(r"\..+\.([^.]+)\.(\d+)\.partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only when the block ends well; otherwise it is removed.

    The OSError of a failed write does not name a file; here it gets the name of this one.
    """
    temporary = partial_name(path)
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, exist_ok: bool = False) -> Iterator[Path]:
    """A directory that takes its name only when the block ends well.

    `path` must not exist by then. With `exist_ok`, a directory that another process made there meanwhile stays.
    """
    temporary = partial_name(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
        try:
            os.replace(temporary, path)
        except OSError as error:
            if not exist_ok or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        fsync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(*directories: Path) -> None:
    """Delete the partial files that killed processes of this machine left in `directories`.

    Those of live processes and of other machines stay. Call this before this process writes anything. (In a container,
    a killed process may have had the same id as this one.)
    """
    for directory in filter(Path.is_dir, directories):
        for name in os.listdir(directory):
            match = LEFTOVER.fullmatch(name)
            if not match or match[1] != _host() or _is_another_live_process(int(match[2])):
                continue
            path = directory / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def partial_name(path: Path) -> Path:
    """The hidden name next to `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.partial")


def _host() -> str:
    return socket.gethostname().replace(".", "-") or "host"


def _is_another_live_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def fsync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> str:
    """Write `data` atomically. Returns its sha256."""
    with atomic_file(path) as stream:
        stream.write(data)
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write `value` atomically as JSON."""
    write_bytes(path, json_bytes(value, indent))


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read a megabyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
