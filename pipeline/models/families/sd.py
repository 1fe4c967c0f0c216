"""SD-1.x and SD-2.x: one text encoder, four stages of two layers each; and their students.

Levels are those of distill-sd (sd_small, sd_tiny) and of BK-SDM (Kim et al. 2023, arXiv:2305.15798). A student is a
config that diffusers builds natively; nothing is cut out of a teacher.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from pipeline.models.families.family import Conditioning, Family, Level, Shapes
from pipeline.models.families.sd_check import problems, prompt_length
from pipeline.models.families.sd_configs import configs_of
from pipeline.models.families.sd_single_file import pipeline_weights
from pipeline.models.reading import read_part
from pipeline.models.schedule import BETA_SCHEDULERS

PROMPT_EMBEDS = "prompt_embeds"
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


# They share their parts. Which of their U-Nets take more than noisy latents is seen in the U-Net's config.
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInpaintPipelineLegacy",
    "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionDepth2ImgPipeline",
    "LatentConsistencyModelPipeline",
)
PARTS = {
    # VAEs whose encoder gives a posterior.
    "vae": ("diffusers.AutoencoderKL", "diffusers.AsymmetricAutoencoderKL", "diffusers.ConsistencyDecoderVAE"),
    "text_encoder": ("transformers.CLIPTextModel",),
    "tokenizer": ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast"),
    "unet": ("diffusers.UNet2DConditionModel",),
    "scheduler": tuple(f"diffusers.{name}" for name in BETA_SCHEDULERS),
}


def check_teacher(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless `config` is a U-Net of the architecture that the levels are written for."""
    stages, layers = len(config["down_block_types"]), config["layers_per_block"]
    checks = [
        (stages == 4, f"it has {stages} stages, not 4"),
        (layers in (2, [2] * 4, (2,) * 4), f"layers_per_block is {layers}, not 2"),
        (config["mid_block_type"] == "UNetMidBlock2DCrossAttn", f"mid_block_type is {config['mid_block_type']}"),
        (config["in_channels"] == 4, f"it takes {config['in_channels']} input channels, not 4"),
        (not config["addition_embed_type"], f"it needs {config['addition_embed_type']} conditioning, as SDXL does"),
    ]
    for passed, problem in checks:
        if not passed:
            raise ValueError(f"the teacher's U-Net is not of the SD-1.x or SD-2.x family: {problem}")


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
_BK_TINY_MIDDLE = ("down_blocks.2.attentions.0.proj_out", "down_blocks.2.attentions.1.proj_out")
LEVELS: dict[str, Level] = {
    "sd_small": _level(True, True, _same(*DOWN, "mid_block", *UP)),
    # The student's last down block feeds the up block that the teacher's first up block feeds.
    "sd_tiny": _level(False, False, _tiny_taps(("down_blocks.2", "up_blocks.0"))),
    "bk_base": _level(True, True, _same(*DOWN, *UP)),
    "bk_small": _level(False, True, _same(*DOWN, *UP)),
    "bk_tiny": _level(False, False, _tiny_taps(_BK_TINY_MIDDLE)),
}


def conditioning_shapes(folder: Path) -> Shapes:
    """{"prompt_embeds": (L, D)} of the pipeline in a folder, from its configs."""
    text = read_part(CLIPTextConfig, folder, "text_encoder")
    tokenizer = read_part(CLIPTokenizer, folder, "tokenizer")
    return {PROMPT_EMBEDS: (prompt_length(tokenizer, text), text.hidden_size)}


def assemble(**parts: Any) -> DiffusionPipeline:
    """The pipeline, without a safety checker: it would turn images black. Prompts have the text encoder's length."""
    tokenizer = parts["tokenizer"]
    tokenizer.model_max_length = prompt_length(tokenizer, parts["text_encoder"].config)
    # Looked up here, and not imported above: that would print notes before `load` turns them off.
    made = diffusers.StableDiffusionPipeline
    return made(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def encode_prompts(base: DiffusionPipeline, captions: list[str]) -> dict[str, Tensor]:
    """prompt_embeds (B, L, D) float32: the text encoder's last hidden state, as StableDiffusionPipeline uses it."""
    tokenizer, text_encoder = base.tokenizer, base.text_encoder
    tokens = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    device = text_encoder.device
    uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if uses_mask else None
    return {PROMPT_EMBEDS: text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0].float()}


def count_truncated(base: DiffusionPipeline, captions: list[str]) -> int:
    """How many captions have more tokens than the text encoder takes, start and end tokens included."""
    tokenizer, truncated = base.tokenizer, 0
    for first in range(0, len(captions), 1000):
        tokens = tokenizer(captions[first : first + 1000], truncation=False, verbose=False).input_ids
        truncated += sum(len(ids) > tokenizer.model_max_length for ids in tokens)
    return truncated


def unet_kwargs(conditioning: Conditioning) -> dict[str, Tensor]:
    return {"encoder_hidden_states": conditioning[PROMPT_EMBEDS]}


SD = Family(
    name="sd",
    title="SD-1.x and SD-2.x",
    pipelines=PIPELINES,
    parts=PARTS,
    encoders=("vae", "text_encoder"),
    levels=LEVELS,
    modules=(*DOWN[:3], _BK_TINY_MIDDLE[1], DOWN[3], "mid_block", *UP),
    blocks=(*DOWN, "mid_block", *UP),
    assemble=assemble,
    problems=problems,
    check=check_teacher,
    conditioning_shapes=conditioning_shapes,
    encode_prompts=encode_prompts,
    count_truncated=count_truncated,
    unet_kwargs=unet_kwargs,
    single_file=pipeline_weights,
    single_file_configs=functools.partial(configs_of, levels=LEVELS),
)
