"""Images of a student in training, of the same prompts and seeds at regular steps."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import nn

from pipeline.models.load import load_base
from pipeline.sampling.generate import Sampler, generate, save_images


def generate_validation(
    student: UNet2DConditionModel,
    trained: list[nn.Parameter],
    ema: EMAModel | None,
    base: Path,
    prompts: list[str],
    folder: Path,
    name: str,
) -> None:
    """Generate an image per prompt with the student, or with the average of its `trained` parameters if there is one.

    The images go into `folder`. The student is left unchanged. The other parts of the pipeline are loaded from `base`
    and dropped afterwards.
    """
    if ema:
        ema.store(trained)
        ema.copy_to(trained)
    student.eval()
    try:
        pipe = load_base(base, unet=student).to(student.device)
        sampler = Sampler()
        images = generate(pipe, prompts, sampler, name)
    finally:
        student.train()
        if ema:
            ema.restore(trained)
    shutil.rmtree(folder, ignore_errors=True)
    save_images(images, sampler, folder)
