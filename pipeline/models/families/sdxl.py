"""SDXL: two text encoders, whose embeddings lie side by side, and the sizes of an image as conditioning."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from pipeline.models.families import clip, sdcpp
from pipeline.models.families.family import Conditioning, Family, Frame, Shapes
from pipeline.models.families.sdxl_check import ENCODERS, NUMBERS, problems, refusal
from pipeline.models.families.sdxl_configs import configs_of
from pipeline.models.families.sdxl_single_file import pipeline_weights
from pipeline.models.levels.sdxl import DOWN, LEVELS, UP
from pipeline.models.reading import read_part
from pipeline.models.schedule import BETA_SCHEDULERS

PROMPT_EMBEDS, POOLED, TIME_IDS = "prompt_embeds", "pooled_prompt_embeds", "time_ids"
# They share their parts.
PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline")
TOKENIZERS = ("transformers.CLIPTokenizer", "transformers.CLIPTokenizerFast")
PARTS = {
    "vae": ("diffusers.AutoencoderKL",),
    "text_encoder": ("transformers.CLIPTextModel",),
    "text_encoder_2": ("transformers.CLIPTextModelWithProjection",),
    "tokenizer": TOKENIZERS,
    "tokenizer_2": TOKENIZERS,
    "unet": ("diffusers.UNet2DConditionModel",),
    "scheduler": tuple(f"diffusers.{name}" for name in BETA_SCHEDULERS),
}


def check_teacher(config: Mapping[str, Any]) -> None:
    """Raise ValueError unless `config` is a U-Net of the architecture that the levels are written for."""
    stages, layers = len(config["down_block_types"]), config["layers_per_block"]
    depths = config["transformer_layers_per_block"]
    has_depths = isinstance(depths, list | tuple) and len(depths) == stages and all(type(d) is int for d in depths)
    uneven = config["reverse_transformer_layers_per_block"]
    checks = [
        (config["addition_embed_type"] == "text_time", "it takes no sizes of images"),
        (stages == 3, f"it has {stages} stages, not 3"),
        (layers in (2, [2] * 3, (2,) * 3), f"layers_per_block is {layers}, not 2"),
        (config["mid_block_type"] == "UNetMidBlock2DCrossAttn", f"mid_block_type is {config['mid_block_type']}"),
        (has_depths, f"transformer_layers_per_block is {depths}, not one number for each stage"),
        (uneven is None, f"reverse_transformer_layers_per_block is {uneven}, as in a student"),
        (config["in_channels"] == 4, f"it takes {config['in_channels']} input channels, not 4"),
    ]
    for passed, problem in checks:
        if not passed:
            raise ValueError(f"the teacher's U-Net is not of the SDXL family: {problem}")


def conditioning_shapes(folder: Path) -> Shapes:
    """{"prompt_embeds": (L, D), "pooled_prompt_embeds": (P,), "time_ids": (6,)} of the pipeline in a folder."""
    texts = {encoder: read_part(CLIPTextConfig, folder, encoder) for encoder in ENCODERS}
    length = clip.prompt_length(read_part(CLIPTokenizer, folder, "tokenizer"), texts["text_encoder"])
    return {
        PROMPT_EMBEDS: (length, sum(text.hidden_size for text in texts.values())),
        POOLED: (texts["text_encoder_2"].projection_dim,),
        TIME_IDS: (NUMBERS,),
    }


def assemble(index: Mapping[str, Any], **parts: Any) -> DiffusionPipeline:
    """The pipeline, without a watermark. Prompts have the text encoders' length."""
    for encoder, tokenizer in ENCODERS.items():
        parts[tokenizer].model_max_length = clip.prompt_length(parts[tokenizer], parts[encoder].config)
    # Looked up here, and not imported above: that would print notes before `load` turns them off.
    made = diffusers.StableDiffusionXLPipeline
    zeros = bool(index.get("force_zeros_for_empty_prompt", True))
    return made(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)


def encode_prompts(base: DiffusionPipeline, captions: list[str]) -> dict[str, Tensor]:
    """prompt_embeds (B, L, D) and pooled_prompt_embeds (B, P) float32, as StableDiffusionXLPipeline uses them.

    prompt_embeds are the last hidden states but one of both text encoders, side by side, and pooled_prompt_embeds the
    projection of the second. For the empty prompt both are zeros, unless the pipeline's model_index.json says false for
    force_zeros_for_empty_prompt.
    """
    hidden, pooled = [], torch.empty(0)
    for encoder, tokenizer in ENCODERS.items():
        text_encoder = getattr(base, encoder)
        tokens = clip.tokenize(getattr(base, tokenizer), captions)
        output = text_encoder(tokens.input_ids.to(text_encoder.device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2].float())
        pooled = output[0].float()
    prompts = torch.cat(hidden, dim=-1)
    if base.config.force_zeros_for_empty_prompt:
        is_empty = torch.tensor([not caption for caption in captions], device=prompts.device)
        prompts = prompts.masked_fill(is_empty[:, None, None], 0)
        pooled = pooled.masked_fill(is_empty[:, None], 0)
    return {PROMPT_EMBEDS: prompts, POOLED: pooled}


def image_conditioning(frame: Frame) -> dict[str, Tensor]:
    """time_ids (6,) int32: the sizes that diffusers' SDXL trainer states, in its order."""
    return {TIME_IDS: torch.tensor([*frame.original, *frame.corner, *frame.size], dtype=torch.int32)}


def count_truncated(base: DiffusionPipeline, captions: list[str]) -> int:
    """How many captions have more tokens than the text encoders take, start and end tokens included."""
    return clip.count_truncated([base.tokenizer, base.tokenizer_2], captions)


def unet_kwargs(conditioning: Conditioning) -> dict[str, Any]:
    return {
        "encoder_hidden_states": conditioning[PROMPT_EMBEDS],
        "added_cond_kwargs": {"text_embeds": conditioning[POOLED], "time_ids": conditioning[TIME_IDS]},
    }


def architecture(pipe: DiffusionPipeline) -> str:
    """SSD-1B's own name for its shape, and SDXL's for all others."""
    config = pipe.unet.config
    ups = config.reverse_transformer_layers_per_block
    is_ssd_1b = config.mid_block_type == "UNetMidBlock2D" and bool(ups) and list(ups[1]) == [2, 1, 1]
    return "segmind-stable-diffusion-1b" if is_ssd_1b else "stable-diffusion-xl-v1-base"


SDXL = Family(
    name="sdxl",
    title="SDXL",
    pipelines=PIPELINES,
    parts=PARTS,
    encoders=("vae", *ENCODERS),
    levels=LEVELS,
    default_level="sdxl_small",
    modules=(*DOWN, "mid_block", *UP),
    blocks=(*DOWN, "mid_block", *UP),
    assemble=assemble,
    problems=problems,
    check=check_teacher,
    conditioning_shapes=conditioning_shapes,
    encode_prompts=encode_prompts,
    image_conditioning=image_conditioning,
    count_truncated=count_truncated,
    unet_kwargs=unet_kwargs,
    single_file=pipeline_weights,
    sdcpp=sdcpp.sdxl_weights,
    architecture=architecture,
    single_file_configs=functools.partial(configs_of, levels=LEVELS),
    refusal=refusal,
    dtypes={TIME_IDS: "int32"},
    follows_force_upcast=True,
    spec={"family": "sdxl"},
)
