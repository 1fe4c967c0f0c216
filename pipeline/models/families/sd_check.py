"""What the pipeline of an SD-1.x or SD-2.x must be like to be understood, from its configs alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTokenizer

from pipeline.models.reading import read_config, read_json, read_part
from pipeline.models.schedule import BETA_SCHEDULERS, CONFIG, no_betas, read_noise_scheduler

# Inputs of a U-Net besides noisy latents, timesteps and prompt embeddings, by the config's key.
OTHER_INPUTS = {
    "class_embed_type": "class labels, as unCLIP does",
    "num_class_embeds": "class labels, as upscalers do",
    "addition_embed_type": "additional embeddings, as SDXL does",
    "time_cond_proj_dim": "an embedding of the guidance scale, as latent consistency models do",
}
TEXT_ENCODERS = (None, "clip_text_model", "clip")
ADVICE = "Use a text-to-image pipeline of SD-1.x or SD-2.x"


def problems(folder: Path, any_channels: bool) -> Iterator[tuple[bool, str]]:
    """(whether it holds, the problem if not) of each requirement, in the order in which they can be read."""
    unet = read_config(UNet2DConditionModel, folder / "unet")
    yield from unet_problems(unet)
    yield from vae_problems(read_config(AutoencoderKL, folder / "vae"), unet, any_channels)
    yield from text_problems(folder, unet)
    yield from scheduler_problems(folder)


def unet_problems(unet: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    kind = unet.get("_class_name", "UNet2DConditionModel")
    yield kind == "UNet2DConditionModel", f"its U-Net is a {kind}, not a UNet2DConditionModel. {ADVICE}."
    for key, inputs in OTHER_INPUTS.items():
        yield unet[key] is None, f"its U-Net needs {inputs}: {key} is {unet[key]!r}. {ADVICE}."
    projection = unet["encoder_hid_dim_type"]
    yield (
        projection in (None, "text_proj"),
        f"its U-Net needs image embeddings: encoder_hid_dim_type is {projection!r}. {ADVICE}.",
    )


def vae_problems(vae: dict[str, Any], unet: dict[str, Any], any_channels: bool) -> Iterator[tuple[bool, str]]:
    scale, channels = vae["scaling_factor"], vae["latent_channels"]
    yield (
        isinstance(scale, int | float) and math.isfinite(scale) and scale > 0,
        f"the scaling_factor in its vae/config.json is {scale!r}, not a positive number. Correct it.",
    )
    for key in ("in_channels", "out_channels"):
        yield (
            any_channels or unet[key] == channels,
            f"the {key} of its U-Net are {unet[key]}, but its VAE's latents have {channels} channels. {ADVICE}.",
        )


def text_problems(folder: Path, unet: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    kind = read_json(folder / "text_encoder" / "config.json").get("model_type")
    yield kind in TEXT_ENCODERS, f"its text encoder is a {kind!r}, not a CLIP text encoder. {ADVICE}."
    text = read_part(CLIPTextConfig, folder, "text_encoder")
    stated = unet["encoder_hid_dim"] or unet["cross_attention_dim"]
    widths = list(stated) if isinstance(stated, list | tuple) else [stated]
    yield (
        set(widths) == {text.hidden_size},
        f"its text encoder's embeddings have width {text.hidden_size}, but its U-Net takes {widths[0]}. "
        "Use the text encoder that the U-Net was trained with.",
    )
    tokenizer = read_part(CLIPTokenizer, folder, "tokenizer")
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    yield (
        number < text.vocab_size,
        f"its tokenizer has the token {token!r} with number {number}, but its text encoder knows only "
        f"{text.vocab_size} tokens. Remove the token, or save the pipeline after "
        "text_encoder.resize_token_embeddings(len(tokenizer)) and training.",
    )
    length = prompt_length(tokenizer, text)
    yield length > 2, f"its tokenizer's model_max_length is {length}, which leaves no room for a prompt. Correct it."


def scheduler_problems(folder: Path) -> Iterator[tuple[bool, str]]:
    path = folder / "scheduler" / CONFIG
    config = read_json(path)
    kind = config.get("_class_name", "DDPMScheduler")
    yield kind in BETA_SCHEDULERS, f"{no_betas(kind)}."
    is_flow = config.get("prediction_type") == "flow_prediction" or bool(config.get("use_flow_sigmas"))
    yield not is_flow, f"{path} is of a model trained by flow matching. Use a teacher that predicts noise or v."
    steps = config.get("num_train_timesteps", 1000)
    yield (
        isinstance(steps, int) and steps > 0,
        f"num_train_timesteps in {path} is {steps!r}, not a positive integer. Correct it.",
    )
    alphas = read_noise_scheduler(folder).alphas_cumprod
    yield (
        bool(((alphas >= 0) & (alphas <= 1)).all()),
        f"the betas in {path} give no noise schedule: some are not between 0 and 1. Correct them.",
    )


def prompt_length(tokenizer: CLIPTokenizer, text: CLIPTextConfig) -> int:
    """The tokens of a prompt, start and end included. A tokenizer without a limit has that of the text encoder."""
    return min(tokenizer.model_max_length, text.max_position_embeddings)
