"""The demo teacher's training loop: settings, optimiser, learning rate, averaged weights and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from pipeline.models.bundled import TEACHER
from pipeline.system.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(Settings):
    """How the teacher is trained. Raises UserError at construction for a setting out of its range."""

    out: Path = option(TEACHER, "Folder to write the pipeline to.")
    work: Path = option(Path("work/demo-teacher"), "Folder for scenes, latents and checkpoints.")
    scenes: int = option(24000, "Scenes to train on.", ge=1)
    seed: int = option(0, "Seed for scenes, weights and noise.", ge=0)
    autoencoder_steps: int = option(3800, "Training steps of the autoencoder.", ge=1)
    autoencoder_batch: int = option(16, "Images per step of the autoencoder.", ge=1)
    autoencoder_learning_rate: float = option(2e-3, "Peak learning rate of the autoencoder.", gt=0)
    kl_weight: float = option(2e-4, "Loss weight of the latents' divergence from N(0, 1).", ge=0)
    text_steps: int = option(1200, "Training steps of the text encoder.", ge=1)
    text_batch: int = option(128, "Captions per step of the text encoder.", ge=1)
    text_learning_rate: float = option(1e-3, "Peak learning rate of the text encoder.", gt=0)
    init_from: Path | None = option(None, "Pipeline whose autoencoder is kept and whose U-Net is trained further.")
    steps: int = option(7300, "Training steps of the U-Net.", ge=1)
    batch: int = option(32, "Latents per step of the U-Net.", ge=1)
    learning_rate: float = option(1.2e-3, "Peak learning rate of the U-Net.", gt=0)
    caption_dropout: float = option(0.1, "Share of captions left empty for classifier-free guidance.", ge=0, le=1)
    min_snr_gamma: float = option(5.0, "Signal-to-noise ratio above which timesteps get less weight.", gt=0)
    ema_decay: float = option(0.998, "Decay of the averaged weights.", ge=0, le=1)
    checkpoint_every: int = option(250, "Steps between checkpoints.", ge=1)
    evaluate: int = option(500, "Captions per split to generate and judge at the end; 0 skips this.", ge=0)


class Trainer:
    """Optimiser, learning rate, averaged weights and checkpoints for training one module.

    The learning rate warms up over 100 steps and falls to zero along a half cosine. An existing checkpoint in `file`
    is resumed.
    """

    def __init__(
        self, module: nn.Module, file: Path, steps: int, learning_rate: float, settings: TeacherSettings
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
