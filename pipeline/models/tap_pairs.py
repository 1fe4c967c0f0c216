"""The pairs of modules, of a student and its teacher, whose outputs a set of taps compares."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from pipeline.models.levels import LEVELS
from pipeline.models.levels.tap_sets import BLOCKS, TAP_SETS
from pipeline.models.students import student_config, teacher_taps

# The parts of a U-Net in the order of the forward pass.
ORDER = ("down_blocks", "mid_block", "up_blocks")


def tap_pairs(config: Mapping[str, Any], level: str, tap_set: str) -> tuple[tuple[str, str], ...]:
    """(student module, teacher module) pairs whose outputs have equal shapes, for a student with this U-Net config.

    `tap_set` is a key of TAP_SETS. A module within a block is compared with the one that its weights start from.
    """
    pattern = TAP_SETS[tap_set]
    if pattern is None:
        return LEVELS[level].taps
    tapped = [name for name in module_names(config) if re.fullmatch(pattern, name)]
    return tuple((name, LEVELS[level].teacher_key(f"{name}.").removesuffix(".")) for name in tapped)


def taps_of_teacher(teacher_config: dict[str, Any], levels: Iterable[str], tap_set: str) -> list[str]:
    """The teacher's modules that any of the levels is compared with, each once, in the order of the forward pass.

    Raises ValueError for a teacher that is not of a level's family.
    """
    if tap_set == BLOCKS:
        return teacher_taps(levels)
    pairs = [pair for level in levels for pair in tap_pairs(student_config(teacher_config, level), level, tap_set)]
    return sorted({teacher for _, teacher in pairs}, key=place)


def module_names(config: Mapping[str, Any]) -> list[str]:
    """The paths of a U-Net's modules, in the order of the forward pass as far as blocks and layers go."""
    named = {key: value for key, value in config.items() if not key.startswith("_")}
    return sorted(_module_names(json.dumps(named, sort_keys=True)), key=place)


@functools.cache
def _module_names(config: str) -> tuple[str, ...]:
    """Cached, because it takes a second to build a large network, even without weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(config))
    return tuple(name for name, _ in unet.named_modules() if name.startswith(ORDER))


def place(name: str) -> tuple[int, list[int], str]:
    """The place of a module of a block: that of its block, then of its layer and of what is in there."""
    return ORDER.index(name.split(".")[0]), [int(number) for number in re.findall(r"\d+", name)], name
