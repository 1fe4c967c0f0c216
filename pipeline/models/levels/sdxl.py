"""The students of SDXL: SSD-1B and Segmind-Vega (Gupta et al. 2024, arXiv:2401.02677), those of KOALA (Lee et al. 2023,
arXiv:2312.04005), and BK-SDM's base and small on SDXL (sdxl_small, sdxl_tiny).

A student is a config that diffusers builds natively; nothing is cut out of a teacher.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from pipeline.models.levels.level import Level
from pipeline.models.levels.sd import teacher_key

DOWN = tuple(f"down_blocks.{i}" for i in range(3))
UP = tuple(f"up_blocks.{i}" for i in range(3))
SSD_1B = "https://arxiv.org/abs/2401.02677"
KOALA = ("KOALA", "https://arxiv.org/abs/2312.04005")
# Transformer blocks of an attention: one number for all those of a stage, or one each. None stands for the teacher's.
Depth = int | tuple[int | None, ...] | None


def student_config(
    teacher_config: dict[str, Any],
    *,
    layers: int,
    depths: tuple[Depth, ...],
    up_depths: tuple[Depth, ...] | None = None,
    mid_block: str | None = "UNetMidBlock2DCrossAttn",
) -> dict[str, Any]:
    """The student's U-Net config. No attention has more transformer blocks than the teacher's.

    `layers` are those of each block. `depths` belong to the stages from the outside inwards, and to the mid block with
    the innermost; `up_depths` to the up blocks from the inside outwards, if theirs are not the same.
    """
    config = {key: value for key, value in teacher_config.items() if not key.startswith("_")}
    given = list(config["transformer_layers_per_block"])
    config["layers_per_block"] = layers
    config["mid_block_type"] = mid_block
    config["transformer_layers_per_block"] = _at_most(given, depths)
    if up_depths is not None:
        config["reverse_transformer_layers_per_block"] = _at_most(given[::-1], up_depths)
    return config


def _at_most(given: Sequence[int], wanted: Sequence[Depth]) -> list[int | list[int]]:
    """The wanted depths of each stage, bounded by the teacher's `given` ones."""
    return [
        [_least(depth, item) for item in stage] if isinstance(stage, tuple) else _least(depth, stage)
        for depth, stage in zip(given, wanted, strict=True)
    ]


def _least(given: int, wanted: int | None) -> int:
    return given if wanted is None else min(given, wanted)


def same_key(student_key: str) -> str:
    """The teacher's tensor of the same name. Of an attention's transformer blocks the student keeps the first ones."""
    return student_key


def _same(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) for name in names)


def _segmind(name: str, depths: tuple[Depth, ...], up_depths: tuple[Depth, ...]) -> Level:
    """All layers are kept, with fewer transformer blocks, and of the mid block the first ResNet."""
    made = functools.partial(student_config, layers=2, depths=depths, up_depths=up_depths, mid_block="UNetMidBlock2D")
    summary = "fewer transformer blocks in its attentions, and a mid block of one ResNet"
    return Level(made, same_key, _same(*DOWN, "mid_block", *UP), summary, (name, SSD_1B))


def _one_layer(innermost: int | None, mid_block: bool) -> Level:
    """One layer per block, as in BK-SDM, with `innermost` transformer blocks in the innermost attentions."""
    made = functools.partial(
        student_config,
        layers=1,
        depths=(None, None, innermost),
        mid_block="UNetMidBlock2DCrossAttn" if mid_block else None,
    )
    changes = [
        "one layer per block instead of two",
        *(() if innermost is None else (f"at most {innermost} transformer blocks per attention",)),
        *(() if mid_block else ("no mid block",)),
    ]
    summary = changes[0] if len(changes) == 1 else f"{', '.join(changes[:-1])} and {changes[-1]}"
    taps = _same(*DOWN, "mid_block", *UP) if mid_block else _same(*DOWN, *UP)
    source = None if innermost is None else KOALA
    return Level(made, functools.partial(teacher_key, innermost_stage=True), taps, summary, source)


LEVELS: dict[str, Level] = {
    "ssd_1b": _segmind("SSD-1B", (None, (2, 2), (4, 4)), ((4, 4, None), (2, 1, 1), None)),
    "vega": _segmind("Segmind-Vega", (None, (1, 1), (2, 2)), ((2, 2, 2), (1, 1, 1), None)),
    "koala_1b": _one_layer(6, mid_block=True),
    "koala_700m": _one_layer(5, mid_block=False),
    "sdxl_small": _one_layer(None, mid_block=True),
    "sdxl_tiny": _one_layer(None, mid_block=False),
}
