"""Stage one, first half. Images + captions -> latents/: VAE latents and prompt embeddings, in shards.

picture -> RGB -> square uint8 -> VAE posterior -> latents (sampled, scaled, fp16); caption -> prompt_embeds (fp16).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from pipeline.cache import sizes
from pipeline.cache.output import (
    claim,
    existing_manifest,
    finished_sidecars,
    range_of,
    share_unfinished,
    unfinished_shards,
)
from pipeline.core import draws
from pipeline.data.loading import Framing, LoadedImage, load_images, without_skipped
from pipeline.data.source import DataSettings, OpenSource, Record, inputs_sha256, open_source
from pipeline.models.encoders import encode_images, latents_shape
from pipeline.models.families.sd import count_truncated, encode_prompts
from pipeline.models.hashing import library_versions, weights_sha256
from pipeline.models.load import find_pipeline, load_base
from pipeline.system.command import stage_command
from pipeline.system.device import DTYPES, is_accelerator, process_state
from pipeline.system.disk import format_bytes, free_bytes, require_space
from pipeline.system.errors import UserError
from pipeline.system.options import DeviceOptions, HubOptions
from pipeline.system.settings import REQUIRED, option, write_settings
from pipeline.system.threads import in_background
from shards.codec import encode_npy
from shards.files import atomic_file
from shards.manifest import Manifest, refuse_other_spec
from shards.reader import read_sidecar
from shards.schema import EMPTY_PROMPT, LATENTS, PROMPT_EMBEDS, image_key, shard_names, sidecar_name
from shards.writer import EntryBuilder, is_finished, write_shard

SKIPPED = "skipped.jsonl"


@dataclass(frozen=True, kw_only=True)
class EncodeSettings(DataSettings, DeviceOptions, HubOptions):
    teacher: str = option(REQUIRED, "Stable Diffusion pipeline: a folder in diffusers layout, a hub's name, or demo.")
    out: Path = option(REQUIRED, "Directory to write the latents to.")
    resolution: int = option(512, "Side of the square training pictures, in pixels.", ge=8)
    center_crop: bool = option(False, "Crop the centre instead of a random place.")
    random_flip: bool = option(False, "Mirror half of the pictures, drawn at random.")
    batch_size: int = option(8, "Pictures in one forward pass.", ge=1)
    dtype: str = option("fp32", "Precision of the VAE and the text encoder.", choices=tuple(DTYPES))
    workers: int = option(4, "Threads that decode and resize pictures.", ge=1)
    entries_per_shard: int = option(1000, "Pictures in one shard.", ge=1)
    max_skipped: float = option(0.5, "Share of a shard's pictures that may be skipped; more stop the run.", ge=0, le=1)
    retry_skipped: bool = option(False, "Write those shards again that lack a picture which can be read by now.")
    shard_range: str | None = option(None, "Write only these of the planned shards, as 0:50: for jobs side by side.")

    def __post_init__(self) -> None:
        super().__post_init__()
        range_of(self.shard_range)
        if self.views > 1 and self.center_crop and not self.random_flip:
            raise UserError(
                f"--views {self.views} with --center-crop gives the same pixels each time: "
                "add --random-flip, or leave one of the two out"
            )

    @property
    def framing(self) -> Framing:
        return Framing(self.resolution, self.center_crop, self.random_flip, self.seed)


def run(settings: EncodeSettings) -> None:
    """Images and captions to latents and prompt embeddings, in shards."""
    state = process_state(settings.device)
    source = open_source(settings)
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    base = load_base(folder, settings.variant)
    spec = latents_spec(settings, source, base)
    with state.main_process_first():
        manifest = claim(settings.out, "latents", spec, files={EMPTY_PROMPT: empty_prompt_npy(base)})
        if settings.retry_skipped and state.is_main_process:
            take_up_skipped(source, settings, manifest)
    unfinished, mine = share_unfinished(settings.out, manifest, state, settings.shard_range)
    if not unfinished:
        if state.is_main_process:
            report(settings.out, manifest, "already finished, nothing to do: ")
        return

    base.to(state.device, DTYPES[settings.dtype])
    base.vae.to(memory_format=torch.channels_last)
    names = manifest.shard_names()
    pictures = sum(len(shard_records(source, settings, names.index(shard))) for shard in unfinished)
    require_space(settings.out, pictures * sizes.stored_bytes(entry_sizes(spec)), "give a smaller --resolution")
    if state.is_main_process:
        write_settings(settings.out, "encode", settings)
        warn_truncated_captions(source, base)
    planned = sum(len(shard_records(source, settings, names.index(shard))) for shard in mine)
    with tqdm(total=planned, unit="image", desc="encode", disable=not state.is_main_process) as progress:
        for shard in mine:
            skipped: list[dict[str, str]] = []
            entries = shard_entries(source, settings, names.index(shard), base, skipped, progress.update)
            if is_accelerator(state.device):
                entries = in_background(entries, 2 * settings.batch_size)
            write_shard(settings.out, shard, manifest.spec_sha256, entries, skipped)
    state.wait_for_everyone()
    if state.is_main_process:
        report(settings.out, manifest, "")


def warn_truncated_captions(source: OpenSource, base: DiffusionPipeline) -> None:
    """Tell how many captions the text encoder does not take in whole."""
    cut = count_truncated(base, [record.caption for record in source.records])
    if cut:
        tokens = base.tokenizer.model_max_length
        click.echo(f"note: {cut} of {len(source.records)} captions are longer than {tokens} tokens, and cut there")


def latents_spec(settings: EncodeSettings, source: OpenSource, base: DiffusionPipeline) -> dict[str, Any]:
    """What the latents are, apart from how they are computed."""
    return {
        "stage": "latents",
        "entries": len(source.records),
        "entries_per_shard": settings.entries_per_shard,
        "inputs_sha256": inputs_sha256(source.records),
        "seed": settings.seed,
        "resolution": settings.resolution,
        "center_crop": settings.center_crop,
        "random_flip": settings.random_flip,
        "dtype": settings.dtype,
        "latents_shape": latents_shape(base.vae, settings.resolution),
        "prompt_embeds_shape": (base.tokenizer.model_max_length, base.text_encoder.config.hidden_size),
        "scaling_factor": base.vae.config.scaling_factor,
        "vae_sha256": weights_sha256(base.vae),
        "text_encoder_sha256": weights_sha256(base.text_encoder),
        "libraries": library_versions(),
    }


def shard_records(source: OpenSource, settings: EncodeSettings, shard: int) -> list[tuple[int, Record]]:
    """(place in the whole input, record) of one shard."""
    first = shard * settings.entries_per_shard
    return list(enumerate(source.records[first : first + settings.entries_per_shard], first))


def take_up_skipped(source: OpenSource, settings: EncodeSettings, manifest: Manifest) -> None:
    """Let the finished shards count as unfinished that lack a picture which can be read by now."""
    names = manifest.shard_names()
    for shard in names[range_of(settings.shard_range)]:
        if not is_finished(settings.out, shard):
            continue
        lacking = {item["source_id"] for item in read_sidecar(settings.out, shard, manifest.spec_sha256).skipped}
        records = shard_records(source, settings, names.index(shard))
        again = [record for record in records if record[1].source_id in lacking]
        found = [item for item in load_images(source, settings.framing, again, 1, 1) if item.problem is None]
        if found:
            click.echo(f"{shard} is written again: {len(found)} of its {len(lacking)} skipped pictures can be read now")
            (settings.out / sidecar_name(shard)).unlink()


def shard_entries(
    source: OpenSource,
    settings: EncodeSettings,
    shard: int,
    base: DiffusionPipeline,
    skipped: list[dict[str, str]],
    advance: Callable[[int], Any],
) -> Iterator[EntryBuilder]:
    """The entries of one shard; what has no pixels goes to `skipped`. Batches end with the shard."""
    records = shard_records(source, settings, shard)
    ahead = 2 * max(settings.batch_size, settings.workers)
    loaded = load_images(source, settings.framing, records, settings.workers, ahead)
    readable = without_skipped(loaded, skipped, settings.max_skipped * len(records), advance)
    while batch := list(itertools.islice(readable, settings.batch_size)):
        yield from encode_batch(batch, settings, base)
        advance(len(batch))


@torch.inference_mode()
def encode_batch(batch: list[LoadedImage], settings: EncodeSettings, base: DiffusionPipeline) -> list[EntryBuilder]:
    """One forward pass of the VAE's encoder and one of the text encoder."""
    shape = latents_shape(base.vae, settings.resolution)
    ids = [item.record.source_id for item in batch]
    drawn = [draws.standard_normal(settings.seed, name, 0, "posterior", shape) for name in ids]
    pixels = torch.from_numpy(np.stack([item.pixels for item in batch]))
    latents = encode_images(base.vae, pixels, torch.from_numpy(np.stack(drawn)))
    prompt_embeds = encode_prompts(base, [item.record.caption for item in batch])
    stored = {LATENTS: latents.half().cpu().numpy(), PROMPT_EMBEDS: prompt_embeds.half().cpu().numpy()}
    return [
        entry_of(item, {name: array[i] for name, array in stored.items()}, settings) for i, item in enumerate(batch)
    ]


