"""Stage one, first half. Images + captions -> latents/: VAE latents and conditioning, in shards.

image -> RGB -> uint8 of one size -> VAE posterior -> latents (sampled, scaled, fp16); caption -> prompt_embeds (fp16).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from pipeline.cache import sizes
from pipeline.cache.latents import encoders_spec
from pipeline.cache.output import claim, existing_manifest, finished_heads, share_unfinished
from pipeline.core import draws
from pipeline.core.buckets import Size, bucket_sizes
from pipeline.data.buckets import Assignment, assign
from pipeline.data.images import Crop
from pipeline.data.inputs import count_unchanged, remember, settled_spec
from pipeline.data.loading import Framing, LoadedImage, load_images, without_skipped
from pipeline.data.preview import preview
from pipeline.data.records import Record, inputs_sha256
from pipeline.data.source import OpenSource, open_source
from pipeline.models.encoders import encode_images, latents_shape
from pipeline.models.families import Family, Frame, Shapes, family_of_spec
from pipeline.models.hashing import library_versions
from pipeline.models.load import family_of, find_pipeline, load_base
from pipeline.settings.encode import EncodeSettings
from pipeline.system.compiling import compile_failures, compile_networks
from pipeline.system.device import DTYPES, is_accelerator, leave_processes, process_state
from pipeline.system.disk import format_bytes, free_line, require_space
from pipeline.system.echo import one_line, plural, say
from pipeline.system.errors import UserError
from pipeline.system.lock import NoLock, OutputLock, lock_of
from pipeline.system.options import range_of
from pipeline.system.output import check_address, check_output, made_by
from pipeline.system.settings import write_settings
from pipeline.system.signals import signals_interrupt
from pipeline.system.threads import in_background
from shards.buckets import BUCKETS, BUCKETS_FILE, of_bucket
from shards.buckets import counts as bucket_counts
from shards.codec import decode_npy, encode_npy
from shards.kept import Kept, read_kept
from shards.location import Location, Url
from shards.manifest import Manifest, known_to, read_file, refuse_other_spec
from shards.plan import PlannedShard, ShardPlan, count_entries
from shards.schema import (
    FORMAT_VERSION,
    LATENTS,
    MANIFEST,
    conditioning_shapes,
    empty_prompt_file,
    image_key,
    image_of,
    stated_dtypes,
    stated_shapes,
)
from shards.sidecar import read_head
from shards.store import open_store
from shards.writer import EntryBuilder, write_shard

SKIPPED = "skipped.jsonl"
# Patterns of the files that are written before the manifest.
FIRST = (empty_prompt_file("*"), BUCKETS_FILE)


def run(settings: EncodeSettings) -> None:
    """Encode images and captions into latents and prompt embeddings, in shards."""
    check_out(settings)
    with lock_of(settings.out) as lock, signals_interrupt():
        write_latents(settings, lock)


def check_out(settings: EncodeSettings) -> None:
    """Raise UserError unless --out is new, empty, or holds latents."""
    inputs: dict[str, Location | str | None] = {"--data": settings.data, "--teacher": settings.teacher}
    if isinstance(settings.out, Url):
        check_address(settings.out, "encode", inputs, first=FIRST)
        return
    own = made_by(settings.out, "encode", MANIFEST)
    first = [path.name for pattern in FIRST for path in settings.out.glob(pattern)]
    check_output(settings.out, "encode", inputs, own=own, first=first)


def framing_of(settings: EncodeSettings, size: Size) -> Framing:
    return Framing(size, settings.crops_at_centre, settings.random_flip, settings.seed, settings.min_size)


def sizes_of(spec: dict[str, Any]) -> list[Size]:
    """(height, width) in pixels of the images of each bucket; without buckets that of the square."""
    if BUCKETS not in spec:
        return [(spec["resolution"], spec["resolution"])]
    return [(bucket["size"][0], bucket["size"][1]) for bucket in spec[BUCKETS]]


def write_latents(settings: EncodeSettings, lock: OutputLock | NoLock) -> None:
    """Claim --out and write the shards that it lacks."""
    state = process_state(settings.device)
    source = open_source(settings)
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    family, base = family_of(folder), load_base(folder, settings.variant)
    spec = latents_spec(settings, source, folder, base)
    with state.main_process_first():
        source, spec, files = in_buckets(settings, source, spec, base)
        spec = settled(settings, source, spec)
        empty = empty_prompt(base, family)
        check_shapes(settings, empty, conditioning_shapes(spec))
        files |= {empty_prompt_file(name): encode_npy(array) for name, array in empty.items()}
        with lock.claim() as alone:
            manifest = claim(settings.out, "latents", spec, alone=alone, files=files)
            if settings.retry_skipped and state.is_main_process:
                reopen_skipped(source, settings, manifest)
    unfinished, own = share_unfinished(settings.out, manifest, state, settings.shard_range)
    if not unfinished:
        leave_processes(state)
        if state.is_main_process:
            report(settings.out, manifest, "already finished, nothing to do: ")
        return

    text_encoders = [getattr(base, part) for part in family.encoders if part != "vae"]
    for text_encoder in text_encoders:
        text_encoder.to(state.device, DTYPES[settings.dtype])
    base.vae.to(state.device, vae_dtype(settings, base, family), memory_format=torch.channels_last)
    if settings.compile:
        compile_networks(state.device, base.vae.encoder, *text_encoders)
    if isinstance(settings.out, Path):
        needed = sizes.total_bytes(planned_sizes(spec, unfinished))
        require_space(settings.out, needed, "use a smaller --resolution")
    if state.is_main_process:
        write_settings(settings.out, "encode", settings)
        for line in [*shown_input(settings, source, spec), *source.notes()]:
            say(line)
        warn_truncated_captions(source, base, family)
    bar = tqdm(total=count_entries(own), unit="image", desc="encode", disable=not state.is_main_process)
    with bar as progress, compile_failures(settings.compile):
        for shard in own:
            records = shard_records(source, shard)
            kept = kept_batches(settings, shard, manifest, [record for _, record in records])
            remember(open_store(settings.out), manifest, shard, [record for _, record in records])
            left, skipped = after_kept(records, kept)
            progress.update(len(records) - len(left))
            framing = framing_of(settings, sizes_of(spec)[shard.bucket])
            entries = shard_entries(
                source, settings, framing, left, len(records), base, family, skipped, progress.update
            )
            if is_accelerator(state.device):
                entries = in_background(entries, 2 * settings.batch_size)
            write_shard(open_store(settings.out), shard.name, manifest, entries, skipped, kept)
    leave_processes(state)
    if state.is_main_process:
        report(settings.out, manifest, "")


def warn_truncated_captions(source: OpenSource, base: DiffusionPipeline, family: Family) -> None:
    """Print how many captions are longer than the text encoder reads."""
    truncated = family.count_truncated(base, [record.caption for record in source.records])
    if truncated:
        tokens = base.tokenizer.model_max_length
        say(f"note: {truncated} of {len(source.records)} captions exceed {tokens} tokens and were truncated")


def latents_spec(settings: EncodeSettings, source: OpenSource, folder: Path, base: DiffusionPipeline) -> dict[str, Any]:
    """What the latents are, whatever computes them."""
    family = family_of(folder)
    return {
        "stage": "latents",
        **family.spec,
        "entries": len(source.records),
        "entries_per_shard": settings.entries_per_shard,
        "inputs_sha256": inputs_sha256(source.records),
        "seed": settings.seed,
        "resolution": settings.resolution,
        "center_crop": settings.crops_at_centre,
        "random_flip": settings.random_flip,
        # Left out at its default, as by earlier versions.
        **({"min_size": settings.min_size} if settings.min_size else {}),
        "dtype": settings.dtype,
        **({"vae_dtype": "fp32"} if vae_dtype(settings, base, family) != DTYPES[settings.dtype] else {}),
        **stated_shapes(latents_shape(base.vae, settings.resolution), family.conditioning_shapes(folder)),
        **stated_dtypes(family.dtypes),
        **encoders_spec(base, family),
        "libraries": library_versions(),
    }


def in_buckets(
    settings: EncodeSettings, source: OpenSource, spec: dict[str, Any], base: DiffusionPipeline
) -> tuple[OpenSource, dict[str, Any], dict[str, bytes]]:
    """With --buckets: the source with its records sorted by bucket, the spec that says so, and the file that keeps
    which bucket each is in. Without it: the same source and spec, and no file.

    Buckets are those of existing latents in the output, if there are any. Raises UserError if these have none, or have
    other numbers of entries.
    """
    if not settings.buckets:
        return source, spec, {}
    found = existing_manifest(settings.out, "latents")
    if found is None:
        with tqdm(total=len(source.records), unit="image", desc="buckets") as progress:
            assigned = assign(source, settings.resolution, settings.min_size, settings.workers, progress.update)
    elif BUCKETS not in found.spec:
        raise UserError(f"{settings.out} was made without --buckets. Drop it, or choose another --out.")
    else:
        numbers = decode_npy(read_file(open_store(settings.out), found, BUCKETS_FILE))
        if len(numbers) != len(source.records):
            raise UserError(
                f"{settings.out} was made from other inputs: {len(numbers)} entries -> {len(source.records)}. Restore "
                "the inputs, or choose another output directory."
            )
        assigned = Assignment(sizes_of(found.spec), numbers)
    in_order = source.sorted(assigned.order())
    buckets = [
        {"size": size, "latents_shape": latents_shape(base.vae, *size), "entries": count}
        for size, count in zip(assigned.sizes, assigned.counts(), strict=True)
    ]
    # In place of the shape of them all.
    stated = {BUCKETS if name == "latents_shape" else name: value for name, value in spec.items()}
    stated |= {"inputs_sha256": inputs_sha256(in_order.records), BUCKETS: buckets}
    return in_order, stated, {BUCKETS_FILE: assigned.as_npy()}


def shown_input(settings: EncodeSettings, source: OpenSource, spec: dict[str, Any]) -> list[str]:
    """What a user should see of the input before a long run."""
    buckets = bucket_sizes(settings.resolution) if settings.buckets else None
    lines = preview(source, settings.resolution, settings.min_size, buckets)
    if settings.buckets:
        counts = zip(sizes_of(spec), bucket_counts(spec), strict=True)
        shown = ", ".join(f"{width} x {height}: {count}" for (height, width), count in counts)
        lines = [f"buckets, width x height: {shown}", *lines]
    return lines


def vae_dtype(settings: EncodeSettings, base: DiffusionPipeline, family: Family) -> torch.dtype:
    """The precision of the VAE: that of the settings, or float32 in place of fp16 where the VAE overflows in it."""
    upcasts = family.follows_force_upcast and base.vae.config.force_upcast and settings.dtype == "fp16"
    return torch.float32 if upcasts else DTYPES[settings.dtype]


def settled(settings: EncodeSettings, source: OpenSource, spec: dict[str, Any]) -> dict[str, Any]:
    """The spec as existing latents in the output state it, if the inputs are theirs. See `settled_spec`."""
    found = existing_manifest(settings.out, "latents")
    if found is None:
        return spec
    return settled_spec(open_store(settings.out), found, known_to(found.spec, spec), source.records)


def shard_records(source: OpenSource, shard: PlannedShard) -> list[tuple[int, Record]]:
    """(place in the input, record) for each image of a shard."""
    return [(index, source.records[index]) for index in shard.indices]


def kept_batches(
    settings: EncodeSettings, shard: PlannedShard, manifest: Manifest, records: list[Record]
) -> Kept | None:
    """The complete batches that an interrupted run kept of a shard, up to the first image that has changed since; None
    if there are none."""
    store = open_store(settings.out)
    kept = read_kept(store, shard.name, manifest)
    if kept is None:
        return None
    end = shard.indices.start + count_unchanged(store, shard, records, kept.skipped)
    count = sum(image_of(row.key) < end for row in kept.rows)
    return kept.first(count // settings.batch_size * settings.batch_size)


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


def reopen_skipped(source: OpenSource, settings: EncodeSettings, manifest: Manifest) -> None:
    """Mark the finished shards as unfinished that skipped an image which can be read now."""
    store, part = open_store(settings.out), range_of(settings.shard_range)
    unfinished = set(manifest.plan.unfinished(store, part))
    for shard in manifest.plan.shards[part]:
        if shard in unfinished:
            continue
        missing = {item["source_id"] for item in read_head(store, shard.name, manifest).skipped}
        records = [record for record in shard_records(source, shard) if record[1].source_id in missing]
        framing = framing_of(settings, sizes_of(manifest.spec)[shard.bucket])
        found = [image for image in load_images(source, framing, records, 1, 1) if image.problem is None]
        if found:
            say(f"rewriting {shard.name}: {len(found)} of its {len(missing)} skipped images can be read now")
            # First, because only the sidecar of older latents says which images had no caption.
            remember(store, manifest, shard, [record for _, record in shard_records(source, shard)])
            store.delete(manifest.sidecar_name(shard.name))


def shard_entries(
    source: OpenSource,
    settings: EncodeSettings,
    framing: Framing,
    records: list[tuple[int, Record]],
    size: int,
    base: DiffusionPipeline,
    family: Family,
    skipped: list[dict[str, str]],
    advance: Callable[[int], Any],
) -> Iterator[EntryBuilder]:
    """The entries of one shard of `size` images, of which the `records` are left. Images without pixels are appended to
    `skipped`. No batch crosses a shard."""
    ahead = 2 * max(settings.batch_size, settings.workers)
    loaded = load_images(source, framing, records, settings.workers, ahead)
    readable = without_skipped(loaded, skipped, settings.max_skipped * size, advance)
    while batch := list(itertools.islice(readable, settings.batch_size)):
        yield from encode_batch(batch, settings, base, family)
        advance(len(batch))


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


@torch.inference_mode()
def empty_prompt(base: DiffusionPipeline, family: Family) -> dict[str, np.ndarray]:
    """The conditioning of the empty prompt, fp16 without B, by name. Unconditional entries get it."""
    return {name: tensor[0].half().numpy() for name, tensor in family.encode_prompts(base, [""]).items()}


def check_shapes(settings: EncodeSettings, empty: dict[str, np.ndarray], stated: Shapes) -> None:
    """Raise UserError if the encoders do not return the shapes that the pipeline's configs state."""
    for name, array in empty.items():
        if array.shape != stated.get(name):
            raise UserError(
                f"--teacher {settings.teacher} encodes prompts to {name} of shape {array.shape}, but its configs state "
                f"{stated.get(name)}. Fix the configs of its tokenizer or text encoder."
            )


