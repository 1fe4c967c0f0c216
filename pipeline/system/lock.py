"""The lock on an output directory: who writes there now.

The lock is the operating system's, on a hidden file, so a process that is killed holds it no longer. Where a disk has
no locks, everything goes on without.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.system.echo import say
from pipeline.system.errors import UserError
from pipeline.system.text_files import read_text
from shards.location import Location

WRITING, CLAIMING = ".lock", ".claim.lock"
# Seconds between two tries for a lock that another job holds while it claims the directory, of waiting without a word,
# and of the longest wait.
RETRY, SILENCE, PATIENCE = 0.1, 5.0, 3600.0


class FileLock:
    """A lock on a file that exists only while it is held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def take(self, *, shared: bool = False) -> bool | None:
        """Whether the lock is held now; any number may share it. None if the disk has no locks.

        Taking a held lock again makes it exclusive or shared.
        """
        while True:
            try:
                if self._descriptor is None:
                    self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
                fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                self._close()
                return False
            except OSError:
                self._close()
                return None
            if self._is_current():
                # On a full disk the file stays empty, and the lock is held all the same.
                with suppress(OSError):
                    os.ftruncate(self._descriptor, 0)
                    os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return True
            # It was released, and its file removed, between the two calls.
            self._close()

    def holder(self) -> str:
        """Who took the lock last, as `process 12 on host`."""
        with suppress(OSError, UnicodeDecodeError):
            return read_text(self.path).strip() or "another process"
        return "another process"

    def release(self) -> None:
        """Release the lock if it is held. The last holder removes the file."""
        if self._descriptor is not None:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_current():
                    self.path.unlink()
            self._close()

    def _is_current(self) -> bool:
        """Whether the open file is still the one under its name."""
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except OSError:
            return False

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class NoLock:
    """In place of an OutputLock where the output is an address: what several jobs write there at once does no harm."""

    def __enter__(self) -> NoLock:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @contextmanager
    def claim(self, *, only: bool = False) -> Iterator[bool]:
        """As of an OutputLock; nobody knows whether other jobs write there."""
        yield False


def lock_of(out: Location) -> OutputLock | NoLock:
    return OutputLock(out) if isinstance(out, Path) else NoLock()


class OutputLock:
    """The locks of an output directory. Leaving the block releases what was taken in it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._writing, self._claiming = FileLock(out / WRITING), FileLock(out / CLAIMING)

    def __enter__(self) -> OutputLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._claiming.release()
        self._writing.release()

    def take(self) -> None:
        """Create the directory, and write there alone. Raises UserError if another process writes there."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self._writing.take() is False:
            raise self._in_use(self._writing)

    @contextmanager
    def claim(self, *, only: bool = False) -> Iterator[bool]:
        """Create the directory, and write there together with other jobs that do so; none may if this is the `only`
        one.

        In the block, no other job claims the directory. Yields whether no other job writes there; False where the disk
        has no locks, because nobody knows. Raises UserError if a process writes there that excludes this one.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        began, told = time.monotonic(), False
        while self._claiming.take() is False:
            waited = time.monotonic() - began
            if waited > PATIENCE:
                raise self._in_use(self._claiming)
            if waited > SILENCE and not told:
                say(f"waiting for {self._claiming.holder()}, which prepares {self.out}", err=True)
                told = True
            time.sleep(RETRY)
        alone = self._writing.take()
        if alone is False and (only or self._writing.take(shared=True) is False):
            raise self._in_use(self._writing)
        yield alone is True
        if alone:
            self._writing.take(shared=True)
        self._claiming.release()

    def _in_use(self, lock: FileLock) -> UserError:
        return UserError(
            f"{self.out} is being written by {lock.holder()}. Wait until that is finished, or choose another directory."
        )
