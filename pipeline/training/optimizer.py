"""The optimiser of a training: AdamW with fused steps, or with 8-bit moments."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pipeline.system.errors import UserError


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    use_8bit_adam: bool = False,
) -> torch.optim.Optimizer:
    """AdamW over `parameters`. Raises UserError if the package for 8-bit moments is not installed."""
    if not use_8bit_adam:
        return torch.optim.AdamW(
            parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
        )
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            "--use-8bit-adam needs the package bitsandbytes. Install it: pip install bitsandbytes"
        ) from None
    return bitsandbytes.optim.AdamW8bit(
        parameters, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay
    )


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
