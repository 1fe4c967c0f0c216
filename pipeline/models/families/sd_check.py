"""What the pipeline of an SD-1.x or SD-2.x must be like to be understood, from its configs alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTokenizer

from pipeline.models.families.checks import (
    OTHER_INPUTS,
    input_problems,
    scheduler_problems,
    size_problems,
    vae_problems,
)
from pipeline.models.families.clip import config_problems, kind_problems, tokenizer_problems, width_problems
from pipeline.models.reading import read_config, read_part

REFUSED = {**OTHER_INPUTS, "addition_embed_type": "additional embeddings, as SDXL does"}
ADVICE = "Use a text-to-image pipeline of SD-1.x or SD-2.x"


def problems(folder: Path, any_channels: bool) -> Iterator[tuple[bool, str]]:
    """(whether it holds, the problem if not) of each requirement, in the order in which they can be read."""
    unet = read_config(UNet2DConditionModel, folder / "unet")
    yield from input_problems(unet, REFUSED, ADVICE)
    vae = read_config(AutoencoderKL, folder / "vae")
    yield from vae_problems(vae, unet, any_channels, "SD", ADVICE)
    yield from size_problems(unet, vae)
    yield from kind_problems(folder, "text_encoder", ADVICE)
    text = read_part(CLIPTextConfig, folder, "text_encoder")
    yield from width_problems("its text encoder's embeddings", text.hidden_size, unet)
    yield from config_problems(folder, "tokenizer")
    tokenizer = read_part(CLIPTokenizer, folder, "tokenizer")
    yield from tokenizer_problems(tokenizer, "tokenizer", text, "text_encoder")
    yield from scheduler_problems(folder)
