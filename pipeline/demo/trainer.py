"""The demo teacher's training loop: optimiser, learning rate, averaged weights and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from pipeline.settings.demo_teacher import DemoTeacherSettings


class Trainer:
    """Optimiser, learning rate, averaged weights and checkpoints for training one module.

    The learning rate warms up over 100 steps and falls to zero along a half cosine. An existing checkpoint in `file`
    is resumed.
    """

    def __init__(
        self, module: nn.Module, file: Path, steps: int, learning_rate: float, settings: DemoTeacherSettings
    ) -> None:
        self.module, self.file, self.steps, self.settings = module, file, steps, settings
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate_factor)
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}
        self.step = 0
        if file.exists():
            self._restore()

    def _learning_rate_factor(self, step: int) -> float:
        return min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.steps)))

    def remaining(self, name: str) -> Iterator[int]:
        """Yield the numbers of the remaining steps, with a progress bar. Each step reseeds torch by its number."""
        with tqdm(total=self.steps, initial=self.step, desc=name, unit="step", mininterval=5) as bar:
            while self.step < self.steps:
                torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
                yield self.step
                bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
                bar.update()
        self._save()

    def update(self, loss: torch.Tensor) -> None:
        """Take one optimiser step on the scalar `loss`."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.loss = loss.item()
        self.step += 1
        # Early averages decay faster, so that they do not keep the initial weights for long.
        decay = min(self.settings.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.module.state_dict().values()), 1 - decay)
        if self.step % self.settings.checkpoint_every == 0:
            self._save()

    def _save(self) -> None:
        state = {
            "step": self.step,
            "module": self.module.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
        }
        unfinished = self.file.with_suffix(".part")
        torch.save(state, unfinished)
        unfinished.replace(self.file)

    def _restore(self) -> None:
        state = torch.load(self.file, map_location="cpu", weights_only=True)
        self.step, self.average = state["step"], state["average"]
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
