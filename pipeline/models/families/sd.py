"""The students: for each level its U-Net config, where its weights come from, and its tap pairs.

Levels are those of distill-sd (sd_small, sd_tiny) and of BK-SDM (Kim et al. 2023, arXiv:2305.15798). A
student is a config that diffusers builds natively; nothing is cut out of a teacher. Nothing here does
any I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

INNERMOST_STAGE_FIELDS = (
    "attention_head_dim",
    "block_out_channels",
    "cross_attention_dim",
    "down_block_types",
    "layers_per_block",
    "num_attention_heads",
    "only_cross_attention",
    "transformer_layers_per_block",
)


@dataclass(frozen=True)
class Level:
    """How a student differs from its teacher, and which of its outputs are held against the teacher's.

    `taps` pairs (student module, teacher module), of a U-Net with four stages.
    """

    mid_block: bool
    innermost_stage: bool
    taps: tuple[tuple[str, str], ...]


def _same(*names: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, name) for name in names)


DOWN = tuple(f"down_blocks.{i}" for i in range(4))
UP = tuple(f"up_blocks.{i}" for i in range(4))
_TINY_ENDS = (
    *_same("down_blocks.0", "down_blocks.1"),
    *((f"up_blocks.{i}", f"up_blocks.{i + 1}") for i in range(3)),
)
# The student's last down block feeds what the teacher's first up block feeds.
_TINY_MIDDLE = ("down_blocks.2", "up_blocks.0")
_BK_TINY_MIDDLE = ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out")

LEVELS: dict[str, Level] = {
    "sd_small": Level(True, True, _same(*DOWN, "mid_block", *UP)),
    "sd_tiny": Level(False, False, (*_TINY_ENDS[:2], _TINY_MIDDLE, *_TINY_ENDS[2:])),
    "bk_base": Level(True, True, _same(*DOWN, *UP)),
    "bk_small": Level(False, True, _same(*DOWN, *UP)),
    "bk_tiny": Level(False, False, (*_TINY_ENDS[:2], _BK_TINY_MIDDLE, *_TINY_ENDS[2:])),
}


def check_teacher(config: dict[str, Any]) -> None:
    """Raise ValueError unless `config` is a U-Net of the shape that the level rules are written for."""
    stages, layers = len(config["down_block_types"]), config["layers_per_block"]
    problems = [
        (stages == 4, f"it has {stages} stages, not 4"),
        (layers in (2, [2] * 4, (2,) * 4), f"layers_per_block is {layers}, not 2"),
        (config["mid_block_type"] == "UNetMidBlock2DCrossAttn", f"mid_block_type is {config['mid_block_type']}"),
        (config["in_channels"] == 4, f"it takes {config['in_channels']} input channels, not 4"),
        (not config["addition_embed_type"], f"it needs {config['addition_embed_type']} conditioning, as SDXL's does"),
    ]
    for fine, what in problems:
        if not fine:
            raise ValueError(f"the teacher's U-Net is not of the SD-1.x or SD-2.x family: {what}")


def student_config(teacher_config: dict[str, Any], level: str) -> dict[str, Any]:
    """The student's U-Net config: one layer a block, and without what its level leaves out."""
    check_teacher(teacher_config)
    rule = LEVELS[level]
    config = {key: value for key, value in teacher_config.items() if not key.startswith("_")}
    config["layers_per_block"] = 1
    if not rule.mid_block:
        config["mid_block_type"] = None
    if not rule.innermost_stage:
        for name in INNERMOST_STAGE_FIELDS:
            if isinstance(config.get(name), list | tuple):
                config[name] = config[name][:-1]
        config["up_block_types"] = config["up_block_types"][1:]
    return config


def teacher_key(student_key: str, level: str) -> str:
    """The teacher's tensor that a student's tensor starts from.

    Of an up block's three layers the student keeps the first and the last: only of these do the
    widths fit, since a layer's input is the running map joined with one skip connection.
    """
    match = re.match(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", student_key)
    shift = 0 if LEVELS[level].innermost_stage else 1
    if match:
        block, kind, layer, rest = match.groups()
        return f"up_blocks.{int(block) + shift}.{kind}.{2 if layer == '1' else layer}.{rest}"
    return re.sub(r"^up_blocks\.(\d+)\.", lambda m: f"up_blocks.{int(m[1]) + shift}.", student_key)


def student_weights(
    student_shapes: dict[str, tuple[int, ...]], teacher_weights: dict[str, Tensor], level: str
) -> dict[str, Tensor]:
    """Every tensor of the student: the teacher's own, not a copy.

    Raises ValueError that names the tensor where the teacher has none of that name or shape.
    """
    weights = {}
    for key, shape in student_shapes.items():
        source = teacher_key(key, level)
        if source not in teacher_weights:
            raise ValueError(f"the teacher has no tensor {source}, from which the {level} student's {key} starts")
        tensor = teacher_weights[source]
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"the teacher's {source} has shape {tuple(tensor.shape)}; "
                f"the {level} student's {key} needs {tuple(shape)}"
            )
        weights[key] = tensor
    return weights


def teacher_taps(levels: tuple[str, ...]) -> list[str]:
    """The teacher's modules that any of the levels looks at, once each, in the order of the forward pass."""
    wanted = {teacher for level in levels for _, teacher in LEVELS[level].taps}
    order = (*DOWN[:3], _BK_TINY_MIDDLE[1], DOWN[3], "mid_block", *UP)
    return [tap for tap in order if tap in wanted]


def encode_prompts(base: DiffusionPipeline, captions: list[str]) -> Tensor:
    """(B, L, D) float32: the text encoder's last hidden state, as StableDiffusionPipeline uses it."""
    tokenizer, text_encoder = base.tokenizer, base.text_encoder
    tokens = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    device = text_encoder.device
    uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if uses_mask else None
    return text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0].float()


def count_truncated(base: DiffusionPipeline, captions: list[str]) -> int:
    """How many captions have more tokens than the text encoder takes, begin and end included."""
    tokenizer, cut = base.tokenizer, 0
    for first in range(0, len(captions), 1000):
        tokens = tokenizer(captions[first : first + 1000], truncation=False, verbose=False).input_ids
        cut += sum(len(each) > tokenizer.model_max_length for each in tokens)
    return cut
