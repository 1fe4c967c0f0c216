"""The device a command runs on, its precision, and the process among its peers."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate.state import PartialState

from pipeline.system.memory import keep_freed_memory

# One process may be done long before another; the default of ten minutes would end the run.
PATIENCE = timedelta(days=2)


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


DEVICES = ("auto", "cpu")


def use_cpu(device: str) -> bool:
    """Whether `--device` comes down to the CPU. Said to accelerate, or it would overlook a CPU's other processes."""
    return device == "cpu" or not torch.accelerator.is_available()


def process_state(device: str) -> PartialState:
    """This process among those of `accelerate launch` or torchrun (one without them), and its device."""
    if use_cpu(device):
        keep_freed_memory()
    return PartialState(cpu=use_cpu(device), timeout=PATIENCE)


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """`auto` is fp16 on a GPU and fp32 elsewhere."""
    return ("fp16" if device.type == "cuda" else "fp32") if dtype == "auto" else dtype


def device_name(device: torch.device) -> str:
    """What to call it in a report: a GPU by its maker's name, a CPU just so."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def is_accelerator(device: torch.device) -> bool:
    """Whether a device leaves the CPU's cores to other threads while it computes."""
    return device.type != "cpu"
