"""Shows what latents or a cache hold: the spec in short, bytes by member, timesteps, a sample; pictures on request."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from pipeline import models
from pipeline.command import stage_command
from pipeline.errors import UserError
from pipeline.settings import REQUIRED, Settings, option
from shards.expected import expected_tensors
from shards.files import atomic_directory
from shards.manifest import Manifest, read_manifest
from shards.reader import Sample, Sidecar, read_entry, sound_sidecar
from shards.schema import LATENTS
from shards.writer import is_finished

# Entries whose timesteps make the histogram, and pictures that --images decodes: spread evenly over the set.
TIMESTEPS, PICTURES = 2000, 8
BINS, BAR = 10, 40
SHOWN = ("seed", "resolution", "dtype", "prediction_type", "codec", "noise_offset", "uncond_fraction", "strata")


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    directory: Path = option(REQUIRED, "Directory that `encode` or `teacher-cache` wrote.", argument=True)
    images: Path | None = option(None, "Folder to make, with some entries' latents decoded by the base's VAE.")


def run(settings: InspectSettings) -> None:
    """Show what latents or a cache hold: DIR is what `encode` or `teacher-cache` wrote."""
    directory = settings.directory
    manifest = read_manifest(directory)
    finished = [shard for shard in manifest.shard_names() if is_finished(directory, shard)]
    sidecars = [sound_sidecar(directory, shard, manifest.spec_sha256) for shard in finished]
    click.echo("\n".join([*spec_lines(manifest), *count_lines(manifest, sidecars), *member_lines(sidecars)]))
    if not sum(sidecar.count for sidecar in sidecars):
        raise UserError(f"{directory} holds no entries yet: run its stage again to write them")
    if manifest.spec["stage"] == "cache":
        click.echo("\n".join(histogram(timesteps(directory, sidecars), train_timesteps(manifest))))
    sample = read_entry(directory, *spread(sidecars, 1)[0], (), {})
    click.echo(f"\nsample {sample.key}\n  caption: {sample.meta['caption']}\n  source: {sample.meta['source_id']}")
    if settings.images:
        click.echo(f"{decode_images(settings, manifest, sidecars)} pictures in {settings.images}")


def spec_lines(manifest: Manifest) -> list[str]:
    """The spec without what only machines compare."""
    spec = manifest.spec
    values = {**spec.get("latents", {}), **spec}
    lines = [f"{name}: {_short(values[name])}" for name in SHOWN if name in values]
    lines += [f"tap {tap}: {_short(t['shape'])}, stride {t['stride']}" for tap, t in spec.get("taps", {}).items()]
    return [f"stage: {spec['stage']}", *lines, f"spec_sha256: {manifest.spec_sha256}"]


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def count_lines(manifest: Manifest, sidecars: list[Sidecar]) -> list[str]:
    planned = len(manifest.shard_names())
    skipped = sum(len(sidecar.skipped) for sidecar in sidecars)
    lines = [f"rounds: {manifest.rounds}"] if manifest.rounds else []
    lines += [f"shards: {len(sidecars)} of {planned}{'' if len(sidecars) == planned else ' (unfinished)'}"]
    return [*lines, f"entries: {sum(s.count for s in sidecars)}{f', {skipped} skipped' if skipped else ''}"]


def member_lines(sidecars: list[Sidecar]) -> list[str]:
    """Bytes of each member, mean over the entries and in all; then of the tars, with their headers."""
    totals: Counter[str] = Counter()
    for sidecar in sidecars:
        totals.update(dict(zip(sidecar.members, sidecar.table[:, :, 1].sum(axis=0).tolist(), strict=True)))
    totals["tars, with headers"] = sum(sidecar.bytes for sidecar in sidecars)
    entries = max(1, sum(sidecar.count for sidecar in sidecars))
    width = max(map(len, totals))
    head = f"\n{'member':<{width}}  {'bytes an entry':>14}  {'bytes in all':>16}"
    return [head, *(f"{name:<{width}}  {n / entries:>14,.0f}  {n:>16,}" for name, n in totals.items())]


def spread(sidecars: list[Sidecar], count: int) -> list[tuple[Sidecar, int]]:
    """Up to `count` entries, as (sidecar, place), evenly spread over all of them."""
    ends = np.cumsum([sidecar.count for sidecar in sidecars])
    chosen = np.unique(np.linspace(0, ends[-1] - 1, min(count, ends[-1])).astype(int))
    shards = np.searchsorted(ends, chosen, side="right")
    return [(sidecars[s], int(i - ends[s] + sidecars[s].count)) for i, s in zip(chosen, shards, strict=True)]


def timesteps(directory: Path, sidecars: list[Sidecar]) -> list[int]:
    chosen = spread(sidecars, TIMESTEPS)
    return [read_entry(directory, sidecar, place, (), {}).meta["timestep"] for sidecar, place in chosen]


def train_timesteps(manifest: Manifest) -> int:
    return manifest.spec["noise_scheduler"]["num_train_timesteps"]


def histogram(values: list[int], end: int) -> list[str]:
    """A bar of #s for each tenth of [0, end)."""
    counts, edges = np.histogram(values, BINS, (0, end))
    lines = [
        f"{int(low):>5} to {int(high) - 1:<5} {'#' * round(BAR * n / counts.max()):<{BAR}} {n}"
        for low, high, n in zip(edges, edges[1:], counts, strict=False)
    ]
    return [f"\ntimesteps of {len(values)} entries", *lines]


def decode_images(settings: InspectSettings, manifest: Manifest, sidecars: list[Sidecar]) -> int:
    """Some entries' latents as PNGs named by their keys. Raises UserError if there is no VAE to decode them with."""
    directory, out = settings.directory, settings.images
    if not (directory / "base" / "vae").is_dir():
        raise UserError(f"--images needs base/vae, which {directory} has not: give a cache that `teacher-cache` wrote")
    if out.exists():
        raise UserError(f"--images {out} exists already: choose another folder, or remove it")
    expected = expected_tensors(manifest.spec)
    chosen = [
        read_entry(directory, sidecar, place, [LATENTS], expected) for sidecar, place in spread(sidecars, PICTURES)
    ]
    base = models.load_base(directory / "base")
    with atomic_directory(out) as folder:
        for sample in chosen:
            decode_latents(base, sample).save(folder / f"{sample.key}.png")
    return len(chosen)


@torch.inference_mode()
def decode_latents(base: DiffusionPipeline, sample: Sample) -> Image.Image:
    """latents (C, H, W), scaled -> an RGB picture."""
    latents = torch.tensor(sample.tensors[LATENTS].values, dtype=torch.float32)[None]
    decoded = base.vae.decode(latents / base.vae.config.scaling_factor).sample[0]
    pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


command = stage_command("inspect", InspectSettings, None, run)

if __name__ == "__main__":
    command()
