"""The students of SD-1.x and SD-2.x: those of distill-sd (sd_small, sd_tiny) and of BK-SDM (Kim et al. 2023,
arXiv:2305.15798).

A student is a config that diffusers builds natively; nothing is cut out of a teacher.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from pipeline.models.levels.level import Level

DOWN = tuple(f"down_blocks.{i}" for i in range(4))
UP = tuple(f"up_blocks.{i}" for i in range(4))
# Config fields with an item per stage.
STAGE_FIELDS = (
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "layers_per_block",
    "num_attention_heads",
    "only_cross_attention",
    "transformer_layers_per_block",
)


def student_config(teacher_config: dict[str, Any], *, mid_block: bool, innermost_stage: bool) -> dict[str, Any]:
    """The student's U-Net config: one layer per block, with or without the mid block and the innermost stage."""
    config = {key: value for key, value in teacher_config.items() if not key.startswith("_")}
    config["layers_per_block"] = 1
    if not mid_block:
        config["mid_block_type"] = None
    if not innermost_stage:
        for name in STAGE_FIELDS:
            if isinstance(config.get(name), list | tuple):
                config[name] = config[name][:-1]
        config["up_block_types"] = config["up_block_types"][1:]
    return config


def teacher_key(student_key: str, *, innermost_stage: bool) -> str:
    """The teacher's tensor that a student's tensor starts from.

    Of the three layers of an up block the student keeps the first and the last. Only their widths fit, since a layer's
    input is the running map concatenated with one skip connection.
    """
    match = re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", student_key)
    shift = 0 if innermost_stage else 1
    if match:
        block, kind, layer, rest = match.groups()
        return f"up_blocks.{int(block) + shift}.{kind}.{2 if layer == '1' else layer}.{rest}"
    return re.sub(r"^up_blocks\.(\d+)\.", lambda m: f"up_blocks.{int(m[1]) + shift}.", student_key)


def _level(mid_block: bool, innermost_stage: bool, taps: tuple[tuple[str, str], ...]) -> Level:
    missing = [
        "one layer per block instead of two",
        *(() if mid_block else ("no mid block",)),
        *(() if innermost_stage else ("no innermost stage",)),
    ]
    return Level(
        functools.partial(student_config, mid_block=mid_block, innermost_stage=innermost_stage),
        functools.partial(teacher_key, innermost_stage=innermost_stage),
        taps,
        missing[0] if len(missing) == 1 else f"{', '.join(missing[:-1])} and {missing[-1]}",
    )


def _same(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) for name in names)


def _tiny_taps(middle: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Without the innermost stage, the student's up block i stands for the teacher's up block i + 1."""
    ups = tuple((f"up_blocks.{i}", f"up_blocks.{i + 1}") for i in range(3))
    return (*_same("down_blocks.0", "down_blocks.1"), middle, *ups)


# BK-Tiny compares the last attention layers of the innermost stage that both have.
BK_TINY_MIDDLE = ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out")
LEVELS: dict[str, Level] = {
    "sd_small": _level(True, True, _same(*DOWN, "mid_block", *UP)),
    # The student's last down block feeds the up block that the teacher's first up block feeds.
    "sd_tiny": _level(False, False, _tiny_taps(("down_blocks.2", "up_blocks.0"))),
    "bk_base": _level(True, True, _same(*DOWN, *UP)),
    "bk_small": _level(False, True, _same(*DOWN, *UP)),
    "bk_tiny": _level(False, False, _tiny_taps(BK_TINY_MIDDLE)),
}
