"""Sample pictures: made from prompts by a whole pipeline, and kept with what making them cost.

samples/samples.json   prompts, sampler, seconds, parameters and memory
samples/0000.png ...   one picture a prompt
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
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
from torch import nn
from tqdm import tqdm

from pipeline.demo import oracle
from pipeline.models.load import DTYPES, device_name, load_base, open_unet
from pipeline.system.memory import give_back_freed_memory
from shards.files import atomic_directory, write_json

SAMPLES = "samples"
INDEX = "samples.json"


@dataclass(frozen=True)
class Samples:
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
def draw_samples(pipe: DiffusionPipeline, prompts: list[str], sampler: Sampler, description: str | None) -> Samples:
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
                chunk, height, width, num_inference_steps=sampler.steps, guidance_scale=sampler.guidance_scale,
                negative_prompt=negative, generator=generators,
            ).images  # fmt: skip
            progress.update(len(chunk))
    pipe.scheduler = kept
    seconds = (time.perf_counter() - started) / len(prompts)
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    return Samples(images, prompts, seconds, parameters, f"{device_name(pipe.device)}, {_name(pipe.unet.dtype)}")


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class Model:
    """Where a whole pipeline is: the folder of `base`, a U-Net's folder to put in it, and how to run them.

    `variant` names the U-Net's weight files, `base_variant` those of the other parts.
    """

    base: Path
    unet: Path
    device: torch.device
    dtype: torch.dtype
    variant: str | None = None
    base_variant: str | None = None


def draw_apart(model: Model, prompts: list[str], sampler: Sampler, description: str) -> Samples:
    """`draw_samples` in a fresh process, whose peak memory is the drawing's alone."""
    with drawing_apart(model) as draw:
        return draw(prompts, sampler, description)


@contextmanager
def drawing_apart(model: Model) -> Iterator[Callable[[list[str], Sampler, str | None], Samples]]:
    """`draw_samples` with a pipeline that is loaded once, in a process that lives as long as the block.

    What this process has freed is given back to the system for it.
    """
    give_back_freed_memory()
    context = multiprocessing.get_context("forkserver")
    # The imports take longer than many a drawing; the server has them ready for the next one.
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield lambda *request: pool.submit(_draw_here, model, *request).result()


def _draw_here(model: Model, prompts: list[str], sampler: Sampler, description: str | None) -> Samples:
    pipe, before = _loaded(model)
    samples = draw_samples(pipe, prompts, sampler, description)
    return replace(samples, peak_memory=peak_memory(model.device) - before)


@functools.cache
def _loaded(model: Model) -> tuple[DiffusionPipeline, int]:
    """The pipeline, and the memory in bytes that the process had held before it."""
    before = peak_memory(model.device)
    return load_pipeline(model), before


def load_pipeline(model: Model) -> DiffusionPipeline:
    """The pipeline, ready to draw."""
    unet = open_unet(model.unet, model.variant, model.dtype)
    pipe = load_base(model.base, model.base_variant, unet)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.to(model.device) if part is unet else part.to(model.device, model.dtype)
    unet.to(memory_format=torch.channels_last)
    return pipe


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held so far, in bytes: torch's on a CUDA GPU, else the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux hands the parent's ru_maxrss down to its children; VmHWM begins anew.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def save_samples(samples: Samples, sampler: Sampler, out: Path) -> None:
    """Write them, whole or not at all."""
    with atomic_directory(out) as folder:
        for i, image in enumerate(samples.images):
            image.save(folder / f"{i:04d}.png")
        about = {key: value for key, value in vars(samples).items() if key != "images"}
        write_json(folder / INDEX, {**about, "sampler": asdict(sampler)})


def load_samples(folder: Path) -> tuple[Samples, Sampler]:
    about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    how = about.pop("sampler")
    sampler = Sampler(**{**how, "size": tuple(how["size"]) if how.get("size") else None})
    images = [Image.open(folder / f"{i:04d}.png").convert("RGB") for i in range(len(about["prompts"]))]
    return Samples(images, **about), sampler


def oracle_score(samples: Samples) -> float | None:
    """The share of the prompts' facts that hold in the pictures, 0 to 1; None unless all are the demo's scenes."""
    return score_scenes(samples.images, samples.prompts)


def score_scenes(images: Iterable[Image.Image], prompts: list[str]) -> float | None:
    """`oracle_score` of pictures that are looked at one by one."""
    try:
        verdicts = [oracle.score(i, p) for i, p in zip(images, prompts, strict=True)]
    except ValueError:
        return None
    return sum(verdict.score for verdict in verdicts) / len(verdicts)
