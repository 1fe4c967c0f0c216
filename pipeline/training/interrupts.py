"""Ctrl-C and a scheduler's SIGTERM as wishes: noted when they come, granted between two steps."""

from __future__ import annotations

import signal
import threading

from accelerate import Accelerator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Within the block a first signal is noted; a second one interrupts at once, as without the block."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._asked = False
        self._kept: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        # Python hands signals to the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._kept = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def agreed(self, meeting: bool) -> bool:
        """Whether all processes stop now. Several can only agree at a `meeting`, a step that all of them ask at."""
        if self._accelerator.num_processes == 1:
            return self._asked
        if not meeting:
            return False
        if self._asked:
            self._accelerator.set_trigger()
        return self._accelerator.check_trigger()
