"""The bytes of a quantised tap: lossless entropy coding with zstd, several quiet symbols to a byte.

zstd's Huffman codes spend at least one bit on a byte, however predictable it is. So channels whose values are small
are packed before: of a radius (the largest magnitude in the channel) up to 1 five values a byte, to base 3; up to 7 two
values a byte, to base 15. A zstd block ends after each class of channels, so that each has its own Huffman code.

A member is one zstd frame of

    classes      C bytes, the class of each channel
    the classes  from 1 on: the values of the channels of the class, in order, as follows

    0    all values are 0, nothing is stored
    1    base 3: byte i holds the values i, i + m, ..., i + 4m, the first as the lowest digit; a digit is value + 1
    2    base 15: byte i holds the values i and i + m, the first as the lowest digit; a digit is value + 7
    3    signed bytes
    4    signed 16-bit integers, as two planes: all low bytes, then all high bytes
    5    signed 32-bit integers, as four planes

where m = ceil(values / digits a byte), and digits past the last value are 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from shards.codec import compress, decompress
from shards.schema import ShardError


@dataclass(frozen=True)
class Packed:
    """A class of channels of which a byte holds `digits` values up to `radius`, as a number to the `base`."""

    radius: int
    digits: int

    @property
    def base(self) -> int:
        return 2 * self.radius + 1

    def size(self, count: int) -> int:
        """Bytes of `count` values."""
        return -(-count // self.digits)

    def pack(self, values: np.ndarray) -> bytes:
        digits = np.zeros((self.digits, self.size(values.size)), np.uint8)
        digits.ravel()[: values.size] = values.ravel() + self.radius
        packed = digits[-1]
        for digit in digits[-2::-1]:
            packed *= np.uint8(self.base)
            packed += digit
        return packed.tobytes()

    def unpack(self, data: bytes, count: int) -> np.ndarray:
        """(count,) int8. Raises ShardError for bytes that `pack` does not write."""
        values = np.frombuffer(b"".join(map(data.translate, self.tables)), np.int8)
        if np.frombuffer(data, np.uint8).max() >= self.base**self.digits or (values[count:] != -self.radius).any():
            raise ShardError(f"{self.digits} values a byte are packed in bytes that do not stand for any")
        return values[:count]

    @cached_property
    def tables(self) -> list[bytes]:
        """For each digit the value, as int8, that each of the 256 bytes holds there."""
        numbers = np.arange(256)
        digits = [numbers // self.base**place % self.base for place in range(self.digits)]
        return [(digit - self.radius).astype(np.int8).tobytes() for digit in digits]


@dataclass(frozen=True)
class Planes:
    """A class of channels of which a value takes `width` bytes, one plane for each."""

    width: int

    @property
    def radius(self) -> int:
        return 2 ** (8 * self.width - 1) - 1

    def size(self, count: int) -> int:
        """Bytes of `count` values."""
        return count * self.width

    def pack(self, values: np.ndarray) -> bytes:
        narrow = values.astype(f"<i{self.width}").reshape(-1, 1)
        return narrow.view(np.uint8).T.tobytes()

    def unpack(self, data: bytes, count: int) -> np.ndarray:
        """(count,) int8, int16 or int32."""
        planes = np.frombuffer(data, np.uint8).reshape(self.width, count)
        return np.ascontiguousarray(planes.T).view(f"<i{self.width}")[:, 0]


CODERS: dict[int, Packed | Planes] = {1: Packed(1, 5), 2: Packed(7, 2), 3: Planes(1), 4: Planes(2), 5: Planes(4)}
RADII = np.array([0, *(coder.radius for coder in CODERS.values())])


def pack(q: np.ndarray) -> tuple[bytes, int]:
    """q (C, h, w) integers -> the member's bytes, and their size uncompressed.

    Raises ValueError for integers beyond +-(2^31 - 1).
    """
    rows = q.reshape(len(q), math.prod(q.shape[1:]))
    low, high = (np.asarray(edge, np.int64) for edge in (rows.min(axis=1, initial=0), rows.max(axis=1, initial=0)))
    classes = np.searchsorted(RADII, np.maximum(-low, high)).astype(np.uint8)
    if (classes > max(CODERS)).any():
        raise ValueError("q holds integers beyond +-(2^31 - 1)")
    present = [number for number in CODERS if (classes == number).any()]
    parts = [classes.tobytes(), *(CODERS[number].pack(rows[classes == number]) for number in present)]
    return compress(parts), sum(map(len, parts))


def unpack(data: bytes | memoryview, raw_bytes: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack`: q of `shape` (C, h, w) in int8, int16 or int32, the narrowest that fits.

    Raises ShardError if the member is damaged or is not of this shape, before anything is allocated that is larger than
    values of this shape can take.
    """
    channels, positions = shape[0], math.prod(shape[1:])
    most = channels * (1 + 4 * positions)
    if not channels <= raw_bytes <= most:
        raise ShardError(f"it states {raw_bytes} bytes, but values of shape {list(shape)} take {channels} to {most}")
    raw = decompress(data, raw_bytes)
    classes = np.frombuffer(raw[:channels], np.uint8)
    counts = [members * positions for members in np.bincount(classes, minlength=len(RADII)).tolist()]
    if len(counts) > len(RADII):
        raise ShardError(f"a channel is of class {classes.max()}, which does not exist")
    sizes = {number: coder.size(counts[number]) for number, coder in CODERS.items() if counts[number]}
    if channels + sum(sizes.values()) != raw_bytes:
        raise ShardError(f"its channels take {channels + sum(sizes.values())} bytes, but it holds {raw_bytes}")
    dtype = np.int32 if counts[5] else np.int16 if counts[4] else np.int8
    q = np.zeros((channels, positions), dtype)
    start = channels
    for number, size in sizes.items():
        values = CODERS[number].unpack(raw[start : start + size], counts[number])
        q[classes == number] = values.reshape(-1, positions)
        start += size
    return q.reshape(shape)
