"""Shows what latents or a cache hold: the spec in short, bytes by member, timesteps, a sample; pictures on request."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pipeline.models.load import load_base
from pipeline.system.command import stage_command
from pipeline.system.errors import UserError
from pipeline.system.settings import REQUIRED, Settings, option
from shards.expected import expected_tensors
from shards.files import atomic_directory
from shards.manifest import Manifest, read_manifest
from shards.reader import StoredEntry, read_entry, read_sidecar, sound_sidecar
from shards.schema import LATENTS
from shards.writer import is_finished

# Entries whose timesteps make the histogram, and pictures that --images decodes: spread evenly over the set.
TIMESTEPS, PICTURES = 2000, 8
BINS, BAR = 10, 40
SHOWN = (
    "seed",
    "resolution",
    "dtype",
    "prediction_type",
    "codec",
    "noise_offset",
    "input_perturbation",
    "uncond_fraction",
    "strata",
)


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    directory: Path = option(REQUIRED, "Directory that `encode` or `teacher-cache` wrote.", argument=True)
    images: Path | None = option(None, "Folder to make, with some entries' latents decoded by the base's VAE.")


def run(settings: InspectSettings) -> None:
    """Show what latents or a cache hold: DIR is what `encode` or `teacher-cache` wrote."""
    shards = take_inventory(settings.directory)
    click.echo("\n".join([*spec_lines(shards.manifest), *count_lines(shards), *member_lines(shards)]))
    if not shards.entries:
        raise UserError(f"{settings.directory} holds no entries yet: run its stage again to write them")
    if shards.manifest.spec["stage"] == "cache":
        timesteps = [sample.meta["timestep"] for sample in shards.spread(TIMESTEPS)]
        click.echo("\n".join(histogram(timesteps, shards.manifest.spec["noise_scheduler"]["num_train_timesteps"])))
    (sample,) = shards.spread(1)
    click.echo(f"\nsample {sample.key}\n  caption: {sample.meta['caption']}\n  source: {sample.meta['source_id']}")
    if settings.images:
        click.echo(f"{save_images(shards, settings.images)} pictures in {settings.images}")


@dataclass
class Inventory:
    """The finished shards of a directory and their entries; `member_bytes` by member, headers not counted."""

    directory: Path
    manifest: Manifest
    shards: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    bytes: int = 0
    skipped: int = 0
    member_bytes: Counter[str] = field(default_factory=Counter)

    @property
    def entries(self) -> int:
        return sum(self.counts)

    def spread(self, count: int, tensors: tuple[str, ...] = ()) -> Iterator[StoredEntry]:
        """Up to `count` entries with the tensors named, evenly spread over all of them."""
        expected = expected_tensors(self.manifest.spec)
        ends = np.cumsum(self.counts)
        indices = np.unique(np.linspace(0, self.entries - 1, min(count, self.entries)).astype(int))
        owners = np.searchsorted(ends, indices, side="right")
        for owner in np.unique(owners):
            sidecar = read_sidecar(self.directory, self.shards[owner], self.manifest.spec_sha256)
            for index in indices[owners == owner]:
                place = int(index - ends[owner]) + self.counts[owner]
                yield read_entry(self.directory, sidecar, place, tensors, expected)


def take_inventory(directory: Path) -> Inventory:
    """Raises ShardError for a directory or a finished shard that is damaged; shards that are missing are left out."""
    stock = Inventory(directory, read_manifest(directory))
    for shard in stock.manifest.shard_names():
        if is_finished(directory, shard):
            sidecar = sound_sidecar(directory, shard, stock.manifest.spec_sha256)
            stock.shards.append(shard)
            stock.counts.append(sidecar.count)
            stock.bytes += sidecar.bytes
            stock.skipped += len(sidecar.skipped)
            lengths = sidecar.table[:, :, 1].sum(axis=0).tolist()
            stock.member_bytes.update(dict(zip(sidecar.members, lengths, strict=True)))
    return stock


def spec_lines(manifest: Manifest) -> list[str]:
    """The spec without what only machines compare."""
    spec = manifest.spec
    values = {**spec.get("latents", {}), **spec}
    lines = [f"{name}: {_short(values[name])}" for name in SHOWN if name in values]
    lines += [f"tap {tap}: {_short(t['shape'])}, stride {t['stride']}" for tap, t in spec.get("taps", {}).items()]
    return [f"stage: {spec['stage']}", *lines, f"spec_sha256: {manifest.spec_sha256}"]


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def count_lines(stock: Inventory) -> list[str]:
    rounds, planned = stock.manifest.rounds, len(stock.manifest.shard_names())
    unfinished = "" if len(stock.shards) == planned else " (unfinished)"
    skipped = f", {stock.skipped} skipped" if stock.skipped else ""
    lines = [f"shards: {len(stock.shards)} of {planned}{unfinished}", f"entries: {stock.entries}{skipped}"]
    return [f"rounds: {rounds}", *lines] if rounds else lines


def member_lines(stock: Inventory) -> list[str]:
    """Bytes of each member, mean over the entries and in all; then of the tars, with their headers."""
    totals = {**stock.member_bytes, "tars, with headers": stock.bytes}
    width = max(map(len, totals))
    head = f"\n{'member':<{width}}  {'bytes an entry':>14}  {'bytes in all':>16}"
    return [head, *(f"{name:<{width}}  {n / max(1, stock.entries):>14,.0f}  {n:>16,}" for name, n in totals.items())]


def histogram(values: list[int], end: int) -> list[str]:
    """A bar of #s for each tenth of [0, end)."""
    counts, edges = np.histogram(values, BINS, (0, end))
    lines = [
        f"{int(low):>5} to {int(high) - 1:<5} {'#' * round(BAR * n / counts.max()):<{BAR}} {n}"
        for low, high, n in zip(edges, edges[1:], counts, strict=False)
    ]
    return [f"\ntimesteps of {len(values)} entries", *lines]


def save_images(stock: Inventory, out: Path) -> int:
    """Some entries' latents as PNGs named by their keys. Raises UserError if there is no VAE to decode them with."""
    base = stock.directory / "base"
    if not (base / "vae").is_dir():
        raise UserError(f"--images needs base/vae, which {stock.directory} has not: give a cache of `teacher-cache`")
    if out.exists():
        raise UserError(f"--images {out} exists already: choose another folder, or remove it")
    samples = list(stock.spread(PICTURES, (LATENTS,)))
    pipe = load_base(base)
    with atomic_directory(out) as folder:
        for sample in samples:
            decode_latents(pipe, sample).save(folder / f"{sample.key}.png")
    return len(samples)


@torch.inference_mode()
def decode_latents(pipe: DiffusionPipeline, sample: StoredEntry) -> Image.Image:
    """latents (C, H, W), scaled -> an RGB picture."""
    latents = torch.tensor(sample.tensors[LATENTS].values, dtype=torch.float32)[None]
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample[0]
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


command = stage_command("inspect", InspectSettings, None, run)

if __name__ == "__main__":
    command()
