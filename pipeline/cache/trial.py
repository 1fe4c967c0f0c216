"""A short trial of the teacher on this machine, so that a plan can say how long the rounds will take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from pipeline.cache.targets import Teacher, compress_targets, run_teacher
from pipeline.core.taps import Taps
from pipeline.models.shapes import TeacherShapes
from pipeline.system.device import is_accelerator
from shards.reader import StoredEntry, StoredTensor
from shards.schema import LATENTS, PROMPT_EMBEDS, image_key

SECONDS, BATCHES = 10.0, 3


@dataclass(frozen=True)
class Trial:
    """Seconds an entry: until the answer is there (draws, forward pass, quantising), and of compressing it."""

    asking: float
    compressing: float
    beside: bool

    def seconds(self, entries: int) -> float:
        """How long so many entries take: where a device leaves the CPU free, the slower of the two decides."""
        each = max(self.asking, self.compressing) if self.beside else self.asking + self.compressing
        return entries * each


def try_teacher(
    unet: UNet2DConditionModel, shapes: TeacherShapes, taps: dict[str, Any], codec: str, snr_db: float, batch_size: int
) -> Trial:
    """Let the teacher answer for random pictures: after one batch to warm up, at least BATCHES and SECONDS of them.

    `taps` as in a cache's spec: `shape` and `stride` by name.
    """
    spec = {
        "seed": 0,
        "strata": 1,
        "noise_offset": 0.0,
        "input_perturbation": 0.0,
        "uncond_fraction": 0.0,
        "codec": {"name": codec, "snr_db": snr_db},
        "taps": taps,
    }
    # The schedule has no part in how long it takes.
    alphas_cumprod = torch.linspace(0.99, 0.01, 1000, device=unet.device)
    teacher = Teacher(unet, Taps(unet, taps), alphas_cumprod, np.zeros(shapes.prompt_embeds, np.float16))
    samples = [random_sample(index, shapes) for index in range(batch_size)]
    asking, compressing, batches = 0.0, 0.0, -1
    while batches < BATCHES or asking + compressing < SECONDS:
        started = time.perf_counter()
        answer = run_teacher(samples, 0, spec, teacher)
        computed = time.perf_counter()
        compress_targets(answer)
        batches += 1
        if batches:
            asking += computed - started
            compressing += time.perf_counter() - computed
    teacher.taps.remove()
    entries = batches * batch_size
    return Trial(asking / entries, compressing / entries, is_accelerator(unet.device))


def random_sample(index: int, shapes: TeacherShapes) -> StoredEntry:
    """A picture of Gaussian latents and prompt embeddings, as `encode` would have stored it."""
    draw = np.random.default_rng(index)
    tensors = {
        name: StoredTensor(draw.standard_normal(shape, np.float32).astype(np.float16))
        for name, shape in ((LATENTS, shapes.latents), (PROMPT_EMBEDS, shapes.prompt_embeds))
    }
    return StoredEntry(image_key(index), {"source_id": str(index)}, tensors)
