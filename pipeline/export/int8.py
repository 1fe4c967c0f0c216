"""A U-Net whose linear layers have int8 weights, through torchao, and the effect on size, output and time.

Each row of a weight has its own scale. Activations, convolutions, norms and biases are not quantised. diffusers writes
such a U-Net as safetensors, and from_pretrained loads it where torchao is installed.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import TorchAoConfig, UNet2DConditionModel
from torch import Tensor

from pipeline.models.families import Family, denoise, placed
from pipeline.models.weights import find_weights
from pipeline.system.disk import size_of
from pipeline.system.echo import say_wait
from pipeline.system.tables import markdown_table

TURNS = 5

# Latents, timesteps and conditioning.
Inputs = tuple[Tensor, Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Int8Cost:
    """Bytes of the weights, relative mean square error of the output, and seconds per forward pass."""

    size: int
    error: float
    seconds: float


def load_int8(folder: Path, variant: str | None, dtype: torch.dtype) -> UNet2DConditionModel:
    """The U-Net of the pipeline in `folder`, with int8 linear weights and everything else in `dtype`."""
    from torchao.quantization import Int8WeightOnlyConfig

    say_wait(f"quantising {folder / 'unet'}", size_of(find_weights(folder / "unet", variant).files))
    return UNet2DConditionModel.from_pretrained(
        folder,
        subfolder="unet",
        variant=variant,
        torch_dtype=dtype,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
    )


@torch.inference_mode()
def compare(
    unet: UNet2DConditionModel, quantised: UNet2DConditionModel, inputs: Inputs, family: Family
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(error, seconds) of `unet` and of `quantised`, which are on one device.

    `inputs` are latents (B, C, H, W), timesteps (B,) and conditioning (B, ...) by name.
    The error is mean((x - y)^2) / mean(x^2), where x is the output of `unet`. The two take turns, and the seconds are
    medians after one untimed pass each.
    """
    latents, timesteps, conditioning = inputs
    device, dtype = unet.device, unet.dtype
    inputs = latents.to(device, dtype), timesteps.to(device), placed(conditioning, device, dtype)
    outputs = [_forward(model, inputs, family)[0] for model in (unet, quantised)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for model, times in zip((unet, quantised), seconds, strict=True):
            times.append(_forward(model, inputs, family)[1])
    plain, other = (output.cpu().double() for output in outputs)
    error = ((plain - other).square().mean() / plain.square().mean()).item()
    return (0.0, statistics.median(seconds[0])), (error, statistics.median(seconds[1]))


def weights_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in a U-Net's folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def latents_size(unet: UNet2DConditionModel) -> int:
    """The longer side of the latents that the U-Net was made for; 64, as of SD at 512 px, if it does not say."""
    size = unet.config.sample_size or 64
    return size if isinstance(size, int) else max(size)


def cost_table(costs: dict[str, Int8Cost]) -> str:
    """A Markdown table with one row per U-Net."""
    head = ("U-Net", "weights, MB", "relative mean square error of the output", "seconds per forward pass")
    rows = [
        (name, f"{cost.size / 1e6:,.1f}", f"{cost.error:.2g}", f"{cost.seconds:.3g}") for name, cost in costs.items()
    ]
    return markdown_table(head, rows, numbers={1, 2, 3})


def _forward(unet: UNet2DConditionModel, inputs: Inputs, family: Family) -> tuple[Tensor, float]:
    started = time.perf_counter()
    output = denoise(unet, *inputs, family)
    if output.device.type == "cuda":
        torch.cuda.synchronize(output.device)
    return output, time.perf_counter() - started
