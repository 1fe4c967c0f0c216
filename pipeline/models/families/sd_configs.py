"""The configs of SD-1.x and SD-2.x in diffusers' layout, for checkpoints in one file, which come without any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from pipeline.models.families.sd_single_file import (
    CLIP,
    OPEN_CLIP,
    UNET,
    VAE,
    clip_weights,
    open_clip_weights,
    unet_weights,
    vae_weights,
)
from pipeline.models.levels.level import Level

CONV_IN = f"{UNET}input_blocks.0.0.weight"
# What files of SDXL have, and files of SD-1.x and SD-2.x do not.
OTHER_FAMILIES = ("conditioner.", f"{UNET}label_emb.")
# Tensors that mark the noise schedule by their names.
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "in_channels": 4,
    "out_channels": 4,
}
VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
}
PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True)
class Version:
    """The configs of a version, by the file that holds them, and the prediction type of most of its checkpoints."""

    title: str
    text_prefix: str
    prediction_type: str
    configs: Mapping[str, Mapping[str, Any]]


VERSIONS = (
    Version(
        "SD-1.x",
        CLIP.removesuffix("text_model."),
        "epsilon",
        {
            "model_index.json": {**PIPELINE, "scheduler": ["diffusers", "PNDMScheduler"]},
            "unet/config.json": {
                **UNET_CONFIG,
                "sample_size": 64,
                "cross_attention_dim": 768,
                "attention_head_dim": 8,
            },
            "vae/config.json": {**VAE_CONFIG, "sample_size": 512},
            "text_encoder/config.json": {
                **TEXT_CONFIG,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "hidden_act": "quick_gelu",
                "projection_dim": 768,
            },
            "tokenizer/tokenizer_config.json": {**TOKENIZER_CONFIG, "pad_token": "<|endoftext|>"},
            "scheduler/scheduler_config.json": {
                "_class_name": "PNDMScheduler",
                **BETAS,
                "skip_prk_steps": True,
                "set_alpha_to_one": False,
                "steps_offset": 1,
            },
        },
    ),
    Version(
        "SD-2.x",
        OPEN_CLIP,
        "v_prediction",
        {
            "model_index.json": {**PIPELINE, "scheduler": ["diffusers", "DDIMScheduler"]},
            "unet/config.json": {
                **UNET_CONFIG,
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": [5, 10, 20, 20],
                "use_linear_projection": True,
                "upcast_attention": True,
            },
            "vae/config.json": {**VAE_CONFIG, "sample_size": 768},
            "text_encoder/config.json": {
                **TEXT_CONFIG,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 23,
                "num_attention_heads": 16,
                "hidden_act": "gelu",
                "projection_dim": 512,
            },
            "tokenizer/tokenizer_config.json": {**TOKENIZER_CONFIG, "pad_token": "!"},
            "scheduler/scheduler_config.json": {
                "_class_name": "DDIMScheduler",
                **BETAS,
                "clip_sample": False,
                "set_alpha_to_one": False,
                "steps_offset": 1,
            },
        },
    ),
)


def configs_of(
    shapes: Mapping[str, tuple[int, ...]], stated: Mapping[str, str], levels: Mapping[str, Level]
) -> tuple[str, dict[str, dict[str, Any]]] | None:
    """What a file is, such as "SD-1.x", and the configs of its parts, by their files.

    `shapes` are those of its tensors by name, and `stated` is the header of a safetensors file. None for a file without
    a U-Net that SD-1.x or SD-2.x could have. Raises ValueError with the problem and its remedy for a file that holds no
    complete pipeline of the family.
    """
    if CONV_IN not in shapes or any(name.startswith(OTHER_FAMILIES) for name in shapes):
        return None
    version = next((v for v in VERSIONS if holds(shapes, v.text_prefix)), None)
    if version is None or not holds(shapes, VAE):
        missing = "text encoder" if version is None else "VAE"
        raise ValueError(f"it holds no {missing}. Use a checkpoint with all its parts.")
    refuse_other_channels(shapes)
    configs = {name: dict(config) for name, config in version.configs.items()}
    level, configs["unet/config.json"] = unet_of(shapes, version.title, configs["unet/config.json"], levels)
    refuse_incomplete(shapes, _other_names(configs, version))
    configs["scheduler/scheduler_config.json"] |= schedule_of_file(version.prediction_type, shapes, stated)
    return version.title + level, configs


def holds(shapes: Mapping[str, Any], start: str) -> bool:
    return any(name.startswith(start) for name in shapes)


def refuse_other_channels(shapes: Mapping[str, tuple[int, ...]]) -> None:
    if shapes[CONV_IN][1] != 4:
        raise ValueError(
            f"its U-Net takes {shapes[CONV_IN][1]} input channels, as inpainting models do. Use a text-to-image model."
        )


def unet_of(
    shapes: Mapping[str, tuple[int, ...]], title: str, teacher: dict[str, Any], levels: Mapping[str, Level]
) -> tuple[str, dict[str, Any]]:
    """What a file's U-Net is besides `title`, in words, and its config: the teacher's or that of a level."""
    found = {name: shape for name, shape in shapes.items() if name.startswith(UNET)}
    candidates = {"": teacher, **{name: level.student_config(teacher) for name, level in levels.items()}}
    level = next((level for level, config in candidates.items() if _unet_shapes(config) == found), None)
    if level is None:
        raise ValueError(f"its U-Net has the shape of neither {title} nor one of its students. Use a folder.")
    return f", a student of the shape of {level}" if level else "", candidates[level]


def refuse_incomplete(shapes: Mapping[str, Any], names: set[str]) -> None:
    """Raise ValueError, with the name, if a file lacks one of the tensors."""
    lacking = sorted(names - shapes.keys())
    if lacking:
        raise ValueError(f"it lacks {lacking[0]}. Use a complete checkpoint, or download it again.")


def schedule_of_file(usual: str, shapes: Mapping[str, Any], stated: Mapping[str, str]) -> dict[str, Any]:
    """The prediction type, by default the `usual` one, and zero terminal SNR that a file states, in its header or by
    tensors named so."""
    kinds = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    kind = kinds.get(stated.get("modelspec.prediction_type", ""), usual)
    zero_snr = stated.get("ss_zero_terminal_snr", "").lower() == "true" or ZERO_SNR_MARK in shapes
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_snr else {}
    return {"prediction_type": "v_prediction" if V_MARK in shapes else kind, **more}


def vae_names(config: dict[str, Any]) -> set[str]:
    """The names of all tensors of the VAE of this config."""
    with torch.device("meta"):
        return set(vae_weights(AutoencoderKL.from_config(config).state_dict()))


def _other_names(configs: Mapping[str, dict[str, Any]], version: Version) -> set[str]:
    """The names of all tensors of the VAE and the text encoder."""
    with torch.device("meta"):
        text_encoder = CLIPTextModel(CLIPTextConfig(**configs["text_encoder/config.json"])).state_dict()
    text = open_clip_weights(text_encoder) if version.text_prefix == OPEN_CLIP else clip_weights(text_encoder)
    return vae_names(configs["vae/config.json"]) | text.keys()


def _unet_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of a U-Net's tensors under the names of the single file."""
    with torch.device("meta"):
        weights = UNet2DConditionModel.from_config(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in unet_weights(weights).items()}
