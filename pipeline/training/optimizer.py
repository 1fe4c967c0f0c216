"""The optimiser of a training: AdamW with fused steps, or with 8-bit moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.system.errors import UserError
from pipeline.training.settings import TrainingSettings


def make_optimizer(parameters: list[nn.Parameter], settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW over `parameters`. Raises UserError if the package for 8-bit moments is not installed."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.adam_weight_decay,
    }
    if not settings.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            "--use-8bit-adam needs the package bitsandbytes. Install it: pip install bitsandbytes"
        ) from None
    return bitsandbytes.optim.AdamW8bit(parameters, **options)


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give moments that were loaded the memory format of their parameters.

    A checkpoint of another device may use another format. Fused steps assume that both are the same, and on a CPU they
    are silently wrong if they are not.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            moment = isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == parameter.shape
            if moment and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
