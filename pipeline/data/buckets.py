"""Which bucket each image goes to: found once from the images' headers, and kept next to the latents.

A later run reads what is kept, so an image that was replaced or cannot be read any more changes no other one's place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.buckets import Size, bucket_sizes, nearest
from pipeline.data.loading import image_size
from pipeline.data.source import OpenSource
from pipeline.system.threads import ordered_map
from shards.codec import encode_npy


@dataclass(frozen=True)
class Assignment:
    """The `sizes` (height, width) of the buckets that have images, and of N entries in the order of the input the
    `numbers` (N,) uint8 of their buckets."""

    sizes: list[Size]
    numbers: np.ndarray

    def counts(self) -> list[int]:
        """The entries of each bucket."""
        return np.bincount(self.numbers, minlength=len(self.sizes)).tolist()

    def order(self) -> list[int]:
        """The entries sorted by bucket; within a bucket they keep their order."""
        return np.argsort(self.numbers, kind="stable").tolist()

    def as_npy(self) -> bytes:
        return encode_npy(self.numbers)


def assign(
    source: OpenSource, resolution: int, min_size: int, workers: int, advance: Callable[[int], Any]
) -> Assignment:
    """The nearest bucket of each entry by its image's aspect ratio. `advance(n)` is called when n more are done.

    An image that cannot be used, as far as its header shows, goes to the bucket that has the most: there it is one of
    many that `encode` may skip. Raises UserError for an image that cannot be read for a reason that may pass.
    """
    known = bucket_sizes(resolution)
    images = [list(same) for _, same in itertools.groupby(source.records, key=lambda record: record.location)]
    chosen: list[int | None] = []
    sizes = ordered_map(lambda same: image_size(source, same[0], min_size), images, workers, 4 * workers)
    for same, size in zip(images, sizes, strict=True):
        usable = None if size is None else nearest(size, known)
        chosen += [None if record.problem else usable for record in same]
        advance(len(same))
    found = np.bincount([number for number in chosen if number is not None], minlength=len(known))
    most = int(found.argmax()) if found.any() else known.index((resolution, resolution))
    numbers = np.array([most if number is None else number for number in chosen])
    used = np.unique(numbers)
    return Assignment([known[number] for number in used], np.searchsorted(used, numbers).astype(np.uint8))
