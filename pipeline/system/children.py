"""Child processes that end with the work that they were started for, and leave signals to the process that did.

A child of multiprocessing's forkserver is not a child of the process that asked for it, so the system does not say when
that one dies. A pipe does: its reading end comes to its end when the last writing end is closed, by hand or by death.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext, ForkServerContext, ForkServerProcess
from multiprocessing.forkserver import ensure_running
from multiprocessing.queues import Queue
from types import ModuleType
from typing import Any

# Ctrl-C, a scheduler and a closed terminal tell them to every process of a group.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Bound:
    """What a child calls first. From then on it ignores SIGNALS, and ends when the pipe does or a thread of it fails.

    Threads hand its results over. One that fails would only print why, and the result would be waited for in vain.
    """

    pipe: Connection

    def __call__(self, *_: object) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        threading.excepthook = lambda failed: _fail(failed.exc_value)
        sys.excepthook = lambda _kind, error, _trace: _fail(error)
        Queue._on_queue_feeder_error = staticmethod(lambda error, _result: _fail(error))  # type: ignore[attr-defined]
        threading.Thread(target=self._end_with_pipe, daemon=True).start()

    def _end_with_pipe(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self.pipe.recv_bytes()
        os._exit(1)


def _fail(error: BaseException | None) -> None:
    sys.stderr.write(f"process {os.getpid()} ends: {type(error).__name__}: {error}\n")
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def bound_children() -> Iterator[tuple[Bound, Callable[[], None]]]:
    """Yield what children must call first, and a function that ends them. They end with the block at the latest."""
    reading, writing = multiprocessing.Pipe(duplex=False)
    try:
        yield Bound(reading), writing.close
    finally:
        writing.close()
        reading.close()


class _Process(ForkServerProcess):
    """A child that does not import `__main__`. Nothing that it is given comes from there, and a script that calls the
    stages without a guard would run again in each child."""

    @staticmethod
    def _Popen(process: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(process)  # type: ignore[attr-defined]
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process


def forkserver(*preload: str) -> BaseContext:
    """multiprocessing's context of that name, with a server that signals to this process's group do not reach.

    The server imports the modules in `preload`, for all its children. Neither imports the program's `__main__`. It is
    started here if it is not running.
    """
    context: Any = _Context()
    context.set_forkserver_preload(list(preload))
    # Starting the tracker unblocks signals.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
