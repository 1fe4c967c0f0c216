"""Training batches as an online trainer makes them, the teacher asked at every step: for `distill.batches`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor

from pipeline.commands import distill
from pipeline.core.diffusion import add_noise
from pipeline.core.taps import Taps
from pipeline.models.encoders import encode_images, latents_shape
from pipeline.models.families.sd import PROMPT_EMBEDS, SD
from pipeline.models.load import load_base, load_unet
from pipeline.models.students import teacher_taps
from shards.dataset import Batch, CacheDataset, EpochBatches, Feature
from shards.reader import ShardSet
from shards.schema import LATENTS

Inputs = Callable[[list[int]], tuple[Tensor, Tensor]]
"""Pictures by number -> their latents (B, C, H, W) and prompt embeddings (B, L, D), on the teacher's device."""


def stored_inputs(latents: ShardSet, device: torch.device) -> Inputs:
    """Inputs that `encode` wrote: what the seeds' trainers do not have."""

    def read(indices: list[int]) -> tuple[Tensor, Tensor]:
        samples = [latents.read(i, (LATENTS, PROMPT_EMBEDS)) for i in indices]
        tensors = (
            torch.stack([torch.from_numpy(sample.tensors[name].values) for sample in samples])
            for name in (LATENTS, PROMPT_EMBEDS)
        )
        return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)

    return read


def encoded_inputs(folder: Path, resolution: int, captions: list[str], device: torch.device, dtype) -> Inputs:
    """Inputs that the VAE and the text encoder compute at every visit, of pixels that are ready in memory."""
    base = load_base(folder).to(device, dtype)
    shape = latents_shape(base.vae, resolution)
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (len(captions), resolution, resolution, 3), dtype=torch.uint8, generator=draw)

    def compute(indices: list[int]) -> tuple[Tensor, Tensor]:
        latents = encode_images(base.vae, pixels[indices], torch.randn(len(indices), *shape, generator=draw))
        return latents, SD.encode_prompts(base, [captions[i] for i in indices])[PROMPT_EMBEDS]

    return compute


class OnlineBatches:
    """A callable like `distill.batches`: noise and timesteps drawn anew at each visit, features exact.

    The teacher computes in `dtype`. Its weights are float32 all the same, as in distill-sd, which leaves both U-Nets to
    accelerate; or, with `cast_teacher`, of that dtype, as in BK-SDM.
    """

    def __init__(
        self,
        folder: Path,
        level: str,
        images: int,
        inputs: Inputs,
        device: torch.device,
        dtype: torch.dtype,
        cast_teacher: bool = False,
    ) -> None:
        teacher, weights = load_unet(folder, None), dtype if cast_teacher else torch.float32
        self.teacher = teacher.to(device, weights, memory_format=torch.channels_last).eval().requires_grad_(False)
        self.taps = Taps(teacher, teacher_taps((level,)))
        self.images, self.inputs, self.compute_dtype = images, inputs, dtype

    @torch.no_grad()
    def __call__(
        self, settings: distill.DistillSettings, dataset: CacheDataset, accelerator: Accelerator, position: int
    ) -> Iterator[Batch]:
        noise_scheduler = DDPMScheduler.from_config(dataset.spec["noise_scheduler"])
        device, dtype = self.teacher.device, self.teacher.dtype
        alphas_cumprod = noise_scheduler.alphas_cumprod.to(device)
        draw = torch.Generator(device).manual_seed(settings.seed)
        for indices in EpochBatches(self.images, settings.train_batch_size, settings.seed, start=position):
            latents, prompt_embeds = self.inputs(indices)
            noise = torch.randn(latents.shape, generator=draw, device=device).half()
            timesteps = torch.randint(len(alphas_cumprod), (len(indices),), generator=draw, device=device)
            noisy = add_noise(latents, noise, timesteps, alphas_cumprod).to(dtype)
            autocast = torch.autocast(device.type, self.compute_dtype, enabled=dtype != self.compute_dtype)
            with autocast, self.taps.recording() as recorded:
                teacher_pred = self.teacher(noisy, timesteps, encoder_hidden_states=prompt_embeds.to(dtype)).sample
            nowhere = (0,) * len(indices)
            features = {tap: Feature(values, nowhere, nowhere, 1) for tap, values in recorded.items()}
            keys = tuple(map(str, indices))
            yield Batch(keys, timesteps, latents, noise, {PROMPT_EMBEDS: prompt_embeds}, teacher_pred, features)
