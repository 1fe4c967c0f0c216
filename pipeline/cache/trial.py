"""A short trial of the teacher on this machine, to estimate how long the rounds will take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm

from pipeline.cache.targets import Image, Teacher, compress_targets, run_teacher
from pipeline.core.taps import Taps
from pipeline.models.families import Family
from pipeline.models.shapes import TeacherShapes
from pipeline.system.device import is_accelerator
from shards.reader import StoredEntry, StoredTensor
from shards.schema import LATENTS, image_key, stated_shapes

# The least that is timed, after one batch of warm-up.
SECONDS, BATCHES = 10.0, 3


@dataclass(frozen=True)
class Trial:
    """Seconds per entry: `running` the teacher (random draws, forward pass, quantisation) and `compressing` its taps.

    `overlaps` says whether the two run at the same time.
    """

    running: float
    compressing: float
    overlaps: bool

    def seconds(self, entries: int) -> float:
        """The seconds that so many entries take. If the two overlap, the slower one decides."""
        per_entry = max(self.running, self.compressing) if self.overlaps else self.running + self.compressing
        return entries * per_entry


def try_teacher(
    unet: UNet2DConditionModel,
    family: Family,
    shapes: TeacherShapes,
    taps: dict[str, Any],
    codec: str,
    snr_db: float,
    batch_size: int,
) -> Trial:
    """Run the teacher on random images: after one batch of warm-up, at least BATCHES batches and SECONDS seconds.

    `taps` is as in a cache's spec: `shape` and `stride` by name.
    """
    spec = {
        "seed": 0,
        "strata": 1,
        "noise_offset": 0.0,
        "input_perturbation": 0.0,
        "uncond_fraction": 0.0,
        "codec": {"name": codec, "snr_db": snr_db},
        "taps": taps,
        "latents": stated_shapes(shapes.latents, shapes.conditioning),
    }
    # The noise schedule does not change the time.
    alphas_cumprod = torch.linspace(0.99, 0.01, 1000, device=unet.device)
    teacher = Teacher(unet, family, Taps(unet, taps), alphas_cumprod, {}, identities(taps, unet.device))
    images = [random_image(index, shapes) for index in range(batch_size)]
    running, compressing, batches = 0.0, 0.0, -1
    with tqdm(unit="batch", desc="trial") as progress:
        while batches < BATCHES or running + compressing < SECONDS:
            started = time.perf_counter()
            targets = run_teacher(images, 0, spec, teacher)
            computed = time.perf_counter()
            compress_targets(targets)
            batches += 1
            if batches:
                running += computed - started
                compressing += time.perf_counter() - computed
            progress.update()
    teacher.taps.remove()
    entries = batches * batch_size
    return Trial(running / entries, compressing / entries, is_accelerator(unet.device))


def identities(taps: dict[str, Any], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Calibrations that change nothing and take as long as any."""
    return {
        tap: (torch.zeros(stated["shape"][0], device=device), torch.eye(stated["shape"][0], device=device))
        for tap, stated in taps.items()
    }


def random_image(index: int, shapes: TeacherShapes) -> Image:
    """Gaussian latents and conditioning, as `encode` would have stored them for an image."""
    generator = np.random.default_rng(index)
    tensors = {
        name: StoredTensor(generator.standard_normal(shape, np.float32).astype(np.float16))
        for name, shape in {LATENTS: shapes.latents, **shapes.conditioning}.items()
    }
    return Image(StoredEntry(image_key(index), {"source_id": str(index)}, tensors), 0)
