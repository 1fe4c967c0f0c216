"""The shapes of a teacher's data, from its configs alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTokenizer

from pipeline.core.taps import Taps
from pipeline.models.encoders import latents_shape
from pipeline.models.families.sd import check_teacher
from pipeline.models.load import _load, unet_config
from pipeline.system.errors import UserError


def tap_shapes(
    config: dict[str, Any], latents: tuple[int, ...], prompt_embeds: tuple[int, ...], taps: list[str]
) -> dict[str, tuple[int, int, int]]:
    """The (C, H, W) of each tap, from a forward pass without data."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        with Taps(unet, taps).recording() as features:
            unet(torch.empty(1, *latents), torch.zeros(1), encoder_hidden_states=torch.empty(1, *prompt_embeds))
    return {tap: tuple(features[tap].shape[1:]) for tap in taps}


@dataclass(frozen=True)
class TeacherShapes:
    """Latents (C, H, W), prompt embeddings (L, D), and the output (C, H, W) of each tap."""

    latents: tuple[int, int, int]
    prompt_embeds: tuple[int, int]
    taps: dict[str, tuple[int, int, int]]


def teacher_shapes(folder: Path, resolution: int, taps: list[str]) -> TeacherShapes:
    """The shapes of a teacher's data at a resolution, from its configs: its weights need not be there."""
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(_load(lambda: AutoencoderKL.load_config(folder, subfolder="vae"), folder))
    text = _load(lambda: CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"), folder)
    tokenizer = _load(lambda: CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"), folder)
    config = unet_config(folder)
    try:
        check_teacher(config)
    except ValueError as error:
        raise UserError(f"--teacher {folder}: {error}") from None
    latents, prompt_embeds = latents_shape(vae, resolution), (tokenizer.model_max_length, text.hidden_size)
    return TeacherShapes(latents, prompt_embeds, tap_shapes(config, latents, prompt_embeds, taps))
