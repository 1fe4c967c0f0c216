"""The feature codecs in torch, batched, on the tensors' device. `dequantise` returns exactly the values of
`shards.codec`. The others return those of `shards.codec` and `shards.rotated_codec` up to the rounding of sums.

Shapes: B entries, C channels, H x W positions. Only `q`, `mu` and `step` are copied between device and host.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shards.calibration import Calibration
from shards.codec import DITHER_TABLE_SIZE, dither_table


@functools.lru_cache(maxsize=8)
def _table_on(device: torch.device, copies: int) -> Tensor:
    """The dither table several times in a row, so that a run which wraps around is still one slice."""
    return torch.from_numpy(dither_table()).repeat(copies).to(device)


def dither(offsets: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """B offsets, shape (C, H, W) -> (B, C, H, W) float32 on `device`."""
    count = math.prod(shape)
    table = _table_on(device, 1 + math.ceil(count / DITHER_TABLE_SIZE))
    return torch.stack([table[offset : offset + count] for offset in offsets]).view(-1, *shape)


def quantise(x: Tensor, snr_db: float, offsets: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, H, W) -> q (B, C, H, W) in the narrowest integer type, mu (B, C) and step (B,) float32."""
    x = x.float()
    mu = x.mean(dim=(2, 3))
    q, step = _quantise_centred(x - mu[:, :, None, None], snr_db, offsets)
    return q, mu, step


def _quantise_centred(centred: Tensor, snr_db: float, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(B, C, H, W) float32 whose power is the signal's -> q in the narrowest integer type, step (B,)."""
    peak = centred.abs().amax(dim=(1, 2, 3))
    power = (centred / peak[:, None, None, None]).square().mean(dim=(1, 2, 3))
    step = torch.where(peak > 0, (12.0 * 10.0 ** (-snr_db / 10.0) * power).sqrt() * peak, 0.0)
    q = torch.round(centred / step[:, None, None, None] + dither(offsets, centred.shape[1:], centred.device))
    q = torch.where(step[:, None, None, None] > 0, q, 0.0)
    low, high = q.aminmax()
    return q.to(narrowest_dtype(int(low), int(high))), step


def dequantise(q: Tensor, mu: Tensor, step: Tensor, offsets: Sequence[int]) -> Tensor:
    """q (B, C, H, W) integers, mu (B, C), step (B,), B offsets -> (B, C, H, W) float32."""
    u = dither(offsets, q.shape[1:], q.device)
    return (q.float() - u) * step[:, None, None, None] + mu[:, :, None, None]


def quantise_rotated(
    x: Tensor, mu: Tensor, rotation: Tensor, snr_db: float, offsets: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """x (B, C, H, W), mu (C,), rotation (C, C) -> q (B, C, H, W) in the narrowest integer type, step (B,) float32.

    As `shards.rotated_codec.quantise`.
    """
    centred = x.float() - mu[:, None, None]
    y = torch.matmul(rotation, centred.flatten(2)).view_as(centred)
    q, step = _quantise_centred(y, snr_db, offsets)
    # An int8 does not hold the negative of -128.
    wide = q.int()
    wide = torch.where(dither(offsets, q.shape[1:], q.device) < 0, -wide, wide)
    low, high = wide.aminmax()
    return wide.to(narrowest_dtype(int(low), int(high))), step


def dequantise_rotated(q: Tensor, mu: Tensor, rotation: Tensor, step: Tensor, offsets: Sequence[int]) -> Tensor:
    """q (B, C, H, W) integers, mu (C,), rotation (C, C), step (B,), B offsets -> (B, C, H, W) float32.

    As `shards.rotated_codec.dequantise`; on a GPU that multiplies in TF32, up to that, which is about 60 dB.
    """
    u = dither(offsets, q.shape[1:], q.device)
    y = (torch.where(u < 0, -q.float(), q.float()) - u) * step[:, None, None, None]
    return torch.matmul(rotation.T, y.flatten(2)).view_as(y) + mu[:, None, None]


def on_device(calibrations: Mapping[str, Calibration], device: torch.device | str) -> dict[str, tuple[Tensor, Tensor]]:
    """mu (C,) and rotation (C, C) of each tap, as tensors on a device."""
    return {
        tap: (torch.from_numpy(found.mu).to(device), torch.from_numpy(found.rotation).to(device))
        for tap, found in calibrations.items()
    }


def narrowest_dtype(low: int, high: int) -> torch.dtype:
    candidates = (torch.int8, torch.int16, torch.int32)
    return next(d for d in candidates if low >= torch.iinfo(d).min and high <= torch.iinfo(d).max)
