"""The optimiser of a training: AdamW with fused steps, or with 8-bit moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.settings.training import TrainingSettings
from pipeline.system.errors import UserError

# As torch and bitsandbytes call them.
MOMENTS = {"exp_avg", "exp_avg_sq", "state1", "state2"}


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


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if moments that were loaded do not have their parameters' shapes: they are another student's."""
    for parameter, state in optimizer.state.items():
        for name in MOMENTS & state.keys():
            shape = getattr(state[name], "shape", None)
            if shape != parameter.shape:
                raise ValueError(f"the optimizer's {name} has shape {shape} for weights of shape {parameter.shape}")


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give moments that were loaded the memory format of their parameters.

    A checkpoint of another device may use another format. Fused steps assume that both are the same, and on a CPU they
    are silently wrong if they are not.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape == parameter.shape:
                state[name] = laid_out_like(parameter, value)


def laid_out_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, of the parameter's shape, with the parameter's memory format."""
    if value.stride() == parameter.stride():
        return value
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=value.dtype, device=value.device).copy_(value)
