"""`distill-sd inspect`: shows the contents of latents or a cache, and decodes some of its images on request."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pipeline.cache.parts import BASE
from pipeline.cache.readers import rolling_lines
from pipeline.cache.remote_parts import folder_of, take_part
from pipeline.models.load import load_base
from pipeline.settings.inspect_shards import InspectSettings
from pipeline.system.echo import plural, say
from pipeline.system.errors import UserError
from pipeline.system.output import check_new
from shards.buckets import BUCKETS
from shards.buckets import counts as bucket_counts
from shards.cache import check_image, images_manifest, open_images
from shards.expected import expected_tensors
from shards.files import atomic_directory
from shards.location import Location
from shards.manifest import Manifest, read_manifest
from shards.plan import PlannedShard
from shards.reader import ShardSet, StoredEntry, placed_head, read_entry
from shards.schema import IMAGES, LATENTS, ShardError
from shards.sidecar import Head, read_row, read_sidecar
from shards.store import Store, at_once, open_store
from shards.survey import has_gone

# The numbers of entries in the histogram and of images that --images decodes, spread evenly over the set.
TIMESTEPS, DECODED = 2000, 8
BINS, BAR = 10, 40
# The fields of the spec that are shown; the others matter only to programs.
SHOWN = (
    "seed",
    "resolution",
    "dtype",
    "prediction_type",
    "tap_set",
    "codec",
    "noise_offset",
    "input_perturbation",
    "uncond_fraction",
    "strata",
)


def run(settings: InspectSettings) -> None:
    """Show the contents of latents or a cache. DIR is the directory or address that `encode` or `teacher-cache` wrote
    to."""
    store = open_store(settings.directory)
    inventory = take_inventory(store, read_manifest(store))
    if settings.images:
        check_images(settings.directory, settings.images)
    say("\n".join([*spec_lines(inventory.manifest), *count_lines(inventory), *member_lines(inventory)]))
    if inventory.images:
        say("\n".join(["\nimages, each stored once:", *count_lines(inventory.images), *member_lines(inventory.images)]))
    if not inventory.entries:
        raise UserError(f"{settings.directory} holds no entries yet. Rerun its stage to write them.")
    if inventory.manifest.spec["stage"] == "cache":
        timesteps = [entry.meta["timestep"] for entry in inventory.spread(TIMESTEPS)]
        say("\n".join(histogram(timesteps, inventory.manifest.spec["noise_scheduler"]["num_train_timesteps"])))
    (entry,) = inventory.spread(1)
    say(f"\nentry {entry.key}\n  caption: {entry.meta['caption']}\n  source: {entry.meta['source_id']}")
    if settings.images:
        count = save_images(settings.directory, inventory, settings.images)
        say(f"Wrote {plural(count, 'image')} to {settings.images}.")


@dataclass
class Inventory:
    """The finished shards of a directory. `counts` are their entries, `member_bytes` exclude the tar headers. `images`
    are those of a cache whose entries do not hold them."""

    store: Store
    manifest: Manifest
    images: Inventory | None = None
    shards: list[PlannedShard] = field(default_factory=list)
    heads: dict[str, Head] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    bytes: int = 0
    skipped: int = 0
    member_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def entries(self) -> int:
        return sum(self.counts)

    @functools.cached_property
    def own_images(self) -> ShardSet | None:
        """The images of a cache whose entries do not hold them, opened."""
        return None if self.manifest.has_own_images else open_images(self.store, self.manifest)

    def spread(self, count: int, tensors: tuple[str, ...] = ()) -> Iterator[StoredEntry]:
        """Up to `count` entries, evenly spread over the set, each with its image's named tensors and caption."""
        ends = list(itertools.accumulate(self.counts))
        images = self.own_images
        expected = [expected_tensors(self.manifest, bucket) for bucket in range(len(bucket_counts(self.manifest.spec)))]

        def read(index: int) -> StoredEntry:
            owner = bisect.bisect_right(ends, index)
            shard, place = self.shards[owner], index - ends[owner] + self.counts[owner]
            row = read_row(self.store, self.heads[shard.name], place, self.manifest)
            own = tensors if images is None else ()
            entry = read_entry(self.store, shard.name, row, own, self.manifest, expected[shard.bucket])
            if images is not None:
                image_shard, image_row = images.row(shard.indices.start + place)
                check_image(f"{self.store}/{shard.name}", row, f"{images.store}/{image_shard}", image_row)
                given = images.manifest, images.expected_of(image_row.key)
                image = read_entry(images.store, image_shard, image_row, tensors, *given)
                entry = StoredEntry(entry.key, {**image.meta, **entry.meta}, image.tensors)
            return entry

        chosen = np.unique(np.linspace(0, self.entries - 1, min(count, self.entries)).astype(int)).tolist()
        return at_once(self.store, read, chosen)


