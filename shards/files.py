"""Writing local files so that a crash leaves either the old file or the new one, never a part of it."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from shards.regular import open_regular
from shards.schema import json_bytes

# The name carries host and process id, and a random number: containers may share both host name and process id.
LEFTOVER = re.compile(r"\..+\.([^.]+)\.(\d+)(?:-[0-9a-f]+)?\.partial")
# What a file system answers that cannot sync a directory, or does not let this user do so.
NO_DIRECTORY_SYNC = {getattr(errno, name) for name in ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF", "EACCES")}


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes its name only when the block ends well; otherwise it is removed. It can be read as well.

    Its mode is that of any new file, whoever wrote it. An OSError names `path`, also that of a failed write, which
    would name no file, or of a directory that was moved away meanwhile.
    """
    temporary = partial_name(path)
    try:
        with open(temporary, "w+b") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        _allow(temporary, mode)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        _name(error, path, temporary)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_directory(path: Path, *, exist_ok: bool = False) -> Iterator[Path]:
    """A directory that takes its name only when the block ends well.

    Its files have the modes of any new files, whoever wrote them. `path` must not exist by then, unless it is an empty
    directory; else this raises FileExistsError. With `exist_ok`, a directory that another process made there meanwhile
    stays. A failed `shutil.copytree` raises the OSError of its first file.
    """
    temporary = partial_name(path)
    try:
        temporary.mkdir(parents=True)
        mode = temporary.stat().st_mode
        yield temporary
        for part in temporary.rglob("*"):
            if part.is_symlink():
                continue
            _allow(part, mode if part.is_dir() else mode & 0o666)
            if part.is_file():
                with open(part, "rb") as stream:
                    os.fsync(stream.fileno())
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if not exist_ok:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        fsync_directory(path.parent)
    except shutil.Error as error:
        raise _first_failure(error, path) from error
    except OSError as error:
        _name(error, path, temporary)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _allow(path: Path, mode: int) -> None:
    """Add the permissions of `mode` to a file. Some libraries make theirs readable to their owner alone."""
    existing = path.stat().st_mode & 0o7777
    if existing | mode & 0o777 != existing:
        path.chmod(existing | mode & 0o777)


def _name(error: OSError, path: Path, temporary: Path) -> None:
    """Have an error name `path` where it names nothing or a part of the temporary file."""
    if error.filename is None or str(temporary) in str(error.filename):
        error.filename = str(path)


def _first_failure(error: shutil.Error, path: Path) -> OSError:
    """The first failure of a copytree, which reports them all as text: [(source, target, "[Errno 28] ...")]."""
    found = re.search(r"\[Errno (\d+)\]", str(error))
    number = int(found[1]) if found else errno.EIO
    return OSError(number, os.strerror(number), str(path))


def remove_leftovers(*directories: Path) -> None:
    """Delete the partial files that killed processes of this machine left in `directories`.

    Those of live processes and of other machines stay. Call this before this process writes anything (in a container,
    a killed process may have had the same id as this one), and only while no one else writes there: a process in
    another container is alive although its id is not known here.
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


def remove_partials(directory: Path, stem: str) -> None:
    """Delete the partial files, of any machine, of the files of a finished shard: s00003 for s00003.tar."""
    for path in directory.glob(f".*{stem}.*.partial"):
        path.unlink(missing_ok=True)


def partial_name(path: Path) -> Path:
    """A new hidden name next to `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}-{secrets.token_hex(4)}.partial")


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
    """Make a rename in `path` survive a power cut, where the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_DIRECTORY_SYNC:
            raise


def write_bytes(path: Path, data: bytes) -> str:
    """Write `data` atomically. Returns its sha256."""
    with atomic_file(path) as stream:
        stream.write(data)
    return hashlib.sha256(data).hexdigest()


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """As `atomic_file`, but what has that name stays, and this raises FileExistsError. Of several processes that write
    it at once one wins, also on a disk without locks, if it has links."""
    temporary = partial_name(path)
    try:
        with atomic_file(temporary) as stream:
            yield stream
        try:
            os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:
            # A disk without links.
            if path.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write `value` atomically as JSON."""
    write_bytes(path, json_bytes(value, indent))


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read a megabyte at a time."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
