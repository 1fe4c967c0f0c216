"""A student and its teacher, opened, and held against each other before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from pipeline.evaluation.fidelity import levels_of
from pipeline.models.families.sd import LEVELS, check_teacher
from pipeline.models.hashing import weights_sha256
from pipeline.models.load import find_pipeline, load_base, open_unet
from pipeline.sampling.process import PipelineRef
from pipeline.system.errors import UserError


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline of the two, on the CPU, and `model` to load it again as it is to run.

    The U-Net of `pipe` has the precision to run in, the rest is float32.
    """

    name: str
    folder: Path
    pipe: DiffusionPipeline
    model: PipelineRef

    @property
    def spec(self) -> dict[str, Any]:
        """What decides its pictures, whatever its folder is called."""
        parts = {part: weights_sha256(getattr(self.pipe, part)) for part in ("unet", "vae", "text_encoder")}
        config = {key: value for key, value in self.pipe.scheduler.config.items() if not key.startswith("_")}
        return {**parts, "scheduler": config}


def load_named_pipeline(
    name: str, flag: str, revision: str | None, variant: str | None, device: torch.device, dtype: torch.dtype
) -> LoadedPipeline:
    """The pipeline `name`, which the option `flag` gave. Raises UserError if it cannot be loaded."""
    folder = find_pipeline(name, revision, variant, flag)
    pipe = load_base(folder, variant, open_unet(folder / "unet", variant, dtype))
    return LoadedPipeline(name, folder, pipe, PipelineRef(folder, folder / "unet", device, dtype, variant, variant))


def on_device(opened: LoadedPipeline) -> DiffusionPipeline:
    """Its U-Net moved to where it is to run."""
    opened.pipe.unet.to(opened.model.device, memory_format=torch.channels_last).eval()
    return opened.pipe


def level_of(teacher: LoadedPipeline, student: LoadedPipeline, wanted: str | None) -> str:
    """The student's level, of several that it may be the `wanted` one.

    Raises UserError if it is no student of the teacher's, or not of that level.
    """
    try:
        check_teacher(teacher.pipe.unet.config)
    except ValueError as error:
        raise UserError(f"--teacher {teacher.name}: {error}; give a teacher of that family") from None
    found = levels_of(student.pipe.unet, teacher.pipe.unet)
    if not found:
        raise UserError(
            f"--student {student.name} is no student of --teacher {teacher.name}: its layers are those of none of "
            f"{', '.join(LEVELS)}; give the teacher that it was distilled from"
        )
    if wanted and wanted not in found:
        raise UserError(
            f"--level {wanted} is not that of --student {student.name}, whose layers are {' or '.join(found)}: "
            "give that, or leave --level out"
        )
    theirs, its = (each.pipe.scheduler.config.prediction_type for each in (teacher, student))
    if theirs != its:
        raise UserError(
            f"--student {student.name} predicts {its}, and --teacher {teacher.name} {theirs}: "
            "give the teacher that it was distilled from"
        )
    return wanted or found[0]
