"""The student that a training begins with: the cache's own, filled from the teacher, or one that was saved."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from pipeline.models.checksums import changed_files
from pipeline.models.hashing import shapes_of
from pipeline.models.load import refuse_quantised
from pipeline.system.errors import UserError
from shards.files import file_sha256


def initial_student(cache: Path, level: str, init_from: Path | None) -> UNet2DConditionModel:
    """The student of --init-from, or the cache's. Raises UserError for one that is damaged or of another level."""
    folder = cache / "students" / level
    changed = changed_files(folder)
    if changed:
        raise UserError(
            f"{folder}: {changed[0]}; copy it from a whole cache, or delete the folder and run "
            f"`teacher-cache --students {level}` again, with the other settings as they were"
        )
    if init_from is None:
        return load_student(folder, "copy it from a whole cache")
    student = load_student(unet_folder(init_from), "give a saved student, or its pipeline, to --init-from")
    refuse_quantised(student, init_from)
    with torch.device("meta"):
        wanted = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    if shapes_of(student) != shapes_of(wanted):
        raise UserError(
            f"--init-from {init_from} is no {level} of this cache's teacher: its layers are others; "
            "give a student of that level, or the --level that it has"
        )
    return student


def load_student(folder: Path, remedy: str) -> UNet2DConditionModel:
    try:
        return UNet2DConditionModel.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} cannot be loaded ({reason}): {remedy}") from error


def unet_folder(saved: Path) -> Path:
    """Where the U-Net is: a pipeline's part, or the folder itself."""
    return saved / "unet" if (saved / "unet").is_dir() else saved


def weights_sha256s(saved: Path) -> list[str]:
    """The sha256 of each file of a saved student's weights."""
    return [file_sha256(file) for file in sorted(unet_folder(saved).glob("*.safetensors"))]
