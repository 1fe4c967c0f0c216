"""Training metrics: means of the loss terms, in the progress bar and in metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipeline.system.jsonl import read_jsonl
from shards.files import write_bytes


class SeenBatch(NamedTuple):
    """The number of optimiser steps before it, the keys of its entries, and its total loss, a scalar on the device."""

    step: int
    keys: tuple[str, ...]
    total: Tensor


class Metrics:
    """Sums loss terms on the device and reads them only when it logs.

    A resumed run drops the lines of the steps that it is about to repeat, and goes on with the sums of a checkpoint
    between two lines, so its lines are those of a run that was not stopped.
    """

    def __init__(
        self,
        path: Path,
        accelerator: Accelerator,
        name: str,
        step: int,
        max_train_steps: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._accelerator = accelerator
        self._step = step
        self._sums: dict[str, Tensor] = {}
        self._summed, self._seconds = 0, 0.0
        if state:
            self._sums = {name: value.to(accelerator.device) for name, value in state["sums"].items()}
            self._summed = state["batches"]
            self._seconds = state.get("seconds", 0.0)
        self._batches: list[SeenBatch] = []
        self._since = self._started = time.monotonic()
        main = accelerator.is_main_process
        self._bar = tqdm(total=max_train_steps, initial=step, unit="step", desc=name, disable=not main)
        self._file = None
        if main:
            write_bytes(path, "".join(_lines_up_to(path, step)).encode())
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the sums since the last line: their means over processes. All must call this."""
        sums = {name: self._accelerator.reduce(value, reduction="mean").cpu() for name, value in self._sums.items()}
        return {"sums": sums, "batches": self._summed, "seconds": self._elapsed()}

    def add(self, terms: dict[str, Tensor], total: Tensor, keys: tuple[str, ...]) -> None:
        """Add a batch's terms, float32 scalars on the device, and the keys of its entries. Does not synchronise."""
        for name, term in {"loss": total, **terms}.items():
            value = term.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._summed += 1
        self._batches.append(SeenBatch(self._step, keys, total.detach()))

    def advance(self) -> None:
        self._step += 1
        self._bar.update(1)

    def first_not_finite(self) -> SeenBatch | None:
        """This process's first batch since the last line whose total is NaN or Inf."""
        if not self._batches:
            return None
        finite = torch.isfinite(torch.stack([batch.total for batch in self._batches])).tolist()
        return next((batch for batch, good in zip(self._batches, finite, strict=True) if not good), None)

    def means(self) -> dict[str, float]:
        """The terms' means since the last line, over batches and processes. All processes must call this."""
        stacked = torch.stack(list(self._sums.values())) / self._summed
        return dict(zip(self._sums, self._accelerator.reduce(stacked, reduction="mean").tolist(), strict=True))

    def log(self, step: int, means: dict[str, float], **values: float) -> None:
        """Write a line: `means`, `values` and the speed. The next line's means begin here."""
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        line = {"step": step, **means, **values}
        entries = sum(len(batch.keys) for batch in self._batches)
        line["samples_per_second"] = round(entries * self._accelerator.num_processes / seconds, 3)
        line["seconds"] = round(self._elapsed(), 3)
        self._sums, self._summed, self._batches = {}, 0, []
        self._write(line)
        shown: dict[str, float] = {k: line[k] for k in ("loss", "task", "output") if k in line}
        features = [mean for name, mean in line.items() if name.startswith("feature/")]
        if features:
            shown["feature"] = sum(features)
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})

    def note(self, step: int, values: dict[str, float]) -> None:
        """Write a line of its own. The main process calls this, outside the means of the steps."""
        self._write({"step": step, **values})
        # What it took is not the speed of the training.
        self._since = time.monotonic()

    def _write(self, line: dict[str, float]) -> None:
        if self._file:
            self._file.write(json.dumps({k: v if math.isfinite(v) else str(v) for k, v in line.items()}) + "\n")
            self._file.flush()
        self._accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))

    def _elapsed(self) -> float:
        """The seconds that the training has taken, over all its runs."""
        return self._seconds + time.monotonic() - self._started

    def close(self) -> None:
        self._bar.close()
        if self._file:
            self._file.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    """The lines of the steps up to `step`, as they were written. Others, and broken ones, are left out."""
    steps = [(line.get("step"), line) for line in read_jsonl(path)]
    return [json.dumps(line) + "\n" for number, line in steps if isinstance(number, int) and number <= step]
