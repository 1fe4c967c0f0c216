"""Aspect-ratio buckets: a fixed list of sizes with about the same area, and the one that fits an image best."""

from __future__ import annotations

from collections.abc import Sequence

# Of all sides, in pixels: the VAE and the U-Net together divide them by that.
STEP = 64
# The longest bucket, as its long side divided by its short one.
MAX_ASPECT = 2

Size = tuple[int, int]


def bucket_sizes(resolution: int) -> list[Size]:
    """(height, width) in pixels of each bucket of a resolution, from the tallest to the widest.

    All sides are multiples of STEP. The short sides go from `resolution` down, and each has the long side whose area
    is the closest to that of the square, as long as it is at most MAX_ASPECT times as long. Raises ValueError unless
    `resolution` is a multiple of STEP.
    """
    if resolution % STEP:
        raise ValueError(f"{resolution} is not a multiple of {STEP}")
    area = resolution * resolution
    pairs = [(short, (2 * area + short * STEP) // (2 * short * STEP) * STEP) for short in range(STEP, resolution, STEP)]
    tall = [(long, short) for short, long in pairs if short < long <= MAX_ASPECT * short]
    return [*tall, (resolution, resolution), *((width, height) for height, width in reversed(tall))]


def aspect_distance(image: Size, size: Size) -> float:
    """How many times longer than the other's one of two aspect ratios is: 1 if they are the same. Sizes are (height,
    width). Of an image that is cut to `size`, one part in so many is left."""
    products = image[0] * size[1], image[1] * size[0]
    return max(products) / min(products)


def nearest(image: Size, sizes: Sequence[Size]) -> int:
    """The number of the size whose aspect ratio is the nearest to an image's; of two that are equally near, the first.

    The products are exact and the division rounds alike everywhere, so the answer is the same on every machine.
    """
    return min(range(len(sizes)), key=lambda number: aspect_distance(image, sizes[number]))
