"""SD-1.x and SD-2.x: one text encoder, four stages of two layers each."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from pipeline.models.families import clip, sdcpp
from pipeline.models.families.family import Conditioning, Family, Shapes
from pipeline.models.families.sd_check import problems
from pipeline.models.families.sd_configs import configs_of
from pipeline.models.families.sd_single_file import is_open_clip, pipeline_weights
from pipeline.models.levels.sd import BK_TINY_MIDDLE, DOWN, LEVELS, UP
from pipeline.models.reading import read_part
from pipeline.models.schedule import BETA_SCHEDULERS

PROMPT_EMBEDS = "prompt_embeds"
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


def conditioning_shapes(folder: Path) -> Shapes:
    """{"prompt_embeds": (L, D)} of the pipeline in a folder, from its configs."""
    text = read_part(CLIPTextConfig, folder, "text_encoder")
    tokenizer = read_part(CLIPTokenizer, folder, "tokenizer")
    return {PROMPT_EMBEDS: (clip.prompt_length(tokenizer, text), text.hidden_size)}


def assemble(index: Mapping[str, Any], **parts: Any) -> DiffusionPipeline:
    """The pipeline, without a safety checker: it would turn images black. Prompts have the text encoder's length."""
    tokenizer = parts["tokenizer"]
    tokenizer.model_max_length = clip.prompt_length(tokenizer, parts["text_encoder"].config)
    # Looked up here, and not imported above: that would print notes before `load` turns them off.
    made = diffusers.StableDiffusionPipeline
    return made(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def encode_prompts(base: DiffusionPipeline, captions: list[str]) -> dict[str, Tensor]:
    """prompt_embeds (B, L, D) float32: the text encoder's last hidden state, as StableDiffusionPipeline uses it."""
    tokenizer, text_encoder = base.tokenizer, base.text_encoder
    tokens = clip.tokenize(tokenizer, captions)
    device = text_encoder.device
    uses_mask = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if uses_mask else None
    return {PROMPT_EMBEDS: text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0].float()}


def count_truncated(base: DiffusionPipeline, captions: list[str]) -> int:
    """How many captions have more tokens than the text encoder takes, start and end tokens included."""
    return clip.count_truncated([base.tokenizer], captions)


def unet_kwargs(conditioning: Conditioning) -> dict[str, Tensor]:
    return {"encoder_hidden_states": conditioning[PROMPT_EMBEDS]}


def architecture(pipe: DiffusionPipeline) -> str:
    """SD-1.x's name, or that of the kind of SD-2.x."""
    if not is_open_clip(pipe.text_encoder):
        return "stable-diffusion-v1"
    predicts_v = pipe.scheduler.config.prediction_type == "v_prediction"
    return "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"


SD = Family(
    name="sd",
    title="SD-1.x and SD-2.x",
    pipelines=PIPELINES,
    parts=PARTS,
    encoders=("vae", "text_encoder"),
    levels=LEVELS,
    default_level="sd_small",
    modules=(*DOWN[:3], BK_TINY_MIDDLE[1], DOWN[3], "mid_block", *UP),
    blocks=(*DOWN, "mid_block", *UP),
    assemble=assemble,
    problems=problems,
    check=check_teacher,
    conditioning_shapes=conditioning_shapes,
    encode_prompts=encode_prompts,
    count_truncated=count_truncated,
    unet_kwargs=unet_kwargs,
    single_file=pipeline_weights,
    sdcpp=sdcpp.sd_weights,
    architecture=architecture,
    single_file_configs=functools.partial(configs_of, levels=LEVELS),
)
