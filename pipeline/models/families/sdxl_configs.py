"""The configs of SDXL in diffusers' layout, for checkpoints in one file, which come without any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from pipeline.models.families.sd_configs import (
    BETAS,
    CONV_IN,
    OTHER_FAMILIES,
    TEXT_CONFIG,
    TOKENIZER_CONFIG,
    VAE_CONFIG,
    holds,
    refuse_incomplete,
    refuse_other_channels,
    schedule_of_file,
    unet_of,
    vae_names,
)
from pipeline.models.families.sd_single_file import VAE, clip_weights
from pipeline.models.families.sdxl_single_file import FIRST, SECOND, second_weights
from pipeline.models.levels.level import Level

TITLE = "SDXL"
# The refiner has OpenCLIP's text encoder alone, and takes one number of an image less.
REFINER = "conditioner.embedders.0.model."
# Tensors of models whose noise is not scaled by betas: Playground v2.5 and CosXL.
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max")
CONFIGS: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "in_channels": 4,
        "out_channels": 4,
    },
    # Its activations do not fit in fp16.
    "vae/config.json": {**VAE_CONFIG, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    "text_encoder/config.json": {
        **TEXT_CONFIG,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "projection_dim": 768,
    },
    "text_encoder_2/config.json": {
        **TEXT_CONFIG,
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
    "tokenizer/tokenizer_config.json": {**TOKENIZER_CONFIG, "pad_token": "<|endoftext|>"},
    "tokenizer_2/tokenizer_config.json": {**TOKENIZER_CONFIG, "pad_token": "!"},
    "scheduler/scheduler_config.json": {
        "_class_name": "EulerDiscreteScheduler",
        **BETAS,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    },
}


def configs_of(
    shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, str], levels: Mapping[str, Level]
) -> tuple[str, dict[str, dict[str, Any]]] | None:
    """What a file is, such as "SDXL", and the configs of its parts, by their files.

    `shapes` are those of its tensors by name, and `stated` is the header of a safetensors file. None for a file that is
    not of SDXL. Raises ValueError with the problem and its remedy for a file that holds no complete pipeline of SDXL.
    """
    if not any(name.startswith(OTHER_FAMILIES) for name in shapes):
        return None
    if holds(shapes, REFINER):
        raise ValueError("it is SDXL's refiner. Use the base model.")
    edm = next((name for name in EDM if name in shapes), None)
    if edm:
        raise ValueError(f"it has {edm}, as EDM models such as CosXL and Playground v2.5 have. Use another checkpoint.")
    parts = {CONV_IN: "U-Net", FIRST: "first text encoder", SECOND: "second text encoder", VAE: "VAE"}
    missing = next((part for start, part in parts.items() if not holds(shapes, start)), None)
    if missing:
        raise ValueError(f"it holds no {missing}. Use a checkpoint with all its parts.")
    refuse_other_channels(shapes)
    configs = {name: dict(config) for name, config in CONFIGS.items()}
    level, configs["unet/config.json"] = unet_of(shapes, TITLE, configs["unet/config.json"], levels)
    refuse_incomplete(shapes, _other_names(configs))
    configs["scheduler/scheduler_config.json"] |= schedule_of_file("epsilon", shapes, stated)
    return TITLE + level, configs


def _other_names(configs: Mapping[str, dict[str, Any]]) -> set[str]:
    """The names of all tensors of the VAE and the text encoders."""
    with torch.device("meta"):
        first = CLIPTextModel(CLIPTextConfig(**configs["text_encoder/config.json"])).state_dict()
        second = CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2/config.json"])).state_dict()
    texts = clip_weights(first, FIRST).keys() | second_weights(second).keys()
    return vae_names(configs["vae/config.json"]) | texts
