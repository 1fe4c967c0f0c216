"""The shapes of a teacher's data, from its configs alone: its weights need not exist."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from pipeline.core.taps import Taps
from pipeline.models.encoders import latents_shape
from pipeline.models.families import FAMILIES, Family, Shapes, denoise, random_conditioning
from pipeline.models.load import family_of, part_classes, unet_config
from pipeline.models.reading import read_json
from pipeline.system.errors import UserError


@dataclass(frozen=True)
class TeacherShapes:
    """Latents (C, H, W), the conditioning without B by name, and the output (C, H, W) of each tap.

    `dtypes` are those of the conditioning that is not stored in fp16, by name.
    """

    latents: tuple[int, int, int]
    conditioning: Shapes
    taps: dict[str, tuple[int, int, int]]
    dtypes: Mapping[str, str] = field(default_factory=dict)


def tap_shapes(
    config: dict[str, Any], latents: Sequence[int], conditioning: Shapes, taps: list[str], family: Family
) -> dict[str, tuple[int, int, int]]:
    """The (C, H, W) of each tap of the U-Net with this config, from a forward pass on the meta device."""
    named = json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True)
    stated = tuple((name, tuple(shape)) for name, shape in conditioning.items())
    return _tap_shapes(named, tuple(latents), stated, tuple(taps), family.name).copy()


@functools.lru_cache(maxsize=2)
def _meta_unet(config: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(json.loads(config))


@functools.cache
def _tap_shapes(
    config: str,
    latents: tuple[int, ...],
    conditioning: tuple[tuple[str, tuple[int, ...]], ...],
    taps: tuple[str, ...],
    family: str,
) -> dict[str, tuple[int, int, int]]:
    """Cached, because a pass on the meta device takes a second or two whatever the network."""
    unet = _meta_unet(config)
    with torch.device("meta"):
        noisy, found = torch.empty(1, *latents), Taps(unet, taps)
        with found.recording(noisy) as features:
            denoise(unet, noisy, torch.zeros(1), random_conditioning(dict(conditioning), 1), FAMILIES[family])
    found.remove()
    return {tap: (features[tap].shape[1], features[tap].shape[2], features[tap].shape[3]) for tap in taps}


def checked_unet_config(folder: Path) -> dict[str, Any]:
    """The config of a teacher's U-Net. Raises UserError for a teacher that no level fits."""
    config = unet_config(folder)
    try:
        family_of(folder).check(config)
    except ValueError as error:
        raise UserError(f"--teacher {folder}: {error}. Pass a teacher of that family.") from None
    return config


def teacher_shapes(folder: Path, height: int, taps: list[str], width: int | None = None) -> TeacherShapes:
    """The shapes of a teacher's data for images of a size, squares without `width`. Raises UserError for a teacher that
    no level fits."""
    with torch.device("meta"):
        vae = part_classes(folder)["vae"].from_config(read_json(folder / "vae" / "config.json"))
    family = family_of(folder)
    config, conditioning = checked_unet_config(folder), family.conditioning_shapes(folder)
    latents = latents_shape(vae, height, width)
    return TeacherShapes(latents, conditioning, tap_shapes(config, latents, conditioning, taps, family), family.dtypes)
