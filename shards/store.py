"""Where a shard set lives. Everything else in this package reads and writes through a store, by name.

A store holds named files; a name may have folders, with forward slashes. What it promises: a file appears complete or
not at all, and a file that was written replaces the one before it.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, overload

from shards.files import atomic_file, new_file
from shards.location import Location, location_of
from shards.regular import open_descriptor, read_regular
from shards.remote_store import RemoteStore
from shards.schema import json_bytes

# Bytes per read where a file is read from end to end.
CHUNK = 1 << 20
# Of a file that is read at once. Sidecars and manifests have megabytes at most.
MAX_READ_BYTES = 1 << 30

Item = TypeVar("Item")
Result = TypeVar("Result")


class Store(Protocol):
    """Reads raise FileNotFoundError for a name that does not exist, NotRegularError for one that is not a file's, and
    another OSError, which names the file, for one that cannot be read now. `str(store)` names the place in messages."""

    def read(self, name: str) -> bytes:
        """All bytes of a file."""

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length), shorter only where the file ends."""

    def write(self, name: str, *, new: bool = False) -> AbstractContextManager[IO[bytes]]:
        """A binary stream; the file takes its name when the block ends well, and nothing is left if it does not.

        A `new` one replaces nothing: FileExistsError is raised at the end of the block if there is such a file.
        """

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

    @property
    def in_flight(self) -> int:
        """How many reads are worth having at once: 1 where they need not wait for an answer from elsewhere."""


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

    def write(self, name: str, *, new: bool = False) -> AbstractContextManager[IO[bytes]]:
        return new_file(self.directory / name) if new else atomic_file(self.directory / name)

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

    @property
    def in_flight(self) -> int:
        return 1


@overload
def open_store(location: Path) -> LocalStore: ...


@overload
def open_store(location: str | Location) -> LocalStore | RemoteStore: ...


def open_store(location: str | Location) -> LocalStore | RemoteStore:
    """The store at `location`: a directory, which need not exist yet, or an address such as s3://bucket/cache.

    Raises LocationError for an address that cannot be used.
    """
    place = location_of(location)
    return LocalStore(place) if isinstance(place, Path) else RemoteStore(place)


def at_once(store: Store, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`function` of each item, in order: of as many at once, in threads, as the store has reads in flight.

    What one of them raises is raised in its place, and then no other is begun.
    """
    if store.in_flight == 1:
        yield from map(function, items)
        return
    ahead: deque[Future[Result]] = deque()
    threads = ThreadPoolExecutor(store.in_flight)
    try:
        for item in items:
            ahead.append(threads.submit(function, item))
            if len(ahead) > 2 * store.in_flight:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def read_chunks(store: Store, name: str) -> Iterator[bytes]:
    """A file from end to end, CHUNK bytes at a time."""
    if store.in_flight == 1:
        offset = 0
        while chunk := store.read_ranges(name, [(offset, CHUNK)])[0]:
            yield chunk
            offset += len(chunk)
        return
    size = store.size(name)
    if size is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{store}/{name}")
    ranges = [(offset, min(CHUNK, size - offset)) for offset in range(0, size, CHUNK)]
    for first in range(0, len(ranges), store.in_flight):
        yield from store.read_ranges(name, ranges[first : first + store.in_flight])


def scratch() -> IO[bytes]:
    """A file without a name on this machine, for what is uploaded when it is complete."""
    return tempfile.TemporaryFile(prefix="distill-sd-")


def write_json(store: Store, name: str, value: Any) -> None:
    """Write `value` as JSON."""
    with store.write(name) as stream:
        stream.write(json_bytes(value, 1))


@dataclass(frozen=True)
class Copied(LocalStore):
    """Files of a store that were copied to a directory on this machine; messages name the store."""

    of: str

    def __str__(self) -> str:
        return self.of


@contextmanager
def copied(store: Store, names: Iterable[str]) -> Iterator[Store]:
    """A store that holds these files on this machine while the block runs: `store` itself if reads need not wait.

    What does not exist is left out.
    """
    if store.in_flight == 1:
        yield store
        return
    with tempfile.TemporaryDirectory(prefix="distill-sd-") as directory:
        for name in names:
            if store.exists(name):
                with open(Path(directory) / name, "wb") as stream:
                    stream.writelines(read_chunks(store, name))
        yield Copied(Path(directory), str(store))


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
