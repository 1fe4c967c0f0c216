"""A store in a bucket, on a hub or on a web server, through fsspec.

A file is written as one object, whose upload is completed last, so it appears whole or not at all. What fails for a
reason that may pass is tried again, at longer and longer intervals. What then is still an error is an OSError that
names the object, never damage: bytes count only if they are as many as were asked for.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from shards.location import LIBRARIES, WEB, Url

# Seconds between the tries of a request: one minute in all. Each is varied, so that readers do not come all at once.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# Seconds until a connection, and until an answer, is given up.
CONNECT_SECONDS, ANSWER_SECONDS = 10, 30
# Requests of one process that are on their way at once.
IN_FLIGHT = 32
# Of an object that is read at once.
MAX_READ_BYTES = 1 << 30
# Answers that are worth another try, besides those of 500 and more: time-outs, conflicts, too many requests.
PASSING = (408, 409, 425, 429)
FORBIDDEN = (401, 403, 407)
# What a message may not repeat of what a library says: passwords and queries of addresses, long tokens.
SECRETS = re.compile(r"(?<=://)[^/\s?#'\"]*@|\?[^\s'\")>]*|[A-Za-z0-9+/_=-]{32,}")
NO_BUCKET = re.compile("NoSuchBucket|bucket does not exist")
# Classes of errors by which libraries say that there are no valid credentials.
NO_CREDENTIALS = re.compile("Credential|TokenRetrieval|SSOToken|RefreshError|LocalTokenNotFound")
# Of huggingface_hub's error while an environment variable keeps it from the network.
OFFLINE = re.compile("OfflineMode")

Result = TypeVar("Result")
Part = tuple[str, int, int]


@dataclass(frozen=True)
class RemoteStore:
    """The objects below an address. Only what lies directly there is listed."""

    url: Url

    def __str__(self) -> str:
        return str(self.url)

    @property
    def in_flight(self) -> int:
        return IN_FLIGHT

    def read(self, name: str) -> bytes:
        size = self.size(name)
        if size is None:
            # A byte of it is asked for, since the answer says more.
            size = 1
        if size > MAX_READ_BYTES:
            raise OSError(errno.EFBIG, f"{name} has more than {MAX_READ_BYTES} bytes", self._shown(name))
        return self.read_ranges(name, [(0, size)])[0]

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """All at once; those that fail are asked for again together."""
        found: dict[int, bytes] = {place: b"" for place, (_, length) in enumerate(ranges) if not length}
        for wait in (*WAITS, None):
            left = [place for place in range(len(ranges)) if place not in found]
            if not left:
                break
            answers = self._ask(name, [ranges[place] for place in left])
            failed = None
            for place, answer in zip(left, answers, strict=True):
                try:
                    found[place] = self._checked(name, ranges[place], answer)
                except PassingError as error:
                    failed = error
            if failed:
                self._wait(name, wait, failed)
        return [found[place] for place in range(len(ranges))]

    @contextmanager
    def write(self, name: str, *, new: bool = False) -> Iterator[IO[bytes]]:
        """The bytes are gathered in a file on this machine, and uploaded when the block ends well.

        Whether a `new` one exists already is asked with the upload itself where the service answers that, else before.
        An upload of which the answer was lost is tried again, and then finds its own object.
        """
        if self.url.scheme in WEB:
            raise OSError(errno.EROFS, "nothing can be written over http", self._shown(name))
        with tempfile.NamedTemporaryFile(prefix="distill-sd-") as stream:
            try:
                yield stream.file
                stream.flush()
            except OSError as error:
                error.filename = error.filename or stream.name
                raise
            options = create_options(self._files) if new else {}
            if new and not options and self.exists(name):
                raise self._exists(name)
            self._try(name, lambda files: files.put_file(stream.name, self._path(name), **options))

    def _exists(self, name: str) -> FileExistsError:
        return FileExistsError(errno.EEXIST, "there is such an object", self._shown(name))

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        try:
            found = self._try(name, lambda files: files.info(self._path(name)))
        except FileNotFoundError:
            return None
        if found["type"] == "file" and found["size"] is None:
            raise OSError(errno.EIO, "the server does not say how long the file is", self._shown(name))
        return found["size"] if found["type"] == "file" else None

    def list(self) -> list[str]:
        """Of a web server, the links on its page of the directory, if it makes one."""
        try:
            found = self._try("", lambda files: files.ls(self._path(""), detail=False))
        except FileNotFoundError:
            return []
        # fsspec joins a relative link to the page's whole address, behind its query.
        page = self._path("").rstrip("/") + "/"
        names = (path.removeprefix(page).partition("?")[0].rstrip("/").rpartition("/")[2] for path in found)
        return sorted({name for name in names if name} - {self.url.name})

    def delete(self, name: str) -> None:
        if self.url.scheme in WEB:
            raise OSError(errno.EROFS, "nothing can be deleted over http", self._shown(name))
        with suppress(FileNotFoundError):
            self._try(name, lambda files: files.rm_file(self._path(name)))

    def folder(self, name: str) -> RemoteStore:
        return RemoteStore(self.url / name)

    @property
    def _files(self) -> Any:
        return file_system(self.url.scheme, os.getpid())

    def _path(self, name: str) -> str:
        """What fsspec calls an object: of the web its whole address, else bucket and key."""
        url = self.url / name if name else self.url
        return url.address if url.scheme in WEB else url.address.partition("://")[2].rstrip("/")

    def _shown(self, name: str) -> str:
        return f"{self}/{name}" if name else str(self)

    def _ask(self, name: str, ranges: Sequence[tuple[int, int]]) -> Sequence[Any]:
        """The bytes of each range, or the error in their place."""
        files, path = self._files, self._path(name)
        if files.async_impl:
            starts, ends = [start for start, _ in ranges], [start + length for start, length in ranges]
            return _answer(lambda: files.cat_ranges([path] * len(ranges), starts, ends, on_error="return"), len(ranges))

        def one(start: int, length: int) -> Sequence[Any]:
            return _answer(lambda: [files.cat_file(path, start=start, end=start + length)], 1)

        return [answer for start, length in ranges for answer in one(start, length)]

    def _checked(self, name: str, asked: tuple[int, int], answer: Any) -> bytes:
        """The bytes of a range if all of them came. Raises PassingError if another try may help, else OSError."""
        offset, length = asked
        if isinstance(answer, Exception) and status_of(answer) != 416:
            raise self._failure(name, answer)
        # 416: the range begins behind the end.
        data: bytes = b"" if isinstance(answer, Exception) else answer
        if len(data) > length:
            what = "the server sends the whole file where a part was asked for. Use one that answers to ranges"
            raise OSError(errno.ENOTSUP, what, self._shown(name))
        if len(data) < length:
            size = self.size(name)
            if size is None or len(data) != min(length, max(0, size - offset)):
                raise PassingError(f"{len(data)} of {length} bytes came")
        return data

    def _try(self, name: str, request: Callable[[Any], Result]) -> Result:
        files = self._files
        for wait in (*WAITS, None):
            try:
                return request(files)
            # The libraries raise classes of their own that have no base in common.
            except Exception as error:
                failed = self._failure(name, error)
            if not isinstance(failed, PassingError):
                raise failed from None
            self._wait(name, wait, failed)
        raise AssertionError("the last wait raises")

    def _failure(self, name: str, error: Exception) -> Exception:
        """PassingError if another try may help, else the OSError to raise, with nothing secret in it."""
        status, said, shown = status_of(error), words_of(error), self._shown(name)
        if status == 412:
            return self._exists(name)
        if status == 404 and NO_BUCKET.search(said):
            return OSError(errno.ENODEV, f"there is no such bucket ({said}). Check the address", shown)
        if status == 404:
            return FileNotFoundError(errno.ENOENT, "there is no such object", shown)
        if status in FORBIDDEN or isinstance(error, PermissionError) or NO_CREDENTIALS.search(type(error).__name__):
            remedy = (
                f"Check that the credentials which {LIBRARIES[self.url.scheme]} finds are valid and have not expired"
            )
            return PermissionError(errno.EACCES, f"access was denied ({said}). {remedy}", shown)
        if OFFLINE.search(f"{type(error).__name__} {said}"):
            return OSError(errno.ENETDOWN, f"the network was not asked ({said}). Unset HF_HUB_OFFLINE", shown)
        if isinstance(error, TypeError | AttributeError | NameError):
            return error
        if status is None or status >= 500 or status in PASSING:
            return PassingError(said)
        return OSError(errno.EIO, f"the request was refused ({said})", shown)

    def _wait(self, name: str, seconds: float | None, failed: PassingError) -> None:
        """Wait before another try. Raises OSError after the last one."""
        if seconds is None:
            what = f"{len(WAITS) + 1} tries failed, the last with: {failed}. Check the network and the service"
            raise OSError(errno.EIO, what, self._shown(name)) from None
        time.sleep(seconds * random.SystemRandom().uniform(0.5, 1.5))


class PassingError(Exception):
    """A request failed for a reason that may pass."""


@functools.lru_cache(maxsize=8)
def file_system(scheme: str, process: int) -> Any:
    """fsspec's file system for a kind of address, one a process. It caches no listings, and retries nothing itself.

    Raises OSError, with the command that installs it, if a library is missing.
    """
    import fsspec

    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    try:
        kind = fsspec.get_filesystem_class(scheme)
        if scheme == "s3":
            stated = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = {**s3_options(), **stated}
        if scheme in WEB:
            import aiohttp

            seconds = aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS, sock_read=ANSWER_SECONDS)
            options["client_kwargs"] = {"timeout": seconds}
        found = kind(**options)
    except ImportError:
        library = LIBRARIES[scheme]
        what = f"reading it needs the library {library}. Install it: pip install {library}"
        raise OSError(errno.ENOSYS, what, f"{scheme}://") from None
    if scheme == "s3":
        found.retries = 1
    return found


def create_options(files: Any) -> dict[str, str]:
    """What has a file system upload an object only if there is none of that name; empty if it knows no such thing."""
    upload = getattr(files, "_put_file", None)
    return {"mode": "create"} if upload and "mode" in inspect.signature(upload).parameters else {}


def s3_options() -> dict[str, Any]:
    """The options of botocore."""
    return {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": ANSWER_SECONDS,
        "max_pool_connections": 2 * IN_FLIGHT,
        "retries": {"total_max_attempts": 1},
    }


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of a library stands for; None if there was no answer."""
    cause = error.__cause__ or error
    if "Payload" in type(error).__name__:
        # The body was cut off; its cause has a code of its own that the server never sent.
        return None
    for found in (cause, error):
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        # In this order: aiohttp warns of whoever asks for its `code`.
        status = found.status if hasattr(found, "status") else getattr(found, "code", None)
        if isinstance(status, int | str) and str(status).isdigit():
            return int(status)
        status = getattr(response, "status_code", None)
        if isinstance(status, int):
            return status
    if isinstance(error, PermissionError):
        return 403
    # fsspec also says that a file is missing where the connection failed, which then is the cause.
    missing = isinstance(error, FileNotFoundError) and (cause is error or isinstance(cause, ValueError))
    return 404 if missing else None


def words_of(error: BaseException) -> str:
    """What a library says of an error, in one line and without anything that may be secret."""
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    if isinstance(response, dict):
        stated = response.get("Error", {})
        text = f"{status_of(error)} {stated.get('Code', '')}: {stated.get('Message', '')}"
    else:
        text = f"{type(cause).__name__}: {cause}" if str(cause).strip() else type(cause).__name__
    return SECRETS.sub("...", " ".join(text.split()))[:200].rstrip(" .")


def _answer(request: Callable[[], list[Any]], count: int) -> list[Any]:
    """What a request gives, or its error for each of the `count` things that it was to give."""
    try:
        return request()
    except Exception as error:
        return [error] * count
