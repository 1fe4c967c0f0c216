"""Writing files so that a crash leaves either the old one or the new one, never a part."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only when the block ends well; otherwise it is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path, *, exist_ok: bool = False) -> Iterator[Path]:
    """A directory that takes its name only when the block ends well.

    `path` must not exist by then; with `exist_ok` what another process made there meanwhile stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
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


def fsync_directory(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> str:
    """Write `data` atomically; returns its sha256."""
    with atomic_file(path) as stream:
        stream.write(data)
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write `value` atomically as JSON; NaN and Inf are refused, being no JSON."""
    write_bytes(path, json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False).encode() + b"\n")


class HashingFile:
    """A binary stream that takes the sha256 and the length of what is written through it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.length = 0

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self.length += len(data)
        return self._stream.write(data)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()
