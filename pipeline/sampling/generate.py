"""Generating images from prompts with a complete pipeline, and storing them with what generating them cost.

samples/samples.json   prompts, sampler, seconds, parameters and memory
samples/0000.png ...   one image per prompt
"""

from __future__ import annotations

import inspect
import io
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from PIL import Image
from tqdm import tqdm

from pipeline.models.schedule import SCHEDULE
from pipeline.system.device import DTYPES, device_name
from pipeline.system.echo import plural, printable
from pipeline.system.errors import UserError, first_line
from pipeline.system.text_files import read_text
from shards.files import atomic_directory, write_json
from shards.regular import read_regular

SAMPLES = "samples"
INDEX = "samples.json"
# More than any image that a pipeline generates.
MAX_PNG_BYTES = 1 << 29
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

# What of a scheduler's config is the noise schedule, and how sampling goes along it.
SCHEDULE_KEYS = (*SCHEDULE, "timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "set_alpha_to_one")
# Those that all of SCHEDULERS compute.
COMMON_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# Every sampler takes so many steps, if the schedule has them.
ENOUGH_STEPS = 10

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
    batch_size: int = 4
    scheduler: str = "dpm"
    negative_prompt: str | None = None
    size: tuple[int, int] | None = None
    seed: int = 0


@torch.inference_mode()
def generate(pipe: DiffusionPipeline, prompts: list[str], sampler: Sampler, description: str | None) -> GeneratedImages:
    """Generate one image per prompt. Each has its own seed, whatever the batch size.

    `description` labels the progress bar; None hides the bar. Images are decoded one by one, to take less memory.
    Raises UserError if the network gives NaN.
    """
    height, width = sampler.size or image_size(pipe)
    original_scheduler, pipe.scheduler = pipe.scheduler, sampling_scheduler(pipe.scheduler, sampler.scheduler)
    # Some VAEs have no such method, and others have one that only says so.
    with suppress(AttributeError, NotImplementedError):
        pipe.vae.enable_slicing()
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    started = time.perf_counter()
    with tqdm(total=len(prompts), unit="image", desc=description, disable=description is None) as progress:
        for first in range(0, len(prompts), sampler.batch_size):
            chunk = prompts[first : first + sampler.batch_size]
            negative = None if sampler.negative_prompt is None else [sampler.negative_prompt] * len(chunk)
            generators = [torch.Generator().manual_seed(sampler.seed + first + i) for i in range(len(chunk))]
            pixels = pipe(
                chunk,
                height=height,
                width=width,
                num_inference_steps=sampler.steps,
                guidance_scale=sampler.guidance_scale,
                negative_prompt=negative,
                generator=generators,
                output_type="np",
            ).images
            refuse_not_finite(pixels, chunk, pipe.unet.dtype)
            images += pipe.numpy_to_pil(pixels)
            progress.update(len(chunk))
    pipe.scheduler = original_scheduler
    seconds = (time.perf_counter() - started) / len(prompts)
    parameters = sum(p.numel() for p in pipe.unet.parameters())
    device = f"{device_name(pipe.device)}, {_dtype_name(pipe.unet.dtype)}"
    return GeneratedImages(images, prompts, seconds, parameters, device)


def refuse_not_finite(pixels: np.ndarray, prompts: list[str], dtype: torch.dtype) -> None:
    """Raise UserError if one of the images (B, H, W, 3) holds NaN, which would be saved as black."""
    bad = [prompt for image, prompt in zip(pixels, prompts, strict=True) if not np.isfinite(image).all()]
    if bad:
        remedy = (
            "Check the weights and configs of its U-Net and VAE."
            if dtype == torch.float32
            else "Its U-Net or VAE overflows in this precision. Use --dtype fp32 or bf16, or another VAE."
        )
        raise UserError(f"the image of {printable(bad[0])!r} is NaN in {_dtype_name(dtype)}. {remedy}")


def image_size(pipe: DiffusionPipeline) -> tuple[int, int]:
    """(height, width) in pixels of a pipeline's images by default: what the U-Net states, or else the VAE."""
    factor, own = pipe.vae_scale_factor, pipe.unet.config.sample_size
    if own:
        height, width = (own, own) if isinstance(own, int) else own
        return height * factor, width * factor
    size = pipe.vae.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return height // factor * factor, width // factor * factor


def sampling_scheduler(own: SchedulerMixin, name: str) -> SchedulerMixin:
    """The scheduler `name` of SCHEDULERS with the noise schedule of `own`, a pipeline's scheduler.

    Keys that only `own` understands are left out: another class gives them another meaning. Raises ValueError if the
    class cannot follow that schedule.
    """
    kind = SCHEDULERS[name]
    if type(own) is kind:
        return kind.from_config(own.config)
    stated = {key: own.config[key] for key in SCHEDULE_KEYS if key in own.config}
    config = {key: value for key, value in stated.items() if key not in own.config.get("_use_default_values", ())}
    known = inspect.signature(kind.__init__).parameters
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in known:
        raise ValueError(f"{name} does not reach a terminal SNR of zero")
    if config.get("beta_schedule") not in (None, *COMMON_BETA_SCHEDULES) and config.get("trained_betas") is None:
        # Betas that only some classes compute.
        config["trained_betas"] = own.betas.tolist()
        config["beta_schedule"] = COMMON_BETA_SCHEDULES[0]
    return kind.from_config({**config, "clip_sample": False})


def check_sampler(own: SchedulerMixin, sampler: Sampler, model: str) -> None:
    """Raise UserError unless `sampler` works with the noise schedule of `own`, the scheduler of the pipeline `model`.

    If another number of steps would do, the message says which.
    """
    problem = sampling_problem(own, sampler)
    if problem is None:
        return
    train_steps = own.config.get("num_train_timesteps") or 0
    for steps in (*range(sampler.steps + 1, ENOUGH_STEPS + 1), train_steps, train_steps // 2):
        if steps and sampling_problem(own, replace(sampler, steps=steps)) is None:
            raise UserError(
                f"the scheduler {sampler.scheduler} cannot sample from {model} in {plural(sampler.steps, 'step')}, "
                f"but it can in {steps}. Choose another number of steps, or another scheduler."
            )
    raise UserError(
        f"the scheduler {sampler.scheduler} cannot sample from {model} in {plural(sampler.steps, 'step')}: "
        f"{problem.rstrip('.')}. The pipeline's own is a {type(own).__name__} with prediction type "
        f"{own.config.get('prediction_type')}, {own.config.get('beta_schedule')} betas and "
        f"{own.config.get('num_train_timesteps')} timesteps. Use another scheduler, or correct its config."
    )


def sampling_problem(own: SchedulerMixin, sampler: Sampler) -> str | None:
    """Why a sampling fails; None if it does not. Latents of one value are tried, with a network that predicts zero."""
    try:
        scheduler = sampling_scheduler(own, sampler.scheduler)
        scheduler.set_timesteps(sampler.steps)
        latents = torch.ones(1, 4, 1, 1) * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            latents = scheduler.step(torch.zeros_like(scaled), timestep, latents).prev_sample
        return None if torch.isfinite(latents).all() else "it gives NaN or Inf"
    except Exception as error:
        return first_line(error)


def save_images(samples: GeneratedImages, sampler: Sampler, out: Path) -> None:
    """Write the images and their index to a new directory, atomically."""
    with atomic_directory(out) as folder:
        for i, image in enumerate(samples.images):
            image.save(folder / f"{i:04d}.png")
        index = {key: value for key, value in vars(samples).items() if key != "images"}
        write_json(folder / INDEX, {**index, "sampler": asdict(sampler)})


def load_images(folder: Path) -> tuple[GeneratedImages, Sampler]:
    """Read what `save_images` wrote."""
    index = json.loads(read_text(folder / INDEX))
    options = index.pop("sampler")
    sampler = Sampler(**{**options, "size": tuple(options["size"]) if options.get("size") else None})
    files = [folder / f"{i:04d}.png" for i in range(len(index["prompts"]))]
    images = [Image.open(io.BytesIO(read_regular(file, MAX_PNG_BYTES))).convert("RGB") for file in files]
    return GeneratedImages(images, **index), sampler


def _dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