def report(out: Location, manifest: Manifest, prefix: str) -> None:
    """Print what the output holds, and list skipped images. Raises UserError if nothing was encoded."""
    heads = finished_heads(out, manifest)
    if heads is None:
        return
    skipped = [item for head in heads for item in head.skipped]
    encoded = sum(head.count for head in heads)
    with open_store(out).write(SKIPPED) as stream:
        stream.writelines(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in skipped)
    if not encoded:
        raise UserError(f"none of the images could be read. See {out / SKIPPED} for the reasons.")
    listed = (
        f", {len(skipped)} skipped (see {out / SKIPPED} for the reasons; --retry-skipped tries them again)"
        if skipped
        else ""
    )
    size = sum(head.bytes for head in heads)
    held = f"{plural(encoded, 'image')} in {plural(len(heads), 'shard')}"
    say(f"{prefix}{out} holds {held}, {format_bytes(size)}{listed}")


def plan(settings: EncodeSettings) -> list[str]:
    """What a run would write."""
    check_out(settings)
    source = open_source(settings)
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    base = load_base(folder, settings.variant)
    source, spec, _ = in_buckets(settings, source, latents_spec(settings, source, folder, base), base)
    found = existing_manifest(settings.out, "latents")
    if found is not None:
        refuse_other_spec(settings.out, found.spec, settled(settings, source, spec))
    version = found.version if found else FORMAT_VERSION
    shards = ShardPlan(spec["entries"], spec["entries_per_shard"], version=version, buckets=bucket_counts(spec))
    left = shards.unfinished(open_store(settings.out), range_of(settings.shard_range))
    return [
        f"entries: {spec['entries']} in {plural(len(shards), 'shard')}, {len(left)} of them still to write",
        *sizes.lines(planned_sizes(spec, left)),
        *free_line(settings.out),
        *shown_input(settings, source, spec),
        *source.notes(),
    ]


def planned_sizes(spec: dict[str, Any], shards: list[PlannedShard]) -> list[sizes.Planned]:
    """What the entries of shards take, for each bucket."""
    dtypes, conditioning = family_of_spec(spec).dtypes, conditioning_shapes(spec)
    return [
        sizes.Planned(
            f"{width} x {height} px",
            count_entries([shard for shard in shards if shard.bucket == bucket]),
            sizes.latents_entry(of_bucket(spec, bucket)["latents_shape"], conditioning, dtypes),
        )
        for bucket, (height, width) in enumerate(sizes_of(spec))
    ]
