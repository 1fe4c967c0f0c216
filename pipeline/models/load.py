"""Finding a pipeline and loading its networks, in float32 on the CPU unless noted otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.errors
import torch
import transformers
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import nn

from pipeline.models.bundled import teacher_folder
from pipeline.models.families import FAMILIES, Family, family_of_index
from pipeline.models.reading import read_part, reading
from pipeline.system.errors import UserError, first_line

# Their bars and hints about this package's own calls would hide the stages' one line of progress.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

MODEL_INDEX = "model_index.json"


def find_pipeline(name: str, revision: str | None, variant: str | None, flag: str = "--teacher") -> Path:
    """The local folder of a pipeline: `demo`, a folder, or a name on the hub, which is downloaded.

    Raises UserError if there is none, if it is of no known family, or if a part that the stages need is missing.
    """
    folder = teacher_folder() if name == "demo" else Path(name)
    if not folder.is_dir():
        folder = _download(name, revision, variant, flag)
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(f"{flag} {name} has no {MODEL_INDEX}. Use a checkpoint in diffusers layout.")
    index = _read_index(folder / MODEL_INDEX)
    family = family_of_index(index)
    if family is None:
        titles = ", ".join(family.title for family in FAMILIES.values())
        raise UserError(
            f"{flag} {name} is a {index.get('_class_name')}. Use a pipeline of a supported family: {titles}."
        )
    missing = [part for part in family.parts if not index.get(part) or index[part][0] is None]
    if missing:
        raise UserError(f"{flag} {name} has no {', '.join(missing)}. Use a complete Stable Diffusion pipeline.")
    return folder


def family_of(folder: Path) -> Family:
    """The family of the pipeline in a folder that `find_pipeline` returned."""
    family = family_of_index(_read_index(folder / MODEL_INDEX))
    assert family is not None
    return family


def _read_index(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is corrupt ({error}). Copy or download the pipeline again.") from None


def _download(name: str, revision: str | None, variant: str | None, flag: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{flag} {name} is not a folder")
    try:
        return Path(DiffusionPipeline.download(name, revision=revision, variant=variant))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = first_line(error)
        raise UserError(f"{flag} {name} is not a folder, and it cannot be downloaded from a hub: {reason}") from None


def load_base(folder: Path, variant: str | None = None, unet: UNet2DConditionModel | None = None) -> DiffusionPipeline:
    """A pipeline with `unet` in place of its own, or without one. The other parts are loaded."""
    base = reading(folder, lambda: DiffusionPipeline.from_pretrained(folder, unet=unet, variant=variant))
    for part in base.components.values():
        # transformers would leave its networks in the precision of their files.
        if isinstance(part, nn.Module) and part is not unet:
            part.to(torch.float32)
    return base


def load_unet(folder: Path, variant: str | None) -> UNet2DConditionModel:
    """A pipeline's U-Net. Raises UserError for one with quantised weights."""
    unet = load_unet_folder(folder / "unet", variant, torch.float32)
    refuse_quantised(unet, folder)
    return unet


def load_unet_folder(folder: Path, variant: str | None, dtype: torch.dtype) -> UNet2DConditionModel:
    """The U-Net in a folder of its own. The dtype is set here because quantised weights cannot be cast afterwards."""
    return reading(folder, lambda: UNet2DConditionModel.from_pretrained(folder, variant=variant, torch_dtype=dtype))


def refuse_quantised(unet: UNet2DConditionModel, folder: Path) -> None:
    """Raise UserError for a U-Net with quantised weights, which can generate and be evaluated but not be trained."""
    if unet.config.get("quantization_config"):
        raise UserError(
            f"{folder} has quantised weights, which cannot be trained. Use the pipeline it was exported from."
        )


def unet_config(folder: Path) -> dict[str, Any]:
    """The U-Net config of a pipeline, with diffusers' defaults filled in. Its weights need not exist."""
    config = reading(folder, lambda: UNet2DConditionModel.load_config(folder, subfolder="unet"))
    with torch.device("meta"):
        return dict(UNet2DConditionModel.from_config(config).config)


def load_noise_scheduler(folder: Path, prediction_type: str | None) -> DDPMScheduler:
    """The noise schedule that the teacher was trained with. `prediction_type` overrides its config."""
    noise_scheduler = read_part(DDPMScheduler, folder, "scheduler")
    if prediction_type:
        noise_scheduler.register_to_config(prediction_type=prediction_type)
    return noise_scheduler
