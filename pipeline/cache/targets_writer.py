"""Writing the shards of a cache: what a process holds for that, and how images become entries.

images -> the teacher's targets, in batches -> compressed -> entries -> shard, then sidecar.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from pipeline.cache.calibrate import read_image
from pipeline.cache.targets import BatchTargets, Teacher, compress_targets, run_teacher
from pipeline.core.taps import Taps
from pipeline.models.families import family_of_spec
from pipeline.settings.teacher_cache import TeacherCacheSettings
from pipeline.system.compiling import compile_failures, compile_networks
from pipeline.system.device import DTYPES, is_accelerator
from pipeline.system.threads import in_background, ordered_map
from shards.buckets import of_bucket
from shards.cache import empty_prompt, same_image
from shards.kept import Kept, read_kept
from shards.manifest import Manifest
from shards.plan import PlannedShard
from shards.reader import ShardSet
from shards.store import open_store
from shards.writer import EntryBuilder, write_shard

# Threads that compress the teacher's targets. zstd releases the interpreter's lock.
PACKERS = 2


def teacher_on(
    device: torch.device,
    unet: UNet2DConditionModel,
    noise_scheduler: DDPMScheduler,
    spec: dict[str, Any],
    images: ShardSet,
    *,
    compile: bool,
) -> Teacher:
    """The teacher of a cache with this spec, moved to the device; without calibrations."""
    unet.to(device, DTYPES[spec["dtype"]], memory_format=torch.channels_last).eval().requires_grad_(False)
    if compile:
        compile_networks(device, unet)
    alphas_cumprod = noise_scheduler.alphas_cumprod.to(device)
    return Teacher(unet, family_of_spec(spec), Taps(unet, spec["taps"]), alphas_cumprod, empty_prompt(images))


@dataclass(frozen=True)
class TargetsWriter:
    """What a process holds to write shards of a cache: the teacher on its device, with calibrations, and the images
    that it is asked about."""

    settings: TeacherCacheSettings
    manifest: Manifest
    images: ShardSet
    teacher: Teacher

    def write(self, shards: list[PlannedShard], advance: Callable[[int], Any]) -> None:
        """Write shards, one after another. `advance(n)` is called for every n entries that are written or were kept.

        While a GPU computes a batch, the ones before it are compressed, also across shards.
        """
        store, kept = open_store(self.settings.out), self.kept_batches(shards)
        advance(sum(len(part.rows) for part in kept.values()))
        with compile_failures(self.settings.compile):
            entries = self.entries(shards, kept)
            for shard, of_shard in itertools.groupby(entries, key=lambda pair: pair[0]):
                write_shard(store, shard, self.manifest, counted(of_shard, advance), [], kept.get(shard))

    def kept_batches(self, shards: list[PlannedShard]) -> dict[str, Kept]:
        """The complete batches that interrupted runs kept, by shard, as far as they were made from these images. The
        last batch of a shard is left to be written."""
        found, batch_size = {}, self.settings.batch_size
        for shard in shards:
            kept = read_kept(open_store(self.settings.out), shard.name, self.manifest)
            if kept:
                current = zip(kept.rows, (self.images.row(index)[1] for index in shard.indices), strict=False)
                same = itertools.takewhile(lambda pair: same_image(*pair), current)
                count = min(sum(1 for _ in same), len(shard.indices) - 1)
                found[shard.name] = kept.first(count // batch_size * batch_size)
        return found

    def entries(self, shards: list[PlannedShard], kept: dict[str, Kept]) -> Iterator[tuple[str, EntryBuilder]]:
        """(shard, entry) of the shards in order, without what is `kept` of them."""
        targets = self.targets(shards, kept)
        compressed: Iterable[tuple[str, list[EntryBuilder]]]
        if is_accelerator(self.teacher.unet.device):
            compressed = ordered_map(compress, in_background(targets, 2), PACKERS, PACKERS + 1)
        else:
            compressed = map(compress, targets)
        for shard, entries in compressed:
            yield from ((shard, entry) for entry in entries)

    def targets(self, shards: list[PlannedShard], kept: dict[str, Kept]) -> Iterator[tuple[str, BatchTargets]]:
        """(shard, what the teacher computed) of each batch. No batch crosses a shard."""
        batch_size = self.settings.batch_size
        for shard in shards:
            assert shard.round is not None
            spec = of_bucket(self.manifest.spec, shard.bucket)
            done = len(kept[shard.name].rows) if shard.name in kept else 0
            for first in range(done, len(shard.indices), batch_size):
                batch = [read_image(self.images, index) for index in shard.indices[first : first + batch_size]]
                yield shard.name, run_teacher(batch, shard.round, spec, self.teacher)


def compress(targets: tuple[str, BatchTargets]) -> tuple[str, list[EntryBuilder]]:
    """The finished entries of a batch, with the shard that they belong to."""
    shard, batch = targets
    return shard, compress_targets(batch)


def counted(entries: Iterable[tuple[str, EntryBuilder]], advance: Callable[[int], Any]) -> Iterator[EntryBuilder]:
    for _, entry in entries:
        yield entry
        advance(1)
