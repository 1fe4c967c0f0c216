"""Buckets: the runs of images of one size in a set whose images have several. A set without buckets is one run.

The spec of such latents has `buckets` in place of `latents_shape`: of each bucket its `size` (height, width) in pixels,
its `latents_shape` and its `entries`. The spec of a cache states the `entries` of each, and of each tap a list, with
what it states otherwise for each bucket.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from shards.schema import ShardError

BUCKETS = "buckets"
# Next to the latents: the bucket of each entry, in the order in which the input lists them.
BUCKETS_FILE = "buckets.npy"
# 2^64 divided by the golden ratio, made odd: Weyl's sequence of it is spread as evenly as one can be.
GOLDEN = 0x9E3779B97F4A7C15
# Steps whose buckets are found at once.
STEPS = 1 << 20
Item = TypeVar("Item")
Kind = TypeVar("Kind")


def counts(spec: dict[str, Any]) -> list[int]:
    """The entries of each bucket of one round, in order; without buckets, of the only run."""
    return [bucket["entries"] for bucket in spec[BUCKETS]] if BUCKETS in spec else [spec["entries"]]


def of_bucket(spec: dict[str, Any], bucket: int) -> dict[str, Any]:
    """What a spec says of the entries of one bucket, as the spec of a set with their size alone says it."""
    latents = spec.get("latents", spec)
    if BUCKETS not in latents:
        return spec
    own = {key: value for key, value in latents.items() if key != BUCKETS}
    own["latents_shape"] = latents[BUCKETS][bucket]["latents_shape"]
    if latents is spec:
        return own
    taps = {tap: stated[bucket] for tap, stated in spec.get("taps", {}).items()}
    return {**{key: value for key, value in spec.items() if key != BUCKETS}, "latents": own, "taps": taps}


def image_ends(spec: dict[str, Any]) -> list[int]:
    """Where in the input the images of each bucket end, by the spec of latents or of a cache; empty without buckets."""
    latents = spec.get("latents", spec)
    return list(itertools.accumulate(counts(latents))) if BUCKETS in latents else []


def bucket_at(ends: Sequence[int], image: int) -> int:
    """The bucket of the image at a place in the input, by `image_ends`; 0 without buckets.

    Raises ShardError for a place that no image has.
    """
    if ends and not 0 <= image < ends[-1]:
        raise ShardError(f"image {image} is none of the {ends[-1]} that the spec states")
    return bisect.bisect_right(ends, image)


def batched_alike(
    items: Iterable[Item], size: int, bucket_of: Callable[[Item], Kind]
) -> Iterator[tuple[Kind, list[Item]]]:
    """The items in batches of up to `size`, in order, each of one bucket (or of one kind of another sort), with that
    bucket."""
    for bucket, alike in itertools.groupby(items, bucket_of):
        while batch := list(itertools.islice(alike, size)):
            yield bucket, batch


def buckets_of_steps(sizes: Sequence[int], seed: int, first: int, steps: int) -> np.ndarray:
    """(steps,) int64: the bucket that each training step takes its batch from, from step `first` on.

    `sizes` are the entries of each bucket. Step n takes the bucket in which n / golden ratio + u, modulo 1, falls:
    each bucket has its share of [0, 1), and u belongs to the seed. So every stretch of steps has each bucket as often
    as its share demands, give or take a few. All is computed with 64-bit integers, alike on every machine.
    """
    sums = list(itertools.accumulate(sizes))
    # The last one that is not empty has all that the others leave.
    last = sums.index(sums[-1])
    ends = np.array([(end << 64) // sums[-1] for end in sums[:last]], np.uint64)
    start = np.random.Philox(key=np.array([seed, 1 << 63], np.uint64)).random_raw(1)[0]
    numbers = np.arange(first, first + steps, dtype=np.uint64) * np.uint64(GOLDEN) + start
    return np.searchsorted(ends, numbers, side="right")


def steps_before(sizes: Sequence[int], seed: int, step: int) -> list[int]:
    """How many of the steps before `step` take each bucket."""
    if len(sizes) == 1:
        return [step]
    found = np.zeros(len(sizes), np.int64)
    for first in range(0, step, STEPS):
        taken = buckets_of_steps(sizes, seed, first, min(STEPS, step - first))
        found += np.bincount(taken, minlength=len(sizes))
    return found.tolist()