def take_inventory(store: Store, manifest: Manifest) -> Inventory:
    """The inventory of a set, without missing shards. Raises ShardError if a shard is damaged."""
    images = None if manifest.has_own_images else take_inventory(store.folder(IMAGES), images_manifest(store))
    inventory = Inventory(store, manifest, images)
    unfinished = set(manifest.plan.unfinished(store))

    def look(shard: PlannedShard) -> tuple[Head, list[int]] | None:
        try:
            head = placed_head(store, shard, manifest)
            return head, read_sidecar(store, shard.name, manifest).places[:, :, 1].sum(axis=0).tolist()
        except ShardError:
            if has_gone(store, shard.name, manifest):
                return None
            raise

    finished = [shard for shard in manifest.plan if shard not in unfinished]
    for shard, found in zip(finished, at_once(store, look, finished), strict=True):
        if found is None:
            continue
        head, lengths = found
        inventory.shards.append(shard)
        inventory.heads[shard.name] = head
        inventory.counts.append(head.count)
        inventory.bytes += head.bytes
        inventory.skipped += len(head.skipped)
        inventory.member_bytes.update(dict(zip(head.members, lengths, strict=True)))
    return inventory


def spec_lines(manifest: Manifest) -> list[str]:
    """The fields of the spec that matter to a reader."""
    spec = manifest.spec
    values = {**spec.get("latents", {}), **spec}
    lines = [f"{name}: {_short(values[name])}" for name in SHOWN if name in values]
    if BUCKETS in spec:
        of_images = spec.get("latents", spec)[BUCKETS]
        lines += [
            f"bucket {images['size'][1]} x {images['size'][0]} px: latents {_short(images['latents_shape'])}, "
            f"{plural(own['entries'], 'entry', 'entries')}{' a round' if manifest.is_cache else ''}"
            for images, own in zip(of_images, spec[BUCKETS], strict=True)
        ]
    for tap, stated in spec.get("taps", {}).items():
        for each in stated if isinstance(stated, list) else [stated]:
            lines.append(f"tap {tap}: {_short(each['shape'])}, stride {each['stride']}")
    return [f"stage: {spec['stage']}", *lines, f"spec_sha256: {manifest.spec_sha256}"]


def count_lines(inventory: Inventory) -> list[str]:
    rounds, planned = inventory.manifest.rounds, len(inventory.manifest.plan)
    if inventory.manifest.window is not None:
        there = {shard.name for shard in inventory.shards}
        return [*rolling_lines(inventory.store, inventory.manifest, there), f"entries there: {inventory.entries}"]
    unfinished = "" if len(inventory.shards) == planned else " (unfinished)"
    skipped = f", {inventory.skipped} skipped" if inventory.skipped else ""
    lines = [f"shards: {len(inventory.shards)} of {planned}{unfinished}", f"entries: {inventory.entries}{skipped}"]
    return [f"rounds: {rounds}", *lines] if rounds else lines


def member_lines(inventory: Inventory) -> list[str]:
    """Bytes per member, as a mean over the entries and in total; then of the tars, with their headers."""
    totals = {**inventory.member_bytes, "tars, with headers": inventory.bytes}
    width, entries = max(map(len, totals)), max(1, inventory.entries)
    head = f"\n{'member':<{width}}  {'bytes per entry':>15}  {'total bytes':>16}"
    return [head, *(f"{name:<{width}}  {n / entries:>15,.0f}  {n:>16,}" for name, n in totals.items())]


def histogram(values: list[int], end: int) -> list[str]:
    """A bar of #s for each of BINS equal parts of [0, end)."""
    counts, edges = np.histogram(values, BINS, (0, end))
    lines = [
        f"{int(low):>5} to {int(high) - 1:<5} {'#' * round(BAR * n / counts.max()):<{BAR}} {n}"
        for low, high, n in zip(edges, edges[1:], counts, strict=False)
    ]
    return [f"\ntimesteps of {plural(len(values), 'entry', 'entries')}", *lines]


def check_images(directory: Location, out: Path) -> None:
    """Raise UserError if there is no VAE to decode images with, or if `out` is in use or belongs to something else."""
    if not open_store(directory).exists(f"{BASE}/vae/config.json"):
        raise UserError(f"--images needs base/vae, which {directory} lacks. Pass a cache that `teacher-cache` wrote.")
    check_new(out, "inspect", {"DIR": directory}, flag="--images")


def save_images(directory: Location, inventory: Inventory, out: Path) -> int:
    """Decode some entries' latents to PNGs named by their keys, with the VAE in `directory`; returns how many."""
    entries = list(inventory.spread(DECODED, (LATENTS,)))
    folder = folder_of(directory, inventory.manifest)
    if folder != directory:
        take_part(inventory.store, inventory.manifest, BASE, folder)
    pipe = load_base(folder / BASE)
    with atomic_directory(out) as folder:
        for entry in entries:
            decode_latents(pipe, entry).save(folder / f"{entry.key}.png")
    return len(entries)


@torch.inference_mode()
def decode_latents(pipe: DiffusionPipeline, entry: StoredEntry) -> Image.Image:
    """Scaled latents (C, H, W) -> an RGB image."""
    latents = torch.tensor(entry.tensors[LATENTS].values, dtype=torch.float32)[None]
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample[0]
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
