"""The rotated feature codec in numpy: the reference implementation.

Subtractive dithered quantisation, as in `shards.codec`, of channels that a tap's calibration has decorrelated:

    y    = rotation (x - mu)                                 at each position
    step = sqrt(12 * 10^(-snr_db/10) * mean(y^2))            one per entry and tap
    q    = sign(u) round(y / step + u)                       u uniform in [-1/2, 1/2), known to both sides
    y'   = (sign(u) q - u) * step                            |y' - y| <= step/2; the error is independent of y
    x'   = rotation^T y' + mu

A quiet value rounds away from 0 only towards the sign of its dither. With that sign taken out, q is 0 or 1 instead of
-1, 0 or 1, and costs fewer bits. The sign of a dither of 0 is +1.

A rotation keeps lengths, so x' has the error of y'. It is independent of x and has `snr_db` below the power of x - mu.
`shards.packing` turns `q` into bytes.
"""

from __future__ import annotations

import numpy as np

from shards.calibration import Calibration
from shards.codec import dither, quantise_centred


def rotated(x: np.ndarray, calibration: Calibration) -> np.ndarray:
    """x (C, h, w) float32 -> y (C, h, w) float32."""
    centred = x - calibration.mu[:, None, None]
    return (calibration.rotation @ centred.reshape(len(x), -1)).reshape(x.shape)


def quantise(x: np.ndarray, calibration: Calibration, snr_db: float, offset: int) -> tuple[np.ndarray, np.float32]:
    """x (C, h, w) float32 -> q (C, h, w) int32, step float32 (0 where x is mu everywhere)."""
    q, step = quantise_centred(rotated(x, calibration), snr_db, offset)
    return q * _signs(dither(offset, x.shape)).astype(np.int32), step


def _signs(u: np.ndarray) -> np.ndarray:
    """1 or -1 as float32; of 0 it is 1."""
    return np.where(u < 0, np.float32(-1), np.float32(1))


def dequantise_rotated(q: np.ndarray, step: float, offset: int) -> np.ndarray:
    """q (C, h, w) integers, step -> y' (C, h, w) float32."""
    u = dither(offset, q.shape)
    return (q.astype(np.float32) * _signs(u) - u) * np.float32(step)


def dequantise(q: np.ndarray, calibration: Calibration, step: float, offset: int) -> np.ndarray:
    """q (C, h, w) integers, step -> x' (C, h, w) float32."""
    y = dequantise_rotated(q, step, offset).reshape(len(q), -1)
    return (calibration.rotation.T @ y).reshape(q.shape) + calibration.mu[:, None, None]
