"""Random draws that belong to an entry and not to a run: a counter-based generator for each purpose.

A draw depends only on (seed, source id, round, purpose), and not on the batch, the shard, the process, the device or
earlier draws.
"""

from __future__ import annotations

import hashlib

import numpy as np

from shards.codec import DITHER_TABLE_SIZE


def generator(seed: int, source_id: str, round_index: int, purpose: str) -> np.random.Generator:
    """A Philox generator keyed by the sha256 of the four arguments, separated so that no two keys collide."""
    name = "\0".join((str(seed), source_id, str(round_index), purpose))
    return np.random.Generator(np.random.Philox(key=_first_uint64s(name, 2)))


def timestep(seed: int, source_id: str, round_index: int, strata: int, train_timesteps: int) -> int:
    """The timestep of an image in one round: uniform over [0, train_timesteps), stratified over rounds.

    Each of the first `strata` rounds takes another stratum (an equal part of the range), in an order drawn for the
    image. The next `strata` rounds go through them again in that order. Within a stratum, the rounds follow the van der
    Corput sequence (van der Corput 1935), rotated by a uniform draw (Cranley & Patterson 1976), so that rounds added
    later fall between the earlier ones.
    """
    draw = generator(seed, source_id, 0, "timestep")
    order, shifts = draw.permutation(strata), draw.random(strata)
    stratum = order[round_index % strata]
    offset = (radical_inverse(round_index // strata) + shifts[stratum]) % 1.0
    return min(int(train_timesteps * (stratum + offset) / strata), train_timesteps - 1)


def radical_inverse(index: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, ...: the binary digits of `index`, mirrored at the binary point."""
    value, digit = 0.0, 0.5
    while index:
        index, bit = divmod(index, 2)
        value, digit = value + bit * digit, digit / 2
    return value


def standard_normal(seed: int, source_id: str, round_index: int, purpose: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 Gaussian sample of `shape`."""
    return generator(seed, source_id, round_index, purpose).standard_normal(shape, dtype=np.float32)


def noise(seed: int, source_id: str, round_index: int, shape: tuple[int, ...], noise_offset: float) -> np.ndarray:
    """(C, H, W) float32 Gaussian noise; `noise_offset` scales one Gaussian value that is added per channel.

    The offset is from https://www.crosslabs.org/blog/diffusion-with-offset-noise, as in diffusers.
    """
    draw = generator(seed, source_id, round_index, "noise")
    drawn = draw.standard_normal(shape, dtype=np.float32)
    if noise_offset:
        drawn += np.float32(noise_offset) * draw.standard_normal((shape[0], 1, 1), dtype=np.float32)
    return drawn


def perturbed(seed: int, source_id: str, round_index: int, noise: np.ndarray, perturbation: float) -> np.ndarray:
    """`noise` (C, H, W) plus `perturbation` times more noise, float32: this is added to the latents.

    The target stays `noise` (Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion
    Models", as in diffusers).
    """
    more = standard_normal(seed, source_id, round_index, "perturbation", noise.shape)
    return noise.astype(np.float32) + np.float32(perturbation) * more


def is_unconditional(seed: int, source_id: str, round_index: int, fraction: float) -> bool:
    """Whether the entry gets the empty prompt."""
    return bool(generator(seed, source_id, round_index, "uncond").random() < fraction)


def token_offset(seed: int, source_id: str, round_index: int, tap: str, rows: int, columns: int) -> tuple[int, int]:
    """The row in [0, rows) and the column in [0, columns) that token sampling starts from."""
    bound = rows if rows == columns else (rows, columns)
    row, column = generator(seed, source_id, round_index, f"tokens/{tap}").integers(bound, size=2)
    return int(row), int(column)


def dither_offset(seed: int, source_id: str, round_index: int, tap: str) -> int:
    """The position in the dither table at which the entry's tap starts."""
    return int(generator(seed, source_id, round_index, f"dither/{tap}").integers(DITHER_TABLE_SIZE))


def _first_uint64s(name: str, count: int) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(name.encode()).digest(), "<u8")[:count].astype(np.uint64)
