"""Saving pipelines: all but the U-Net for students to be put into, and a student's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

from pipeline.models.checksums import write_checksums
from pipeline.models.load import MODEL_INDEX
from shards.files import atomic_directory, write_json


def save_base(base: DiffusionPipeline, noise_scheduler: DDPMScheduler, out: Path) -> None:
    """Write all of the teacher's pipeline but the U-Net, ready to take a student's.

    The sampling scheduler stays the teacher's, with the prediction type that was settled.
    """
    base.scheduler.register_to_config(prediction_type=noise_scheduler.config.prediction_type)
    with atomic_directory(out, exist_ok=True) as folder:
        base.save_pretrained(folder)
        index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))
        write_json(folder / MODEL_INDEX, {**index, "unet": ["diffusers", "UNet2DConditionModel"]})
        write_checksums(folder)


def save_pipeline(base: Path, unet: UNet2DConditionModel, out: Path) -> None:
    """A whole pipeline in `out`: the files of `base` and the U-Net. model_index.json goes first and comes last."""
    (out / MODEL_INDEX).unlink(missing_ok=True)
    index = json.loads((base / MODEL_INDEX).read_text(encoding="utf-8"))
    for part in sorted(base / name for name in index if name != "unet" and (base / name).is_dir()):
        _replace_directory(out / part.name, lambda folder, part=part: shutil.copytree(part, folder, dirs_exist_ok=True))
    _replace_directory(out / "unet", unet.save_pretrained)
    write_json(out / MODEL_INDEX, index, indent=2)


def _replace_directory(path: Path, fill) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with atomic_directory(path) as folder:
        fill(folder)
