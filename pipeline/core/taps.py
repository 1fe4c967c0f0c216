"""Taps: the outputs of named modules, captured during a forward pass, and the sampling of their positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Taps:
    """Captures the outputs of `names` (module paths of `module`) while recording.

    The hooks are on the modules themselves, so wrapping `module` changes nothing. They do nothing outside `recording`,
    so the recomputation of gradient checkpointing is not captured.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        self._features: dict[str, Tensor] | None = None
        self._handles = [module.get_submodule(n).register_forward_hook(self._hook(n)) for n in names]

    def _hook(self, name: str) -> Callable[..., None]:
        def capture(_module: nn.Module, _inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            if self._features is not None:
                self._features[name] = as_map(output)

        return capture

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """A dict that is filled with {name: (B, C, H, W)} as the module runs."""
        self._features = {}
        try:
            yield self._features
        finally:
            self._features = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def as_map(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A module's output as a map (B, C, H, W): the first of several outputs; tokens (B, H*H, C) as a square map."""
    tensor = output if isinstance(output, Tensor) else output[0]
    if tensor.ndim == 4:
        return tensor
    side = math.isqrt(tensor.shape[1])
    return tensor.transpose(1, 2).unflatten(2, (side, side))


def sample_tokens(features: Tensor, rows: Sequence[int], columns: Sequence[int], stride: int) -> Tensor:
    """One position per stride x stride cell: (B, C, H, W) -> (B, C, H // stride, W // stride).

    Entry b keeps every stride-th row from rows[b] on, and every stride-th column from columns[b] on, going on at the
    start where a side that `stride` does not divide ends. If both are drawn uniformly from their `offsets`, the mean
    square over the kept positions is an unbiased estimate of the mean square over all positions.
    """
    if stride == 1:
        return features
    height, width = features.shape[2:]
    kept = [
        features[b, :, _positions(height, r, stride)][:, :, _positions(width, c, stride)]
        for b, (r, c) in enumerate(zip(rows, columns, strict=True))
    ]
    return torch.stack(kept)


def _positions(side: int, offset: int, stride: int) -> slice | list[int]:
    if side % stride == 0:
        return slice(offset, None, stride)
    return [(offset + i * stride) % side for i in range(side // stride)]


def token_stride(height: int, width: int, tokens: int) -> int:
    """The largest stride at which at least `tokens` positions of a map are kept; 1 if it has no more, or for 0."""
    if not tokens:
        return 1
    strides = range(1, min(height, width) + 1)
    return max((s for s in strides if (height // s) * (width // s) >= tokens), default=1)
