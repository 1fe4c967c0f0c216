"""Generating images from prompts with a complete pipeline, and storing them with what generating them cost.

samples/samples.json   prompts, sampler, seconds, parameters and memory
samples/0000.png ...   one image per prompt
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from tqdm import tqdm

from pipeline.system.device import DTYPES, device_name
from shards.files import atomic_directory, write_json

SAMPLES = "samples"
INDEX = "samples.json"
# By their usual short names; dpm is DPM-Solver++ (Lu et al. 2022), and BK-SDM's published results use pndm.
SCHEDULERS = {
    "dpm": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "pndm": PNDMScheduler,
    "unipc": UniPCMultistepScheduler,
}

# Images and their prompts -> how well they match, 0 to 1; None for prompts that the scorer cannot judge.
Scorer = Callable[[Iterable[Image.Image], list[str]], float | None]


@dataclass(frozen=True)
class GeneratedImages:
    """Images and their prompts, in the same order.

    `seconds` is per image and `parameters` counts the U-Net's. `device` names the device and precision used.
    `peak_memory`, in bytes, is the peak of weights and activations together, or None if it was not measured.
    """

    images: list[Image.Image]
    prompts: list[str]
    seconds: float
    parameters: int
    device: str
    peak_memory: int | None = None


@dataclass(frozen=True)
class Sampler:
    """How images are generated, with classifier-free guidance; `scheduler` is a key of SCHEDULERS.

    `size` is (height, width) in pixels; None is the pipeline's default. Image i has the seed `seed` + i.
    """

    steps: int = 25
    guidance_scale: float = 7.0
    batch_size: int = 16
    scheduler: str = "dpm"
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    seed: int = 0


@torch.inference_mode()
def generate(pipe: DiffusionPipeline, prompts: list[str], sampler: Sampler, description: str | None) -> GeneratedImages:
    """Generate one image per prompt. Each has its own seed, whatever the batch size.

    `description` labels the progress bar; None hides the bar.
    """
    scheduler = SCHEDULERS[sampler.scheduler].from_config(pipe.scheduler.config)
    height, width = sampler.size or (None, None)
    original_scheduler, pipe.scheduler = pipe.scheduler, scheduler
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    started = time.perf_counter()
    with tqdm(total=len(prompts), unit="image", desc=description, disable=description is None) as progress:
        for first in range(0, len(prompts), sampler.batch_size):
            chunk = prompts[first : first + sampler.batch_size]
            negative = None if sampler.negative_prompt is None else [sampler.negative_prompt] * len(chunk)
            generators = [torch.Generator().manual_seed(sampler.seed + first + i) for i in range(len(chunk))]
            images += pipe(
                chunk,
                height,
                width,
                num_inference_steps=sampler.steps,
                guidance_scale=sampler.guidance_scale,
                negative_prompt=negative,
                generator=generators,
            ).images
            progress.update(len(chunk))
    pipe.scheduler = original_scheduler
    seconds = (time.perf_counter() - started) / len(prompts)
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    device = f"{device_name(pipe.device)}, {_dtype_name(pipe.unet.dtype)}"
    return GeneratedImages(images, prompts, seconds, parameters, device)


def save_images(samples: GeneratedImages, sampler: Sampler, out: Path) -> None:
    """Write the images and their index to a new directory, atomically."""
    with atomic_directory(out) as folder:
        for i, image in enumerate(samples.images):
            image.save(folder / f"{i:04d}.png")
        index = {key: value for key, value in vars(samples).items() if key != "images"}
        write_json(folder / INDEX, {**index, "sampler": asdict(sampler)})


def load_images(folder: Path) -> tuple[GeneratedImages, Sampler]:
    """Read what `save_images` wrote."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    options = index.pop("sampler")
    sampler = Sampler(**{**options, "size": tuple(options["size"]) if options.get("size") else None})
    images = [Image.open(folder / f"{i:04d}.png").convert("RGB") for i in range(len(index["prompts"]))]
    return GeneratedImages(images, **index), sampler


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
