"""The names of a U-Net's tensors in single files for stable-diffusion.cpp.

It builds a few U-Nets, whose blocks take three places each in the LDM's list, however many layers they have. So U-Nets
of two layers per block have the names that they have everywhere, and those of one layer have other numbers.
"""

from __future__ import annotations

import re

from torch import Tensor

from pipeline.models.families.sd_single_file import UNET

PLACES = 3
OTHERWISE = "Leave out --layout: diffusers, ComfyUI and Forge read the usual one"


def sd_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of SD-1.x or SD-2.x, renamed if its U-Net has one layer per block.

    Raises ValueError for a U-Net that stable-diffusion.cpp does not know.
    """
    found = places(weights)
    has_middle = any(name.startswith(f"{UNET}middle_block.") for name in weights)
    if found == PLACES and has_middle:
        return weights
    downsamplers = sum(name.endswith(".0.op.weight") for name in weights)
    if found != 2 or has_middle or downsamplers != 2:
        raise ValueError(
            "of the students of SD-1.x and SD-2.x, stable-diffusion.cpp reads those of the shape of sd_tiny alone. "
            f"{OTHERWISE}"
        )
    return {renamed(name): tensor for name, tensor in weights.items()}


def sdxl_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file of SDXL as they are. Raises ValueError for a U-Net that stable-diffusion.cpp does not
    know."""
    if places(weights) != PLACES:
        raise ValueError(
            "of SDXL's students, stable-diffusion.cpp reads ssd_1b and vega alone. Leave out --layout: diffusers reads "
            "the usual one, and that of KOALA's students ComfyUI does too"
        )
    return weights


def places(weights: dict[str, Tensor]) -> int:
    """How many places a block takes in the list: the first one ends with the first downsampler."""
    numbers = re.compile(re.escape(UNET) + r"input_blocks\.(\d+)\.0\.op\.weight")
    return min(int(matched[1]) for name in weights if (matched := numbers.match(name)))


def renamed(name: str) -> str:
    """What stable-diffusion.cpp calls a tensor of a U-Net that has one layer per block, and of all else."""
    matched = re.match(re.escape(UNET) + r"(input|output)_blocks\.(\d+)\.(.*)", name)
    if matched is None or name.startswith(f"{UNET}input_blocks.0."):
        return name
    half, place, rest = matched[1], int(matched[2]), matched[3]
    if half == "input":
        # A layer, and then the downsampler at the end of the block's places.
        block, inner = divmod(place - 1, 2)
        return f"{UNET}input_blocks.{PLACES * block + 1 + 2 * inner}.{rest}"
    block, inner = divmod(place, 2)
    if upsampler := re.match(r"\d+\.conv\.(.*)", rest):
        return f"{UNET}output_blocks.{PLACES * block + 2}.{1 if block == 0 else 2}.conv.{upsampler[1]}"
    return f"{UNET}output_blocks.{PLACES * block + inner}.{rest}"
