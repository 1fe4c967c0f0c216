"""Graceful shutdown: SIGINT, SIGTERM and SIGHUP are recorded and honoured between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

from pipeline.system.children import SIGNALS

# A terminal, a launcher and a scheduler may each tell one request, to the same process.
SAME_REQUEST = 1.0


class Interrupts:
    """Within the block, the first signal is recorded. A second Ctrl-C, SAME_REQUEST later or more, interrupts at once.

    A signal that is ignored, as SIGHUP is under nohup, stays so.
    """

    def __init__(self) -> None:
        self._requested_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        # Only the main thread may set signal handlers.
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._record) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at = now
        elif number == signal.SIGINT and now - self._requested_at > SAME_REQUEST:
            raise KeyboardInterrupt

    @property
    def requested(self) -> bool:
        """Whether this process was told to stop."""
        return self._requested_at is not None
