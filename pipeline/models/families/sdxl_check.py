"""What the pipeline of an SDXL must be like to be understood, from its configs alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTokenizer

from pipeline.models.families.checks import (
    OTHER_INPUTS,
    input_problems,
    scheduler_problems,
    size_problems,
    vae_problems,
)
from pipeline.models.families.clip import (
    config_problems,
    kind_problems,
    prompt_length,
    tokenizer_problems,
    width_problems,
)
from pipeline.models.reading import read_config, read_json, read_part
from pipeline.models.schedule import CONFIG

ADVICE = "Use a text-to-image pipeline of SDXL"
# The refiner takes five numbers of an image, one of them its aesthetic score.
NUMBERS, REFINER_NUMBERS = 6, 5
REFINER = "which SDXL's refiner has. Use the base model"
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def refusal(index: Mapping[str, Any]) -> str | None:
    """Why a pipeline of this model_index.json is not used, if it is the refiner's, which is of the same classes."""
    if index.get("requires_aesthetics_score"):
        return f"its model_index.json states requires_aesthetics_score, {REFINER}."
    return None


def problems(folder: Path, any_channels: bool) -> Iterator[tuple[bool, str]]:
    """(whether it holds, the problem if not) of each requirement, in the order in which they can be read."""
    unet = read_config(UNet2DConditionModel, folder / "unet")
    yield from input_problems(unet, OTHER_INPUTS, ADVICE)
    kind = unet["addition_embed_type"]
    yield kind == "text_time", f"the addition_embed_type of its U-Net is {kind!r}, not 'text_time'. {ADVICE}."
    vae = read_config(AutoencoderKL, folder / "vae")
    yield from vae_problems(vae, unet, any_channels, "SDXL", ADVICE)
    yield from size_problems(unet, vae)
    yield from text_problems(folder, unet)
    yield from scheduler_problems(folder)
    path = folder / "scheduler" / CONFIG
    yield (
        read_json(path).get("timestep_type", "discrete") == "discrete",
        f"{path} has continuous timesteps, as EDM models such as CosXL have. Use a teacher that was trained on a "
        "schedule of betas.",
    )


def text_problems(folder: Path, unet: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Whether the text encoders, their tokenizers and the U-Net fit together."""
    for encoder in ENCODERS:
        yield from kind_problems(folder, encoder, ADVICE)
    configs = {encoder: read_part(CLIPTextConfig, folder, encoder) for encoder in ENCODERS}
    pooled = configs["text_encoder_2"].projection_dim
    yield from projection_problems(unet, pooled)
    width = sum(config.hidden_size for config in configs.values())
    yield from width_problems("the embeddings of its two text encoders together", width, unet)
    lengths = []
    for encoder, part in ENCODERS.items():
        yield from config_problems(folder, part)
        tokenizer = read_part(CLIPTokenizer, folder, part)
        yield from tokenizer_problems(tokenizer, part, configs[encoder], encoder)
        lengths.append(prompt_length(tokenizer, configs[encoder]))
    yield (
        lengths[0] == lengths[1],
        f"its tokenizers give prompts of {lengths[0]} and of {lengths[1]} tokens. Correct their model_max_length.",
    )


def projection_problems(unet: Mapping[str, Any], pooled: int) -> Iterator[tuple[bool, str]]:
    """Whether the U-Net takes the pooled embeddings, (pooled,), and the numbers of an image."""
    width, stated = unet["addition_time_embed_dim"], unet["projection_class_embeddings_input_dim"]
    named = f"the projection_class_embeddings_input_dim of its U-Net is {stated!r}"
    yield (
        type(width) is int and width > 0,
        f"the addition_time_embed_dim of its U-Net is {width!r}, not a positive integer. Correct it.",
    )
    yield stated != pooled + REFINER_NUMBERS * width, f"{named}, {REFINER}."
    wanted = pooled + NUMBERS * width
    yield (
        stated == wanted,
        f"{named}, but the pooled embeddings of its second text encoder and {NUMBERS} numbers of an image take "
        f"{wanted}. Use the text encoders that the U-Net was trained with.",
    )
