"""A U-Net whose linear layers have int8 weights, by torchao, and what that changes.

Each row of a weight has a scale of its own; activations stay as they are, and so do convolutions, norms and biases.
diffusers writes such a U-Net as safetensors and reads it back with from_pretrained, where torchao is installed.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import TorchAoConfig, UNet2DConditionModel
from torch import Tensor

TURNS = 5


@dataclass(frozen=True)
class Cost:
    """Bytes of the weights, relative mean square error of the output, and seconds of a forward pass."""

    size: int
    error: float
    seconds: float


def load_int8(folder: Path, variant: str | None, dtype: torch.dtype) -> UNet2DConditionModel:
    """The U-Net of the pipeline in `folder`, its linear weights int8 and the rest `dtype`."""
    from torchao.quantization import Int8WeightOnlyConfig

    return UNet2DConditionModel.from_pretrained(
        folder,
        subfolder="unet",
        variant=variant,
        torch_dtype=dtype,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
    )


@torch.inference_mode()
def compare(
    unet: UNet2DConditionModel, quantised: UNet2DConditionModel, inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(error, seconds) of `unet` and of `quantised`, on one device with the inputs (latents, timesteps, prompt_embeds).

    The error is mean((x - y)^2) / mean(x^2), x being what `unet` says. The two take turns; seconds are medians, after
    one pass each that is not timed.
    """
    outputs = [_forward(each, inputs)[0] for each in (unet, quantised)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(TURNS):
        for each, times in zip((unet, quantised), seconds, strict=True):
            times.append(_forward(each, inputs)[1])
    plain, other = (output.double() for output in outputs)
    error = ((plain - other).square().mean() / plain.square().mean()).item()
    return (0.0, statistics.median(seconds[0])), (error, statistics.median(seconds[1]))


def _forward(unet: UNet2DConditionModel, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    output = unet(*inputs, return_dict=False)[0]
    if output.device.type == "cuda":
        torch.cuda.synchronize(output.device)
    return output, time.perf_counter() - started


def weights_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a U-Net's folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def cost_table(costs: dict[str, Cost]) -> str:
    """Markdown, one row a U-Net."""
    lines = [
        "| U-Net | weights, MB | relative mean square error of the output | seconds a forward pass |",
        "|---|---|---|---|",
        *(
            f"| {name} | {cost.size / 1e6:,.1f} | {cost.error:.2g} | {cost.seconds:.3g} |"
            for name, cost in costs.items()
        ),
    ]
    return "\n".join(lines)
