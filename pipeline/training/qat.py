"""Quantisation-aware training: the student computes with fake quantisers (see `pipeline.models.fake_quant`), so that
it learns to do so well. Validation, held-out errors and the report are of that student.

The ranges of its layers' inputs are measured before the first step, on the first entries of the training, and stay. All
processes measure them on the same entries, and a checkpoint holds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel

from pipeline.core.diffusion import add_noise
from pipeline.models.fake_quant import add_quantisers, load_quantisers, measuring_ranges
from pipeline.models.families import Family, denoise
from pipeline.settings.training import Chosen
from pipeline.system.echo import say
from pipeline.training.loader import OneProcess
from pipeline.training.transform import Transform
from shards.dataset import Batch

# Their timesteps are spread over the schedule. With more, the largest values hardly grow.
ENTRIES = 64


@dataclass(frozen=True)
class Qat(Transform):
    """Trains the student with the quantisers of `format`, a key of QAT_BITS.

    `try_out` runs a student, in evaluation mode, on the entries that its ranges are measured on.
    """

    format: str
    try_out: Callable[[UNet2DConditionModel], None]

    def prepare(self, student: UNet2DConditionModel) -> None:
        """Add the quantisers, with ranges of this student. Raises UserError if it gives NaN or Inf."""
        add_quantisers(student, self.format)
        with measuring_ranges(student):
            self.try_out(student)

    def load_weights(self, initial: Callable[[], UNet2DConditionModel], folder: Path) -> UNet2DConditionModel:
        student = super().load_weights(initial, folder)
        load_quantisers(student, folder)
        return student


def qat_of(
    settings: Chosen,
    accelerator: Accelerator,
    family: Family,
    noise_scheduler: DDPMScheduler,
    read: Callable[[Chosen, OneProcess], Generator[Batch, None, None]],
    there: int | None = None,
) -> Transform:
    """The transform of --qat; without it one that changes nothing. `read` gives batches from the first entry of the
    training on, to the process that it is told; if only some of the first entries are there yet, `there` is how many.
    """
    if settings.qat is None:
        return Transform()
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(accelerator.device)

    def try_out(student: UNet2DConditionModel) -> None:
        size = settings.train_batch_size
        batches = math.ceil(ENTRIES / size)
        if there is not None:
            batches = max(1, min(batches, there // size))
        if accelerator.is_main_process:
            say(f"--qat {settings.qat}: measuring the ranges of the layers' inputs on {batches * size} entries")
        student.to(accelerator.device).eval()
        stream = read(replace(settings, dataloader_num_workers=0), OneProcess(accelerator.device))
        with closing(stream), torch.no_grad(), accelerator.autocast():
            for batch in islice(stream, batches):
                noisy = add_noise(batch.latents, batch.added_noise, batch.timesteps, alphas_cumprod)
                denoise(student, noisy, batch.timesteps, batch.conditioning, family)

    return Qat(settings.qat, try_out)
