"""What a student costs compared with its teacher: parameters, arithmetic, seconds, memory, bytes on disk."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from pipeline.models.families import Family, Shapes, denoise, random_conditioning
from pipeline.models.load import MODEL_INDEX
from pipeline.sampling.generate import Sampler
from pipeline.sampling.process import PipelineRef, generating_process

# The cost of an image does not depend on its prompt.
PROMPT = "an image"
TIMESTEP = 500
# The side of the latents of SD at 512 px.
DEFAULT_SIZE = 64


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_macs(forward: Callable[..., Any], *inputs: Any) -> int:
    """Multiply-accumulates of a call, such as a forward pass: convolutions, matrix products and attention.

    torch's counter reports two operations per multiply-accumulate. On the meta device, counting computes nothing.
    """
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        forward(*inputs)
    return counter.get_total_flops() // 2


def unet_macs(config: dict[str, Any], conditioning: Shapes, family: Family) -> int:
    """MACs of a U-Net's forward pass for one image of its sample size."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        return count_macs(denoise, unet, *unet_inputs(unet, 1, conditioning), family)


def unet_inputs(
    unet: UNet2DConditionModel, batch_size: int, conditioning: Shapes
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Random latents (B, C, H, W) of the U-Net's sample size, timesteps (B,), and conditioning (B, ...) by name.

    All are on the U-Net's device and in its dtype.
    """
    height, width = sample_size(unet.config)
    like = {"device": unet.device, "dtype": unet.dtype}
    latents = torch.randn(batch_size, unet.config.in_channels, height, width, **like)
    timesteps = torch.full((batch_size,), TIMESTEP, device=unet.device)
    placed = {name: tensor.to(**like) for name, tensor in random_conditioning(conditioning, batch_size).items()}
    return latents, timesteps, placed


def sample_size(config: dict[str, Any]) -> tuple[int, int]:
    """The (height, width) of the latents that a U-Net was made for; 64 x 64 for one that does not say."""
    size = config["sample_size"] or DEFAULT_SIZE
    return (size, size) if isinstance(size, int) else tuple(size)


def forward_seconds(
    unets: dict[str, UNet2DConditionModel], batch_size: int, conditioning: Shapes, family: Family, repeats: int
) -> dict[str, float]:
    """The median seconds per forward pass of a batch, by name."""
    inputs = {name: unet_inputs(unet, batch_size, conditioning) for name, unet in unets.items()}

    def forward(name: str) -> None:
        denoise(unets[name], *inputs[name], family)
        if unets[name].device.type != "cpu":
            torch.accelerator.synchronize()

    with torch.inference_mode():
        return in_turns({name: functools.partial(forward, name) for name in unets}, repeats, "timing a forward pass")


def in_turns(actions: dict[str, Callable[[], Any]], repeats: int, description: str) -> dict[str, float]:
    """The median seconds of each action. They take turns, so that other load on the machine affects all of them alike.

    The first turn of each action is a warm-up and is not counted. `description` labels the progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    with tqdm(total=(repeats + 1) * len(actions), unit="turn", desc=description) as progress:
        for _ in range(repeats + 1):
            for name, action in actions.items():
                started = time.perf_counter()
                action()
                seconds[name].append(time.perf_counter() - started)
                progress.update()
    return {name: median(times[1:]) for name, times in seconds.items()}


def image_costs(models: dict[str, PipelineRef], sampler: Sampler, repeats: int) -> dict[str, dict[str, Any]]:
    """The median seconds per image of a batch and the peak memory in bytes, by name, each in a separate process."""
    prompts, memory = [PROMPT] * sampler.batch_size, {}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(generating_process(model)) for name, model in models.items()}

        def generate_batch(name: str) -> None:
            memory[name] = processes[name](prompts, sampler, None).peak_memory

        actions: dict[str, Callable[[], Any]] = {name: functools.partial(generate_batch, name) for name in models}
        seconds = in_turns(actions, repeats, "timing images")
    return {name: {"seconds": seconds[name] / sampler.batch_size, "peak_memory": memory[name]} for name in models}


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def pipeline_bytes(folder: Path) -> int:
    """The bytes of the parts that model_index.json names. A student's folder also holds other files."""
    index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))
    return sum(folder_bytes(folder / part) for part, value in index.items() if isinstance(value, list))
