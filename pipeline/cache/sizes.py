"""How many bytes an entry will take. Pure functions: shapes and settings in, bytes out."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.system.disk import format_bytes
from shards.calibration import Calibration
from shards.codec import EXACT_DTYPES
from shards.expected import NPY_HEADER
from shards.packing import pack
from shards.rotated_codec import quantise
from shards.schema import BLOCK, INPUT_NOISE, LATENTS, NOISE, TEACHER_PRED

# Approximate bytes: of the .json member per image and per tap, and of the sidecar per member.
META_BYTES, META_BYTES_PER_TAP, ROW_BYTES = 300, 90, 32

Shape = tuple[int, ...]


def latents_entry(
    latents: Shape, conditioning: Mapping[str, Shape], dtypes: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Bytes per member of an entry that `encode` writes: latents (C, H, W) and conditioning.

    `dtypes` are those of the tensors that are not fp16, by name.
    """
    sizes = {name: np.dtype(dtype).itemsize for name, dtype in (dtypes or {}).items()}
    return {
        "json": META_BYTES,
        LATENTS: npy_bytes(latents, 2),
        **{name: npy_bytes(shape, sizes.get(name, 2)) for name, shape in conditioning.items()},
    }


def cache_entry(
    latents: Shape,
    taps: Mapping[str, Mapping[str, Any]],
    codec: str,
    snr_db: float,
    input_noise: bool = False,
) -> dict[str, int]:
    """Bytes per member of an entry that `teacher-cache` writes.

    `taps` is as in a cache's spec: `shape` (C, H, W) and `stride` by name. Sizes are exact for the exact codecs; for
    the dither codec they are those of Gaussian features.
    """
    exact = EXACT_DTYPES.get(codec, np.dtype(np.float16)).itemsize
    return {
        "json": META_BYTES + META_BYTES_PER_TAP * len(taps),
        NOISE: npy_bytes(latents, 2),
        **({INPUT_NOISE: npy_bytes(latents, 2)} if input_noise else {}),
        TEACHER_PRED: npy_bytes(latents, exact),
        **{name: tap_bytes(tap["shape"], tap["stride"], codec, snr_db) for name, tap in taps.items()},
    }


def npy_bytes(shape: Iterable[int], itemsize: int) -> int:
    return NPY_HEADER + itemsize * math.prod(shape)


def tap_bytes(shape: Shape, stride: int, codec: str, snr_db: float) -> int:
    """Bytes of a tap (C, H, W) of which one position per stride x stride cell is kept."""
    kept = shape[0], shape[1] // stride, shape[2] // stride
    if codec in EXACT_DTYPES:
        return npy_bytes(kept, EXACT_DTYPES[codec].itemsize)
    return quantised_bytes(kept, snr_db)


@functools.cache
def quantised_bytes(kept: tuple[int, int, int], snr_db: float) -> int:
    """Bytes that the dither codec takes for Gaussian features of this shape, measured on a sample."""
    features = np.random.default_rng(0).standard_normal(kept, np.float32)
    nothing = Calibration(np.zeros(kept[0], np.float32), np.eye(kept[0], dtype=np.float32))
    q, _ = quantise(features, nothing, snr_db, 0)
    return len(pack(q)[0])


def stored_bytes(members: Mapping[str, int]) -> int:
    """Bytes of an entry on disk: a header and padding per member of the tar, and its row in the sidecar."""
    in_tar = sum(BLOCK + -(-size // BLOCK) * BLOCK for size in members.values())
    return in_tar + ROW_BYTES * len(members)


class Planned(NamedTuple):
    """So many entries of one size, in words, and the bytes per member of each."""

    size: str
    entries: int
    members: Mapping[str, int]


def total_bytes(planned: Sequence[Planned]) -> int:
    """Bytes of entries on disk."""
    return sum(entries * stored_bytes(members) for _, entries, members in planned)


def lines(planned: Sequence[Planned]) -> list[str]:
    """The sizes as a plan prints them: bytes per member, those of each bucket where there are several, and the total.

    The members are those of the bucket that has the most entries.
    """
    shown = max(planned, key=lambda each: each.entries)
    width = max(map(len, shown.members))
    several = [f"  {each.size}: {each.entries} of {stored_bytes(each.members):,} bytes" for each in planned]
    return [
        f"bytes per entry{f' of {shown.size}' if several[1:] else ''}, about:",
        *(f"  {name:<{width}} {size:>12,}" for name, size in shown.members.items()),
        f"  {'on disk':<{width}} {stored_bytes(shown.members):>12,}",
        *(["entries of each size, about:", *several] if several[1:] else []),
        f"total: about {format_bytes(total_bytes(planned))}",
    ]
