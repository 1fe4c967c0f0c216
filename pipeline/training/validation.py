"""A student in training as it will be saved, and images of it: the same prompts and seeds at regular steps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn

from pipeline.models.load import load_base
from pipeline.models.schedule import set_prediction_type
from pipeline.sampling.generate import GeneratedImages, Sampler, generate, load_images, save_images
from pipeline.settings.training import TrainingSettings
from pipeline.system.prompts import read_prompts


def prompts_of(settings: TrainingSettings) -> list[str]:
    """The prompts of --validation-prompts, if it is given. Raises UserError for a file that cannot be used."""
    return read_prompts(settings.validation_prompts) if settings.validation_prompts else []


def planned_images(settings: TrainingSettings) -> list[str]:
    """The line of --dry-run on validation images; none without prompts. Raises UserError as `prompts_of` does."""
    prompts = prompts_of(settings)
    return [f"validation images: {len(prompts)} every {settings.validation_steps} steps"] if prompts else []


@contextmanager
def evaluated(student: UNet2DConditionModel, trained: list[nn.Parameter], ema: EMAModel | None) -> Iterator[None]:
    """The student in evaluation mode, with the average of its `trained` parameters if there is one, for a block."""
    if ema:
        ema.store(trained)
        ema.copy_to(trained)
    student.eval()
    try:
        yield
    finally:
        student.train()
        if ema:
            ema.restore(trained)


def generate_validation(
    student: UNet2DConditionModel, prediction_type: str, base: Path, prompts: list[str], folder: Path, name: str
) -> None:
    """Generate an image per prompt with the student, as it is, into `folder`.

    The other parts of the pipeline are loaded from `base` and dropped afterwards.
    """
    pipe = load_base(base, unet=student).to(student.device)
    set_prediction_type(pipe.scheduler, prediction_type)
    sampler = Sampler()
    images = generate(pipe, prompts, sampler, name)
    shutil.rmtree(folder, ignore_errors=True)
    save_images(images, sampler, folder)


def validation_images(folder: Path) -> dict[int, GeneratedImages]:
    """The images in the folders that `generate_validation` wrote, by step. Damaged ones are left out."""
    found = {}
    for path in sorted(folder.glob("step-*")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            found[int(path.name.removeprefix("step-"))] = load_images(path)[0]
    return found
