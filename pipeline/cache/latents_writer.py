"""Writing the shards of latents: what a process holds for that, and how images become entries.

image -> pixels -> VAE posterior -> latents; caption -> conditioning -> entry -> shard, then sidecar.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from pipeline.cache.latents_spec import sizes_of, vae_dtype
from pipeline.core import draws
from pipeline.core.buckets import Size
from pipeline.data.images import Crop
from pipeline.data.inputs import count_unchanged, remember
from pipeline.data.loading import Framing, LoadedImage, load_images, without_skipped
from pipeline.data.records import Record
from pipeline.data.source import OpenSource
from pipeline.models.encoders import encode_images, latents_shape
from pipeline.models.families import Family, Frame
from pipeline.settings.encode import EncodeSettings
from pipeline.system.compiling import compile_failures, compile_networks
from pipeline.system.device import DTYPES, is_accelerator
from pipeline.system.echo import one_line
from pipeline.system.errors import UserError
from pipeline.system.threads import in_background
from shards.kept import Kept, read_kept
from shards.manifest import Manifest
from shards.plan import PlannedShard
from shards.schema import LATENTS, image_key, image_of
from shards.store import open_store
from shards.writer import EntryBuilder, write_shard


def encoders_on(device: torch.device, base: DiffusionPipeline, family: Family, settings: EncodeSettings) -> None:
    """Move the encoders of `base` to the device, in the precision of the settings, and compile them if that is asked
    for."""
    text_encoders = [getattr(base, part) for part in family.encoders if part != "vae"]
    for text_encoder in text_encoders:
        text_encoder.to(device, DTYPES[settings.dtype])
    base.vae.to(device, vae_dtype(settings, base, family), memory_format=torch.channels_last)
    if settings.compile:
        compile_networks(device, base.vae.encoder, *text_encoders)


@dataclass(frozen=True)
class LatentsWriter:
    """What a process holds to write shards of latents: the encoders of `base` on its device, and the images."""

    settings: EncodeSettings
    manifest: Manifest
    source: OpenSource
    base: DiffusionPipeline
    family: Family

    def write(self, shards: list[PlannedShard], advance: Callable[[int], Any]) -> None:
        """Write shards, one after another. `advance(n)` is called for every n images that are encoded, kept by an
        earlier run, or skipped."""
        with compile_failures(self.settings.compile):
            for shard in shards:
                self.write_one(shard, advance)

    def write_one(self, shard: PlannedShard, advance: Callable[[int], Any]) -> None:
        store, records = open_store(self.settings.out), shard_records(self.source, shard)
        here, crcs = [record for _, record in records], dict[str, int]()
        kept = self.kept_batches(shard, here)
        remember(store, self.manifest, shard, here)
        left, skipped = after_kept(records, kept)
        advance(len(records) - len(left))
        entries = self.entries(shard, left, skipped, crcs, advance)
        if is_accelerator(self.base.vae.device):
            entries = in_background(entries, 2 * self.settings.batch_size)
        try:
            write_shard(store, shard.name, self.manifest, entries, skipped, kept)
        except BaseException:
            # The batches that are kept are not read again.
            with suppress(OSError):
                remember(store, self.manifest, shard, here, crcs)
            raise
        remember(store, self.manifest, shard, here, crcs)

    def kept_batches(self, shard: PlannedShard, records: list[Record]) -> Kept | None:
        """The complete batches that an interrupted run kept of a shard, up to the first image that has changed since;
        None if there are none."""
        store, batch_size = open_store(self.settings.out), self.settings.batch_size
        kept = read_kept(store, shard.name, self.manifest)
        if kept is None:
            return None
        end = shard.indices.start + count_unchanged(store, shard, records, kept.skipped)
        count = sum(image_of(row.key) < end for row in kept.rows)
        return kept.first(count // batch_size * batch_size)

    def entries(
        self,
        shard: PlannedShard,
        records: list[tuple[int, Record]],
        skipped: list[dict[str, str]],
        crcs: dict[str, int],
        advance: Callable[[int], Any],
    ) -> Iterator[EntryBuilder]:
        """The entries of one shard, of which the `records` are left. Images without pixels are appended to `skipped`,
        and the CRC-32 of each other image is added to `crcs`. No batch crosses a shard."""
        settings = self.settings
        framing = framing_of(settings, sizes_of(self.manifest.spec)[shard.bucket])
        ahead = 2 * max(settings.batch_size, settings.workers)
        loaded = load_images(self.source, framing, records, settings.workers, ahead)
        allowed = settings.max_skipped * len(shard.indices)
        readable = without_skipped(loaded, skipped, allowed, advance)
        while batch := list(itertools.islice(readable, settings.batch_size)):
            crcs |= {image.record.source_id: image.crc32 for image in batch if image.crc32 is not None}
            yield from encode_batch(batch, settings, self.base, self.family)
            advance(len(batch))


def framing_of(settings: EncodeSettings, size: Size) -> Framing:
    return Framing(size, settings.crops_at_centre, settings.random_flip, settings.seed, settings.min_size)


def shard_records(source: OpenSource, shard: PlannedShard) -> list[tuple[int, Record]]:
    """(place in the input, record) for each image of a shard."""
    return [(index, source.records[index]) for index in shard.indices]


def after_kept(
    records: list[tuple[int, Record]], kept: Kept | None
) -> tuple[list[tuple[int, Record]], list[dict[str, str]]]:
    """The records of a shard behind the last kept entry, and the images that were skipped before it."""
    if not kept or not kept.rows:
        return records, []
    last = image_of(kept.rows[-1].key)
    done = {record.source_id for index, record in records if index <= last}
    left = [(index, record) for index, record in records if index > last]
    return left, [item for item in kept.skipped if item["source_id"] in done]


@torch.inference_mode()
def encode_batch(
    batch: list[LoadedImage], settings: EncodeSettings, base: DiffusionPipeline, family: Family
) -> list[EntryBuilder]:
    """One forward pass of the VAE's encoder and one of each text encoder."""
    ids = [image.record.source_id for image in batch]
    loaded = [image.pixels for image in batch if image.pixels is not None]
    assert len(loaded) == len(batch)
    pixels = torch.from_numpy(np.stack(loaded))
    shape = latents_shape(base.vae, *pixels.shape[1:3])
    noise = [draws.standard_normal(settings.seed, source_id, 0, "posterior", shape) for source_id in ids]
    latents = encode_images(base.vae, pixels, torch.from_numpy(np.stack(noise)))
    conditioning = family.encode_prompts(base, [image.record.caption for image in batch])
    stored = {name: t.half().cpu().numpy() for name, t in {LATENTS: latents, **conditioning}.items()}
    return [
        new_entry(
            image,
            {name: array[i] for name, array in stored.items()} | of_image(image, family),
            settings,
        )
        for i, image in enumerate(batch)
    ]


