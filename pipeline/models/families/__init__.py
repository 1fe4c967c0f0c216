"""The families of teachers. A new one is a module with a `Family`, and its entry in FAMILIES."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline

from pipeline.models.families.family import Family, Frame, Shapes, denoise, placed, random_conditioning
from pipeline.models.families.sd import SD
from pipeline.models.families.sdxl import SDXL

__all__ = [
    "FAMILIES",
    "Family",
    "Frame",
    "Shapes",
    "denoise",
    "family_of_index",
    "family_of_level",
    "family_of_pipeline",
    "family_of_spec",
    "placed",
    "random_conditioning",
]

FAMILIES: dict[str, Family] = {family.name: family for family in (SD, SDXL)}


def family_of_index(index: Mapping[str, Any]) -> Family | None:
    """The first family that has the class and all the text encoders which a model_index.json names, or None."""
    named = {part for part in index if part.startswith("text_encoder") and index[part] not in (None, [None, None])}
    return next(
        (
            family
            for family in FAMILIES.values()
            if index.get("_class_name") in family.pipelines and named <= set(family.parts)
        ),
        None,
    )


def family_of_pipeline(pipe: DiffusionPipeline) -> Family:
    """The family of a pipeline that was assembled by one."""
    return next(family for family in FAMILIES.values() if type(pipe).__name__ in family.pipelines)


def family_of_level(level: str) -> Family:
    """The family of teachers that students of this level have."""
    return next(family for family in FAMILIES.values() if level in family.levels)


def family_of_spec(spec: Mapping[str, Any]) -> Family:
    """The family of the teacher that latents or a cache were made with. A spec that names none is of SD-1.x or 2.x."""
    return FAMILIES[spec.get("latents", spec).get("family", SD.name)]
