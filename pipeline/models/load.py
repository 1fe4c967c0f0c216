"""The teacher's networks: where they are, loading them, hashing them, asking them; and saving a student."""

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
from pipeline.system.errors import UserError

# Their bars and hints about this package's own calls would drown the stages' one line of progress.
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

MODEL_INDEX = "model_index.json"
NEEDED = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")


def find_pipeline(name: str, revision: str | None, variant: str | None, flag: str = "--teacher") -> Path:
    """The local folder of a Stable Diffusion pipeline: `demo`, a folder itself, or a hub's name, downloaded.

    Raises UserError if there is none or if it lacks a part that the stages need.
    """
    folder = teacher_folder() if name == "demo" else Path(name)
    if not folder.is_dir():
        folder = _download(name, revision, variant, flag)
    if not (folder / MODEL_INDEX).is_file():
        raise UserError(f"{flag} {name} has no {MODEL_INDEX}: give a checkpoint in diffusers layout")
    index = _read_index(folder / MODEL_INDEX)
    lacking = [part for part in NEEDED if not index.get(part) or index[part][0] is None]
    if lacking:
        raise UserError(f"{flag} {name} has no {', '.join(lacking)}: give a whole Stable Diffusion pipeline")
    if "text_encoder_2" in index:
        raise UserError(f"{flag} {name} is a {index['_class_name']}; SD-1.x and SD-2.x are supported so far")
    return folder


def _read_index(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy or download the pipeline again") from None


def _download(name: str, revision: str | None, variant: str | None, flag: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{flag} {name} is no folder")
    try:
        return Path(DiffusionPipeline.download(name, revision=revision, variant=variant))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{flag} {name} is no folder, and no model hub gave it: {reason}") from None


def load_base(folder: Path, variant: str | None = None, unet: UNet2DConditionModel | None = None) -> DiffusionPipeline:
    """A pipeline with `unet` in the place of its own, or with none; the rest is loaded, float32, on the CPU."""
    base = _load(lambda: DiffusionPipeline.from_pretrained(folder, unet=unet, variant=variant), folder)
    for part in base.components.values():
        # transformers would leave its networks in the precision of their files.
        if isinstance(part, nn.Module) and part is not unet:
            part.to(torch.float32)
    return base


def load_unet(folder: Path, variant: str | None) -> UNet2DConditionModel:
    """A pipeline's U-Net, float32, on the CPU. Raises UserError for one with quantised weights."""
    unet = open_unet(folder / "unet", variant, torch.float32)
    refuse_quantised(unet, folder)
    return unet


def open_unet(folder: Path, variant: str | None, dtype: torch.dtype) -> UNet2DConditionModel:
    """The U-Net in a folder of its own, on the CPU. Quantised weights take the precision of the rest only here."""
    return _load(lambda: UNet2DConditionModel.from_pretrained(folder, variant=variant, torch_dtype=dtype), folder)


def refuse_quantised(unet: UNet2DConditionModel, folder: Path) -> None:
    """Raise UserError for a U-Net with quantised weights, which only draws and is only evaluated."""
    if unet.config.get("quantization_config"):
        raise UserError(f"{folder} has quantised weights: give the pipeline that it was exported from")


def unet_config(folder: Path) -> dict[str, Any]:
    """The teacher's U-Net config alone, with diffusers' defaults filled in."""
    config = _load(lambda: UNet2DConditionModel.load_config(folder, subfolder="unet"), folder)
    with torch.device("meta"):
        return dict(UNet2DConditionModel.from_config(config).config)


def _load(load, folder: Path):
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder} cannot be loaded: {reason}; is the download complete?") from error


def load_noise_scheduler(folder: Path, prediction_type: str | None) -> DDPMScheduler:
    """The noise schedule the teacher was trained with; `prediction_type` overrides what its config says."""
    noise_scheduler = _load(lambda: DDPMScheduler.from_pretrained(folder, subfolder="scheduler"), folder)
    if prediction_type:
        noise_scheduler.register_to_config(prediction_type=prediction_type)
    return noise_scheduler
