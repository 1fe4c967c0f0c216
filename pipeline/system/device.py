"""The device that a command runs on, its precision, and the process's place among the launched processes."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate.state import PartialState

from pipeline.system.memory import keep_freed_memory

# One process may finish long before another. The default of ten minutes would end the run.
PATIENCE = timedelta(days=2)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEVICES = ("auto", "cpu")


def use_cpu(device: str) -> bool:
    """Whether `--device` resolves to the CPU.

    This must be passed to accelerate, which otherwise ignores the other processes of a launch on the CPU.
    """
    return device == "cpu" or not torch.accelerator.is_available()


def process_state(device: str) -> PartialState:
    """This process's rank and device under `accelerate launch` or torchrun, or as the only process without them."""
    if use_cpu(device):
        keep_freed_memory()
    return PartialState(cpu=use_cpu(device), timeout=PATIENCE)


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """Resolve `auto`: fp16 on a CUDA GPU, fp32 elsewhere."""
    return ("fp16" if device.type == "cuda" else "fp32") if dtype == "auto" else dtype


def device_name(device: torch.device) -> str:
    """The device's name in reports: a GPU's model name, or else the device type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def is_accelerator(device: torch.device) -> bool:
    """Whether the CPU's cores are free for other threads while the device computes."""
    return device.type != "cpu"
