"""Saving pipelines: the teacher's without its U-Net, and a student's."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel

from pipeline.models.checksums import write_checksums
from pipeline.models.load import MODEL_INDEX
from shards.files import atomic_directory, write_json


def save_base(base: DiffusionPipeline, noise_scheduler: DDPMScheduler, out: Path) -> None:
    """Write the teacher's pipeline without the U-Net, for a student's U-Net to be added.

    The sampling scheduler stays the teacher's, with the prediction type of `noise_scheduler`.
    """
    base.scheduler.register_to_config(prediction_type=noise_scheduler.config.prediction_type)
    with atomic_directory(out, exist_ok=True) as folder:
        base.save_pretrained(folder)
        index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))
        write_json(folder / MODEL_INDEX, {**index, "unet": ["diffusers", "UNet2DConditionModel"]})
        write_checksums(folder)


def save_pipeline(base: Path, unet: UNet2DConditionModel, out: Path) -> None:
    """Write a complete pipeline to `out`: the files of `base` and the U-Net.

    model_index.json is removed first and written last, so a folder that has one is complete.
    """
    (out / MODEL_INDEX).unlink(missing_ok=True)
    index = json.loads((base / MODEL_INDEX).read_text(encoding="utf-8"))
    for part in sorted(base / name for name in index if name != "unet" and (base / name).is_dir()):
        _replace_directory(out / part.name, functools.partial(shutil.copytree, part, dirs_exist_ok=True))
    _replace_directory(out / "unet", unet.save_pretrained)
    write_json(out / MODEL_INDEX, index, indent=2)


def _replace_directory(path: Path, fill: Callable[[Path], Any]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with atomic_directory(path) as folder:
        fill(folder)
