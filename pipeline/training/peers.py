"""The other processes of a training: agree with them, wait for one that works alone, notice that one is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from accelerate import Accelerator

from pipeline.system.device import PATIENCE
from pipeline.system.errors import UserError, first_line
from pipeline.training.accelerator import STEP_PATIENCE

# What gloo's errors, which have no class of their own, say.
LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Operation timed out", "Timed out waiting")


class Peers:
    """The processes that train together; with one process, every answer is its own.

    They meet on the CPU in groups of their own, since operations of the others are in flight on a GPU. Patience is
    short within a step and long where one of them works alone.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._step = self._alone = None
        if accelerator.num_processes > 1:
            self._step = torch.distributed.new_group(backend="gloo", timeout=STEP_PATIENCE)
            self._alone = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. All must ask at the same step."""
        if self._step is None:
            return flag
        flags = torch.tensor(flag, dtype=torch.int32)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX, group=self._step)
        return bool(flags)

    def wait(self) -> None:
        """Wait for a process that works alone, such as the main one while it saves."""
        if self._alone is not None:
            torch.distributed.barrier(group=self._alone)

    @contextmanager
    def told_when_lost(self) -> Iterator[None]:
        """Raise UserError in place of the network's error when another process died or does not answer."""
        try:
            yield
        except RuntimeError as error:
            if self._step is None or not is_network_error(error):
                raise
            # gloo goes on with guesses.
            reason = first_line(error).partition(". ")[0]
            raise UserError(
                f"another process of this training ended or did not answer ({reason}). See what it printed. "
                "Then rerun the same command to resume from the last checkpoint."
            ) from error


def is_network_error(error: RuntimeError) -> bool:
    """Whether communication between processes failed."""
    return isinstance(error, torch.distributed.DistError) or any(text in str(error) for text in LOST)
