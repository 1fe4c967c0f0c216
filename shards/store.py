"""Where a shard set lives. Everything else in this package reads and writes through a store, by name.

A store holds named files; a name may have folders, with forward slashes. What it promises: a file appears complete or
not at all, and a file that was written replaces the one before it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from shards.files import atomic_file
from shards.regular import open_descriptor, read_regular

# Bytes per read where a file is read from end to end.
CHUNK = 1 << 20
# Of a file that is read at once. Sidecars and manifests have megabytes at most.
MAX_READ_BYTES = 1 << 30


class Store(Protocol):
    """Reads raise FileNotFoundError for a name that does not exist, NotRegularError for one that is not a file's, and
    another OSError, which names the file, for one that cannot be read now. `str(store)` names the place in messages."""

    def read(self, name: str) -> bytes:
        """All bytes of a file."""

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length), shorter only where the file ends."""

    def write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A binary stream; the file takes its name when the block ends well, and nothing is left if it does not."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    def size(self, name: str) -> int | None:
        """Its length in bytes; None if there is no such file."""

    def list(self) -> list[str]:
        """All names, sorted. Whatever occupies a name is listed, also what cannot be read."""

    def delete(self, name: str) -> None:
        """Remove a file. A file that does not exist is no error."""

    def folder(self, name: str) -> Store:
        """The store of the files in a folder of this one."""


@dataclass(frozen=True)
class LocalStore:
    """A directory, which must exist before anything is written."""

    directory: Path

    def __str__(self) -> str:
        return str(self.directory)

    def read(self, name: str) -> bytes:
        with _naming(self.directory / name) as path:
            return read_regular(path, MAX_READ_BYTES)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with _naming(self.directory / name) as path:
            descriptor = open_descriptor(path)
            try:
                return [_read_at(descriptor, offset, length) for offset, length in ranges]
            finally:
                os.close(descriptor)

    def write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        return atomic_file(self.directory / name)

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        try:
            found = os.stat(self.directory / name)
        except OSError as error:
            # Any other error says nothing about the file.
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def list(self) -> list[str]:
        if not self.directory.is_dir():
            return []
        return sorted(os.listdir(self.directory))

    def delete(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)

    def folder(self, name: str) -> LocalStore:
        return LocalStore(self.directory / name)


def open_store(location: str | Path) -> LocalStore:
    """The store at `location`: a directory, which need not exist yet."""
    return LocalStore(Path(location))


def read_chunks(store: Store, name: str) -> Iterator[bytes]:
    """A file from end to end, CHUNK bytes at a time."""
    offset = 0
    while chunk := store.read_ranges(name, [(offset, CHUNK)])[0]:
        yield chunk
        offset += len(chunk)


@contextmanager
def _naming(path: Path) -> Iterator[Path]:
    """Have an OSError name the file, which that of a failed read does not."""
    try:
        yield path
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _read_at(descriptor: int, offset: int, length: int) -> bytes:
    """A read may return less than it was asked for; only at the end of the file does it return nothing."""
    data = os.pread(descriptor, length, offset)
    while 0 < len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data