def entry_of(item: LoadedImage, arrays: dict[str, np.ndarray], settings: EncodeSettings) -> EntryBuilder:
    record = item.record
    entry = EntryBuilder(
        image_key(item.index),
        {"source_id": record.source_id, "caption": record.caption, "crop": item.crop.as_json()},
    )
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"the {name} of {record.source_id} hold NaN or Inf in {settings.dtype}, or do not fit fp16: "
                "run with --dtype fp32, or take the image out"
            )
        entry.add_array(name, array)
    return entry


@torch.inference_mode()
def empty_prompt_npy(base: DiffusionPipeline) -> bytes:
    """The embedding (L, D) fp16 of the empty prompt, which the teacher stage gives to unconditional entries."""
    return encode_npy(encode_prompts(base, [""])[0].half().numpy())


def report(out: Path, manifest: Manifest, prefix: str) -> None:
    """Say what the directory holds and list what was skipped. Raises UserError if nothing was encoded."""
    sidecars = finished_sidecars(out, manifest)
    if sidecars is None:
        return
    skipped = [item for sidecar in sidecars for item in sidecar.skipped]
    encoded = sum(sidecar.count for sidecar in sidecars)
    with atomic_file(out / SKIPPED) as stream:
        stream.writelines(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in skipped)
    if not encoded:
        raise UserError(f"none of the {len(skipped)} images could be read: the reasons are in {out / SKIPPED}")
    listed = f", {len(skipped)} skipped (reasons in {out / SKIPPED})" if skipped else ""
    size = sum(sidecar.bytes for sidecar in sidecars)
    click.echo(f"{prefix}{out} holds {encoded} images in {len(sidecars)} shards, {size / 1e6:.1f} MB{listed}")


def plan(settings: EncodeSettings) -> list[str]:
    """What a run would write."""
    source = open_source(settings)
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    base = load_base(folder, settings.variant)
    spec = latents_spec(settings, source, base)
    found = existing_manifest(settings.out, "latents")
    if found is not None:
        refuse_other_spec(settings.out, found.spec, spec)
    shards = shard_names(spec["entries"], spec["entries_per_shard"])
    left = shards if found is None else unfinished_shards(settings.out, found)
    return [
        f"entries: {spec['entries']} in {len(shards)} shards, {len(left)} of them still to write",
        *sizes.lines(entry_sizes(spec), spec["entries"]),
        f"free where it goes: {format_bytes(free_bytes(settings.out))}",
    ]


def entry_sizes(spec: dict[str, Any]) -> dict[str, int]:
    return sizes.latents_entry(spec["latents_shape"], spec["prompt_embeds_shape"])


command = stage_command("encode", EncodeSettings, plan, run)

if __name__ == "__main__":
    command()
