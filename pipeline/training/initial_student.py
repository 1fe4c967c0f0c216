"""The student that a training starts from: the cache's, filled from the teacher, or a saved one."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from pipeline.models.checksums import changed_files, hashed
from pipeline.models.hashing import shapes_of
from pipeline.models.load import refuse_quantised, refuse_special_files
from pipeline.models.weights import load_network
from pipeline.system.errors import UserError


def initial_student(cache: Path, level: str, init_from: Path | None) -> UNet2DConditionModel:
    """The student of --init-from, or the cache's. Raises UserError if it is damaged or of another level."""
    folder = cache / "students" / level
    changed = changed_files(folder)
    if changed:
        raise UserError(
            f"{folder}: {changed[0]}. Copy it from an intact cache, or delete the folder and rerun "
            f"`teacher-cache --students {level}` with the other settings unchanged."
        )
    if init_from is None:
        return load_student(folder, "Copy it from an intact cache.")
    refuse_special_files(init_from, f"--init-from {init_from}")
    student = load_student(unet_folder(init_from), "Pass a saved student or its pipeline to --init-from.")
    refuse_quantised(student, init_from)
    with torch.device("meta"):
        wanted = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
    if shapes_of(student) != shapes_of(wanted):
        raise UserError(
            f"--init-from {init_from} does not have the layers of {level} for this cache's teacher. "
            "Use a student of that level, or the --level that it has."
        )
    return student


def load_student(folder: Path, remedy: str) -> UNet2DConditionModel:
    """The student in a folder, with every tensor from its files. Raises UserError that ends with the remedy."""
    try:
        return load_network(UNet2DConditionModel, folder, None, fallback=False)
    except UserError as error:
        raise UserError(f"{folder} cannot be loaded ({str(error).rstrip('.')}). {remedy}") from error


def unet_folder(saved: Path) -> Path:
    """The folder of the U-Net: a part of a saved pipeline, or the folder itself. Raises UserError if it holds none."""
    if not any((folder / "config.json").is_file() for folder in (saved / "unet", saved)):
        raise UserError(
            f"--init-from {saved} is no folder of a student: it has neither unet/config.json nor config.json. Pass a "
            "saved student or its pipeline."
        )
    return saved / "unet" if (saved / "unet").is_dir() else saved


def weights_sha256s(saved: Path) -> list[str]:
    """The sha256 of each weight file of a saved student."""
    return [hashed(file) for file in sorted(unet_folder(saved).glob("*.safetensors"))]
