"""What a student costs beside its teacher: parameters, arithmetic, seconds, memory, bytes on disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.load import MODEL_INDEX
from pipeline.sampling.generate import Sampler
from pipeline.sampling.process import PipelineRef, generating_process

# What is drawn does not change what drawing it costs.
PROMPT = "a picture"
TIMESTEP = 500


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_macs(module: nn.Module, *inputs: Any, **named: Any) -> int:
    """Multiply-accumulates of one forward pass, by torch's counter: convolutions, matrices and attention.

    The counter counts two operations for each. Modules and inputs on the meta device cost nothing.
    """
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(*inputs, **named)
    return counter.get_total_flops() // 2


def unet_macs(config: dict[str, Any], tokens: int) -> int:
    """MACs of a U-Net's forward pass of one latent of its own sample size, with `tokens` prompt embeddings."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        return count_macs(unet, *unet_inputs(unet, 1, tokens))


def unet_inputs(unet: UNet2DConditionModel, batch_size: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Random latents (B, C, H, W) of the U-Net's sample size, timesteps (B,), prompt embeddings (B, tokens, D)."""
    config, like = unet.config, {"device": unet.device, "dtype": unet.dtype}
    height, width = sample_size(config)
    latents = torch.randn(batch_size, config.in_channels, height, width, **like)
    timesteps = torch.full((batch_size,), TIMESTEP, device=unet.device)
    return latents, timesteps, torch.randn(batch_size, tokens, config.cross_attention_dim, **like)


def sample_size(config: dict[str, Any]) -> tuple[int, int]:
    """The (height, width) of the latents that a U-Net was made for."""
    size = config["sample_size"]
    return (size, size) if isinstance(size, int) else tuple(size)


def forward_seconds(unets: dict[str, UNet2DConditionModel], batch_size: int, tokens: int, repeats: int) -> dict:
    """The median seconds of a forward pass, by name."""
    inputs = {name: unet_inputs(unet, batch_size, tokens) for name, unet in unets.items()}

    def forward(name: str) -> None:
        unets[name](*inputs[name])
        if unets[name].device.type != "cpu":
            torch.accelerator.synchronize()

    with torch.inference_mode():
        return in_turns({name: lambda name=name: forward(name) for name in unets}, repeats)


def in_turns(actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median seconds of each action. They take turns, so that what else the machine does falls on all alike.

    The first turn of each warms it up, and does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats + 1):
        for name, act in actions.items():
            started = time.perf_counter()
            act()
            seconds[name].append(time.perf_counter() - started)
    return {name: median(each[1:]) for name, each in seconds.items()}


def image_costs(models: dict[str, PipelineRef], sampler: Sampler, repeats: int) -> dict[str, dict[str, Any]]:
    """By name, the median seconds of a batch's picture and the peak memory in bytes, each in a process of its own."""
    prompts, memory = [PROMPT] * sampler.batch_size, {}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(generating_process(model)) for name, model in models.items()}

        def draw(name: str) -> None:
            memory[name] = processes[name](prompts, sampler, None).peak_memory

        seconds = in_turns({name: lambda name=name: draw(name) for name in models}, repeats)
    return {name: {"seconds": seconds[name] / sampler.batch_size, "peak_memory": memory[name]} for name in models}


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def pipeline_bytes(folder: Path) -> int:
    """The bytes of a pipeline's parts, which model_index.json names; a student's folder holds other things beside."""
    index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))
    return sum(folder_bytes(folder / part) for part, value in index.items() if isinstance(value, list))
