"""Training metrics: means of the loss terms, in the progress bar and in metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from shards.files import write_bytes


class Metrics:
    """Sums loss terms on the device and reads them only when it logs.

    A resumed run drops the lines of the steps that it is about to repeat.
    """

    def __init__(self, path: Path, accelerator: Accelerator, name: str, step: int, max_train_steps: int) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}
        self._batches: list[tuple[tuple[str, ...], Tensor]] = []
        self._since = time.monotonic()
        main = accelerator.is_main_process
        self._bar = tqdm(total=max_train_steps, initial=step, unit="step", desc=name, disable=not main)
        self._file = None
        if main:
            kept = _lines_up_to(path, step)
            write_bytes(path, "".join(kept).encode())
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, terms: dict[str, Tensor], total: Tensor, keys: tuple[str, ...]) -> None:
        """Add a batch's terms, float32 scalars on the device, and the keys of its entries. Does not synchronise."""
        for name, term in {"loss": total, **terms}.items():
            value = term.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._batches.append((keys, total.detach()))

    def advance(self) -> None:
        self._bar.update(1)

    def first_keys_not_finite(self) -> tuple[str, ...]:
        """The keys of this process's first batch since the last line whose total is NaN or Inf; () if there is none."""
        return next((keys for keys, total in self._batches if not math.isfinite(total.item())), ())

    def log(self, step: int, **values: float) -> dict[str, float]:
        """Write and return a line: `values`, and the terms' means since the last line, over batches and processes."""
        names = list(self._sums)
        stacked = torch.stack([self._sums[name] for name in names]) / len(self._batches)
        means = self._accelerator.reduce(stacked, reduction="mean").tolist()
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        line = {"step": step, **dict(zip(names, means, strict=True)), **values}
        entries = sum(len(keys) for keys, _ in self._batches)
        line["samples_per_second"] = round(entries * self._accelerator.num_processes / seconds, 3)
        self._sums, self._batches = {}, []
        if self._file:
            self._file.write(json.dumps({k: v if math.isfinite(v) else str(v) for k, v in line.items()}) + "\n")
            self._file.flush()
        self._accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step)
        feature = sum(mean for name, mean in line.items() if name.startswith("feature/"))
        shown = {k: line[k] for k in ("loss", "task", "output") if k in line} | {"feature": feature}
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()})
        return line

    def close(self) -> None:
        self._bar.close()
        if self._file:
            self._file.close()


def _lines_up_to(path: Path, step: int) -> list[str]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A crash may have truncated the last line.
    complete = [line for line in lines if line.endswith("}\n")]
    return [line for line in complete if json.loads(line)["step"] <= step]
