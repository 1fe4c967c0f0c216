"""What the rotated codec knows of a tap before it sees an entry: the channels' means and principal directions.

    mu       = mean of the tap's vectors, one value per channel
    rotation = eigenvectors of their covariance, by falling variance    the Karhunen-Loeve transform, KLT

After the rotation the channels are uncorrelated, and most of the power lies in a few of them. So most values are small
and cost few bits. Calibrations are stored in a safetensors file: `<tap>.mu` and `<tap>.rotation` for every tap.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import safetensors.numpy

from shards.schema import ShardError

MU, ROTATION, SPEC = "mu", "rotation", "spec_sha256"
# How far the squared length of a rotation's row may be from 1. Rounding to float32 stays far below this.
UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Calibration:
    """`mu` (C,) float32, and `rotation` (C, C) float32, whose rows are orthonormal."""

    mu: np.ndarray
    rotation: np.ndarray


class Moments:
    """The mean and the covariance of vectors that come in batches, in float64. They count from the first batch's mean,
    so that a large mean costs no digits."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, vectors: np.ndarray) -> None:
        """vectors (N, C) float32. Raises ValueError without vectors."""
        if vectors.ndim != 2 or not vectors.size:
            raise ValueError(f"vectors have shape {vectors.shape}, not (N, C) with N and C above 0")
        exact = vectors.astype(np.float64)
        if not self.count:
            channels = exact.shape[1]
            self.origin, self.total, self.squares = exact.mean(axis=0), np.zeros(channels), np.zeros((channels,) * 2)
        exact -= self.origin
        self.count += len(exact)
        self.total += exact.sum(axis=0)
        self.squares += exact.T @ exact

    def calibration(self) -> Calibration:
        """Each row's component of largest magnitude is positive, the first one if several are. With fewer than C
        vectors the last rows are some orthonormal basis of what the vectors do not reach."""
        mean = self.total / self.count
        _, directions = np.linalg.eigh(self.squares / self.count - np.outer(mean, mean))
        rotation = directions.T[::-1]
        largest = np.abs(rotation).argmax(axis=1, keepdims=True)
        rotation = rotation * np.where(np.take_along_axis(rotation, largest, axis=1) < 0, -1.0, 1.0)
        return Calibration((self.origin + mean).astype(np.float32), np.ascontiguousarray(rotation, np.float32))


def calibrate(vectors: np.ndarray) -> Calibration:
    """vectors (N, C) float32 -> the calibration of these N positions. Raises ValueError without vectors."""
    moments = Moments()
    moments.add(vectors)
    return moments.calibration()


def calibration_bytes(calibrations: Mapping[str, Calibration], spec_sha256: str = "") -> bytes:
    """Tap name -> calibration, as the bytes of a safetensors file; in its metadata the hash of the cache's spec. The
    same for the same calibrations."""
    tensors = {f"{tap}.{MU}": calibration.mu for tap, calibration in calibrations.items()}
    tensors |= {f"{tap}.{ROTATION}": calibration.rotation for tap, calibration in calibrations.items()}
    return safetensors.numpy.save(tensors, {SPEC: spec_sha256})


def spec_of_calibrations(data: bytes) -> str:
    """The hash of the spec of the cache that calibrations were learned for. `data` has been read before."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {}).get(SPEC, "")


def read_calibrations(data: bytes) -> dict[str, Calibration]:
    """The inverse of `calibration_bytes`, taps sorted by name. Raises ShardError if `data` is damaged.

    A changed value that leaves the rows of unit length is not noticed: the manifest's checksum is there for that.
    """
    try:
        tensors = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ShardError(f"it is not a safetensors file of calibrations ({error})") from None
    taps = sorted({name.rpartition(".")[0] for name in tensors})
    expected = {f"{tap}.{part}" for tap in taps for part in (MU, ROTATION)}
    if expected != set(tensors):
        lacks, more = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
        raise ShardError(f"it lacks {lacks or 'nothing'} and should not have {more or 'less'}")
    return {tap: _checked(tap, tensors[f"{tap}.{MU}"], tensors[f"{tap}.{ROTATION}"]) for tap in taps}


def _checked(tap: str, mu: np.ndarray, rotation: np.ndarray) -> Calibration:
    if mu.ndim != 1 or not mu.size or rotation.shape != 2 * mu.shape or {mu.dtype, rotation.dtype} != {np.dtype("<f4")}:
        raise ShardError(
            f"tap {tap}: mu is {list(mu.shape)} of {mu.dtype} and rotation {list(rotation.shape)} of {rotation.dtype}, "
            "not [C] and [C, C] of float32"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.square(rotation).sum(axis=1)
        if not (np.isfinite(mu).all() and (np.abs(lengths - 1) < UNIT_TOLERANCE).all()):
            raise ShardError(
                f"tap {tap}: mu has values that are not finite, or rotation has rows that are not unit vectors"
            )
    return Calibration(mu, rotation)
