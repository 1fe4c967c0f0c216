"""Sample pictures: made from prompts by a whole pipeline, and kept with what making them cost.

samples/samples.json   prompts, seeds, sampler, seconds and parameters
samples/0000.png ...   one picture a prompt
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from PIL import Image
from tqdm import tqdm

from pipeline.demo import oracle
from shards.files import atomic_directory, write_json

SAMPLES = "samples"
INDEX = "samples.json"


@dataclass(frozen=True)
class Samples:
    """Pictures and prompts, in one order; picture i was drawn with seed i. `seconds` is for one picture."""

    images: list[Image.Image]
    prompts: list[str]
    seconds: float
    parameters: int
    device: str


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn: DPM-Solver++ (Lu et al. 2022) with classifier-free guidance."""

    steps: int = 25
    guidance_scale: float = 7.0
    batch_size: int = 16


@torch.inference_mode()
def draw_samples(pipe: DiffusionPipeline, prompts: list[str], sampler: Sampler, description: str) -> Samples:
    """One picture a prompt, at the pipeline's own size. Each has a seed of its own, whatever the batch."""
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    kept, pipe.scheduler = pipe.scheduler, scheduler
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    started = time.perf_counter()
    with tqdm(total=len(prompts), unit="picture", desc=description) as progress:
        for first in range(0, len(prompts), sampler.batch_size):
            chunk = prompts[first : first + sampler.batch_size]
            generators = [torch.Generator().manual_seed(first + i) for i in range(len(chunk))]
            images += pipe(
                chunk, num_inference_steps=sampler.steps, guidance_scale=sampler.guidance_scale, generator=generators
            ).images
            progress.update(len(chunk))
    pipe.scheduler = kept
    seconds = (time.perf_counter() - started) / len(prompts)
    return Samples(images, prompts, seconds, sum(p.numel() for p in pipe.unet.parameters()), str(pipe.device))


def save_samples(samples: Samples, sampler: Sampler, out: Path) -> None:
    """Write them, whole or not at all."""
    with atomic_directory(out) as folder:
        for i, image in enumerate(samples.images):
            image.save(folder / f"{i:04d}.png")
        about = {key: value for key, value in vars(samples).items() if key != "images"}
        write_json(folder / INDEX, {**about, "sampler": asdict(sampler)})


def load_samples(folder: Path) -> tuple[Samples, Sampler]:
    about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    sampler = Sampler(**about.pop("sampler"))
    images = [Image.open(folder / f"{i:04d}.png").convert("RGB") for i in range(len(about["prompts"]))]
    return Samples(images, **about), sampler


def oracle_score(samples: Samples) -> float | None:
    """The share of the prompts' facts that hold in the pictures, 0 to 1; None unless all are the demo's scenes."""
    try:
        verdicts = [oracle.score(i, p) for i, p in zip(samples.images, samples.prompts, strict=True)]
    except ValueError:
        return None
    return sum(verdict.score for verdict in verdicts) / len(verdicts)
