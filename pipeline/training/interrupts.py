"""Graceful shutdown: SIGINT and SIGTERM are recorded and honoured between two steps."""

from __future__ import annotations

import signal
import threading
from typing import Any

from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within the block, a first signal is recorded. A second one interrupts at once, as without the block."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        # Only the main thread may set signal handlers.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._record) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, *_: object) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True

    def agreed(self, meeting: bool) -> bool:
        """Whether all processes stop now. Several can agree only at a `meeting`: a step at which all of them ask."""
        if self._accelerator.num_processes == 1:
            return self._requested
        if not meeting:
            return False
        if self._requested:
            self._accelerator.set_trigger()
        return self._accelerator.check_trigger()
