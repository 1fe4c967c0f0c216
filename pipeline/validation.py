"""Pictures of a student in training, of the same prompts and seeds every so many steps."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from pipeline import models
from pipeline.errors import UserError
from pipeline.samples import Sampler, draw_samples, save_samples


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file, without the empty ones. Raises UserError if there are none, or it is no UTF-8."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a text file with one prompt a line") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8: save it as a UTF-8 text file with one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{file} holds no prompts: write one a line")
    return prompts


def draw_validation(
    student: UNet2DConditionModel, ema: EMAModel | None, base: Path, prompts: list[str], folder: Path, name: str
) -> None:
    """Draw the prompts with the student, or with its average if there is one, into `folder`; nothing of it changes.

    The other parts of the pipeline are loaded from `base` for the time of the drawing.
    """
    if ema:
        ema.store(student.parameters())
        ema.copy_to(student.parameters())
    student.eval()
    pipe = models.load_base(base, unet=student).to(student.device)
    sampler = Sampler()
    samples = draw_samples(pipe, prompts, sampler, name)
    student.train()
    if ema:
        ema.restore(student.parameters())
    shutil.rmtree(folder, ignore_errors=True)
    save_samples(samples, sampler, folder)
