"""Sample pictures: made from prompts by a whole pipeline, and kept with what making them cost.

samples/samples.json   prompts, sampler, seconds, parameters and memory
samples/0000.png ...   one picture a prompt
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


# Images and their prompts -> how well they fit, 0 to 1; None for prompts that the scorer cannot judge.
Scorer = Callable[[Iterable[Image.Image], list[str]], float | None]


@dataclass(frozen=True)
class GeneratedImages:
    """Pictures and prompts, in one order.

    `seconds` is for one picture; `parameters` are the U-Net's; `device` names what drew them and in which
    precision; `peak_memory`, in bytes, is the most that weights and activations took together, or None
    where it was not measured.
    """

    images: list[Image.Image]
    prompts: list[str]
    seconds: float
    parameters: int
    device: str
    peak_memory: int | None = None


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn, with classifier-free guidance; `scheduler` is a key of SCHEDULERS.

    `size` (height, width) in pixels; None is the pipeline's own. Picture i is drawn with seed `seed` + i.
    """

    steps: int = 25
    guidance_scale: float = 7.0
    batch_size: int = 16
    scheduler: str = "dpm"
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    seed: int = 0


# By their usual short names; dpm is DPM-Solver++ (Lu et al. 2022), pndm what BK-SDM's figures are drawn with.
SCHEDULERS = {
    "dpm": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler-ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "pndm": PNDMScheduler,
    "unipc": UniPCMultistepScheduler,
}


@torch.inference_mode()
def generate(pipe: DiffusionPipeline, prompts: list[str], sampler: Sampler, description: str | None) -> GeneratedImages:
    """One picture a prompt. Each has a seed of its own, whatever the batch. No description, no progress bar."""
    scheduler = SCHEDULERS[sampler.scheduler].from_config(pipe.scheduler.config)
    height, width = sampler.size or (None, None)
    kept, pipe.scheduler = pipe.scheduler, scheduler
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    started = time.perf_counter()
    with tqdm(total=len(prompts), unit="picture", desc=description, disable=description is None) as progress:
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
    pipe.scheduler = kept
    seconds = (time.perf_counter() - started) / len(prompts)
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    return GeneratedImages(
        images, prompts, seconds, parameters, f"{device_name(pipe.device)}, {_name(pipe.unet.dtype)}"
    )


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def save_images(samples: GeneratedImages, sampler: Sampler, out: Path) -> None:
    """Write them, whole or not at all."""
    with atomic_directory(out) as folder:
        for i, image in enumerate(samples.images):
            image.save(folder / f"{i:04d}.png")
        about = {key: value for key, value in vars(samples).items() if key != "images"}
        write_json(folder / INDEX, {**about, "sampler": asdict(sampler)})


def load_images(folder: Path) -> tuple[GeneratedImages, Sampler]:
    about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    how = about.pop("sampler")
    sampler = Sampler(**{**how, "size": tuple(how["size"]) if how.get("size") else None})
    images = [Image.open(folder / f"{i:04d}.png").convert("RGB") for i in range(len(about["prompts"]))]
    return GeneratedImages(images, **about), sampler
