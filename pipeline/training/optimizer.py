"""The optimiser of a training: AdamW with fused steps, or with 8-bit moments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from pipeline.settings.training import TrainingSettings
from pipeline.system.errors import UserError
from pipeline.system.extras import install_command

# What the moments are called, by the package of the optimiser.
MOMENTS = {"bitsandbytes": ("state1", "state2")}
USUAL_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_optimizer(
    parameters: list[nn.Parameter], settings: TrainingSettings, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over `parameters` on `device`. Raises UserError if no package for 8-bit moments is installed."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "eps": settings.adam_epsilon,
        "weight_decay": settings.adam_weight_decay,
    }
    if settings.use_8bit_adam:
        return adamw_8bit(device)(parameters, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def adamw_8bit(device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    """AdamW with 8-bit moments: on a GPU that of bitsandbytes if it is installed, else that of torchao."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        with suppress(ImportError):
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError(
            "--use-8bit-adam needs the package torchao, or on a GPU bitsandbytes. "
            f"Install it: {install_command('int8')}"
        ) from None

    class Uncompiled(AdamW8bit):
        """torchao compiles the step for each shape of weights: on a CPU that takes minutes, and a C++ compiler."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return AdamW8bit if on_gpu else Uncompiled


def know_8bit_moments() -> None:
    """Have torch read the 8-bit moments of a checkpoint: it refuses tensors of a class that it does not know."""
    with suppress(ImportError):
        import torchao.optim  # noqa: F401


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if moments that were loaded are of another package's optimiser, or do not have their parameters'
    shapes: then they are another student's."""
    kind = type(getattr(optimizer, "optimizer", optimizer))
    names = MOMENTS.get(kind.__module__.partition(".")[0], USUAL_MOMENTS)
    for parameter, state in optimizer.state.items():
        absent = [name for name in names if name not in state]
        if absent:
            raise ValueError(
                f"the optimizer's {', '.join(absent)} is missing, as in a checkpoint of another package's 8-bit Adam "
                f"than that of {kind.__module__.partition('.')[0]}"
            )
        for name in names:
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
            # Those of 8 bits have a class of their own, and no format.
            if type(value) is torch.Tensor and value.is_floating_point() and value.shape == parameter.shape:
                state[name] = laid_out_like(parameter, value)


def laid_out_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, of the parameter's shape, with the parameter's memory format."""
    if value.stride() == parameter.stride():
        return value
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=value.dtype, device=value.device).copy_(value)
