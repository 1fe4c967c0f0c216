"""The options of `demo-teacher`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.models.bundled import BUNDLED
from pipeline.system.options import MAX_BATCH
from pipeline.system.settings import Settings, option


@dataclass(frozen=True, kw_only=True)
class DemoTeacherSettings(Settings):
    """Retrain one of the demo's bundled teachers. This takes hours on a CPU and is needed only to change it."""

    command: ClassVar[str] = "demo-teacher"
    work_module: ClassVar[str] = "pipeline.commands.demo_teacher"
    has_plan: ClassVar[bool] = True

    name: str = option("demo", "The teacher to train.", choices=tuple(BUNDLED))
    out: Path | None = option(None, "Folder to write the pipeline to; by default the bundled teacher's.")
    work: Path = option(Path("work/demo-teacher"), "Folder for scenes, latents and checkpoints.")
    scenes: int = option(24000, "Scenes to train on.", ge=1)
    seed: int = option(0, "Seed for scenes, weights and noise.", ge=0)
    autoencoder_steps: int = option(3800, "Training steps of the autoencoder.", ge=1)
    autoencoder_batch: int = option(16, "Images per step of the autoencoder.", ge=1, le=MAX_BATCH)
    autoencoder_learning_rate: float = option(2e-3, "Peak learning rate of the autoencoder.", gt=0)
    kl_weight: float = option(2e-4, "Loss weight of the latents' divergence from N(0, 1).", ge=0)
    text_steps: int = option(1200, "Training steps of the text encoder.", ge=1)
    text_batch: int = option(128, "Captions per step of the text encoder.", ge=1, le=MAX_BATCH)
    text_learning_rate: float = option(1e-3, "Peak learning rate of the text encoder.", gt=0)
    init_from: Path | None = option(None, "Demo teacher whose autoencoder is kept and whose U-Net is trained further.")
    steps: int = option(7300, "Training steps of the U-Net.", ge=1)
    batch: int = option(32, "Latents per step of the U-Net.", ge=1, le=MAX_BATCH)
    learning_rate: float = option(1.2e-3, "Peak learning rate of the U-Net.", gt=0)
    caption_dropout: float = option(0.1, "Share of captions left empty for classifier-free guidance.", ge=0, le=1)
    min_snr_gamma: float = option(5.0, "Signal-to-noise ratio above which timesteps get less weight.", gt=0)
    ema_decay: float = option(0.998, "Decay of the averaged weights.", ge=0, le=1)
    checkpoint_every: int = option(250, "Steps between checkpoints.", ge=1)
    evaluate: int = option(500, "Captions per split to generate and judge at the end; 0 skips this.", ge=0)