def of_image(image: LoadedImage, family: Family) -> dict[str, np.ndarray]:
    """The conditioning that belongs to the image and its crop, by name, in the dtypes that are stored."""
    assert image.crop is not None
    assert image.pixels is not None
    height, width, _ = image.pixels.shape
    conditioning = family.image_conditioning(frame_of(image.crop, (height, width)))
    return {name: tensor.numpy().astype(family.dtypes.get(name, "float16")) for name, tensor in conditioning.items()}


def frame_of(crop: Crop, size: Size) -> Frame:
    """What the pixels show. A crop that is flipped begins where it would if the image had been flipped before."""
    left = crop.resized[0] - size[1] - crop.left if crop.flip else crop.left
    return Frame(crop.original[::-1], (crop.top, left), size)


def new_entry(image: LoadedImage, arrays: dict[str, np.ndarray], settings: EncodeSettings) -> EntryBuilder:
    record = image.record
    assert image.crop is not None
    entry = EntryBuilder(
        image_key(image.index),
        {"source_id": record.source_id, "caption": record.caption, "crop": image.crop.as_json()},
    )
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            remedy = (
                "Remove the image; if others fail too, check the weights and configs of the teacher's VAE and text "
                "encoder, such as the scaling_factor."
                if settings.dtype == "fp32"
                else "Run with --dtype fp32, or remove the image."
            )
            raise UserError(
                f"the {name} of {one_line(record.source_id)} contain NaN or Inf in {settings.dtype}, or do not fit in "
                f"fp16. {remedy}"
            )
        entry.add_array(name, array)
    return entry
