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
        self._size: tuple[int, int] | None = None
        self._handles = [module.get_submodule(n).register_forward_hook(self._hook(n)) for n in names]

    def _hook(self, name: str) -> Callable[..., None]:
        def capture(_module: nn.Module, _inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            if self._features is not None:
                self._features[name] = as_map(output, self._size)

        return capture

    @contextmanager
    def recording(self, inputs: Tensor | None = None) -> Iterator[dict[str, Tensor]]:
        """A dict that is filled with {name: (B, C, H, W)} as the module runs on `inputs` (B, C, H, W).

        Their size says how tokens lie; without them, tokens are taken for those of a square.
        """
        self._features = {}
        self._size = None if inputs is None else (inputs.shape[2], inputs.shape[3])
        try:
            yield self._features
        finally:
            self._features = None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def as_map(output: Tensor | tuple[Tensor, ...], size: tuple[int, int] | None = None) -> Tensor:
    """A module's output as a map (B, C, H, W): the first of several outputs; tokens (B, H*W, C) as a map.

    H and W are `size`, that of the U-Net's input, halved as often as gives so many tokens; a side that is odd is
    rounded up, as the U-Net does. Without `size` the map is a square. Raises ValueError for tokens of no such map.
    """
    tensor = output if isinstance(output, Tensor) else output[0]
    if tensor.ndim == 4:
        return tensor
    tokens = tensor.shape[1]
    height, width = size or (math.isqrt(tokens), math.isqrt(tokens))
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    if height * width != tokens:
        raise ValueError(f"{tokens} tokens are no map of an input of {size or 'equal sides'}")
    return tensor.transpose(1, 2).unflatten(2, (height, width))


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
