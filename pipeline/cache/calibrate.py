"""The calibrations of a cache's taps: learned once from the teacher's own features, before the first shard.

They are kept next to the manifest, which states their checksum, so every shard is quantised alike, whoever writes it.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.cache.targets import Image, Teacher, ask_teacher
from shards import device_codec
from shards.buckets import batched_alike, of_bucket
from shards.cache import stored_calibrations
from shards.calibration import Calibration, Moments, calibration_bytes
from shards.codec import EXACT_DTYPES
from shards.location import Location
from shards.manifest import Manifest, read_manifest, write_manifest
from shards.reader import ShardSet, read_entry
from shards.schema import CALIBRATION, MANIFEST, ShardError
from shards.sidecar import read_head
from shards.store import open_store

# Images to learn from: an eighth of them, at least 16 and at most 256. (See tests/benchmarks/codec.md.)
MOST, LEAST, PART = 256, 16, 8


def read_image(images: ShardSet, index: int) -> Image:
    shard, row = images.row(index)
    expected = images.expected_of(row.key)
    entry = read_entry(images.store, shard, row, expected, images.manifest, expected)
    return Image(entry, row.image_crc32)


def adopt_calibrations(out: Location, manifest: Manifest) -> Manifest:
    """The manifest of a cache, which states the calibrations next to it. They are there without it if a run was stopped
    between the two, or if the manifest was lost. Raises ShardError if they are another cache's."""
    store = open_store(out)
    exact = manifest.spec["codec"]["name"] in EXACT_DTYPES
    if exact or manifest.calibration_sha256 or not store.exists(CALIBRATION):
        return manifest
    data = store.read(CALIBRATION)
    manifest = replace(manifest, files={**manifest.files, CALIBRATION: hashlib.sha256(data).hexdigest()}, sealed=True)
    stored_calibrations(store, manifest)
    write_manifest(store, manifest)
    return manifest


def calibrated(out: Location, learning: Callable[[], dict[str, Calibration]]) -> Manifest:
    """The manifest of a cache with the calibrations of its taps: what `learning` returns, written now, unless they are
    there or the codec is exact. Raises ShardError if they are lost and shards exist that were made with them."""
    store = open_store(out)
    manifest = adopt_calibrations(out, read_manifest(store, "cache"))
    if manifest.spec["codec"]["name"] in EXACT_DTYPES:
        return manifest
    unfinished = {shard.name for shard in manifest.plan.unfinished(store)}
    first = next((shard.name for shard in manifest.plan if shard.name not in unfinished), None)
    if manifest.calibration_sha256:
        if first:
            # It raises, before any work, if that shard was written with other calibrations.
            read_head(store, first, manifest)
        return manifest
    if first:
        raise ShardError(
            f"{out} has shards, but the {CALIBRATION} that they were written with is missing. Restore it and "
            f"{MANIFEST} from a backup, or delete the shards and rerun the same command."
        )
    learned = learning()
    # Meanwhile another job may have written it, where the disk has no locks or is none.
    with suppress(FileExistsError), store.write(CALIBRATION, new=True) as stream:
        stream.write(calibration_bytes(learned, manifest.spec_sha256))
    return adopt_calibrations(out, read_manifest(store, "cache"))


def calibrations_on(device: torch.device, out: Location, manifest: Manifest) -> dict[str, tuple[Tensor, Tensor]]:
    """mu (C,) and rotation (C, C) of each tap of a cache, on the device; empty if its codec is exact."""
    return device_codec.on_device(stored_calibrations(open_store(out), manifest), device)


@torch.inference_mode()
def learn(images: ShardSet, spec: dict[str, Any], teacher: Teacher, batch_size: int) -> dict[str, Calibration]:
    """Run the teacher on images that are spread over the set, as in the first round."""
    moments = {tap: Moments() for tap in spec["taps"]}
    batches = list(batches_of(images.counts(), batch_size))
    for bucket, batch in tqdm(batches, unit="batch", desc="calibrate"):
        stated = of_bucket(spec, bucket)
        _, _, features = ask_teacher([read_image(images, index) for index in batch], 0, stated, teacher)
        for tap, kept in features.items():
            moments[tap].add(kept.float().cpu().movedim(1, -1).flatten(0, -2).numpy())
    return {tap: found.calibration() for tap, found in moments.items()}


def batches_of(images: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """The images to learn from, in batches, each with its bucket. `images` are those of each bucket."""
    total, ends = sum(images), list(itertools.accumulate(images))
    count = min(total, max(LEAST, min(MOST, total // PART)))
    chosen = np.linspace(0, total - 1, count).astype(int).tolist()
    yield from batched_alike(chosen, batch_size, lambda index: bisect.bisect_right(ends, index))
