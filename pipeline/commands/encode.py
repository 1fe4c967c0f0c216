"""Stage one, first half. Images + captions -> latents/: VAE latents and conditioning, in shards.

image -> RGB -> uint8 of one size -> VAE posterior -> latents (sampled, scaled, fp16); caption -> prompt_embeds (fp16).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from pipeline.cache import sizes
from pipeline.cache.latents_spec import in_buckets, latents_spec, settled, sizes_of
from pipeline.cache.latents_writer import LatentsWriter, encoders_on, framing_of, shard_records
from pipeline.cache.output import claim, existing_manifest, finished_heads, share_unfinished
from pipeline.cache.planned import latents_sizes
from pipeline.cache.ray_actors import write_on_cluster
from pipeline.cache.ray_nodes import for_actors, open_latents_writer
from pipeline.core.buckets import bucket_sizes
from pipeline.data.inputs import remember, renew_times
from pipeline.data.loading import load_images
from pipeline.data.preview import preview
from pipeline.data.source import OpenSource, open_source
from pipeline.models.families import Family, Shapes
from pipeline.models.load import family_of, find_pipeline, load_base
from pipeline.settings.encode import EncodeSettings
from pipeline.system.device import leave_processes, process_state
from pipeline.system.disk import format_bytes, free_line, require_space
from pipeline.system.echo import plural, say
from pipeline.system.errors import UserError
from pipeline.system.lock import NoLock, OutputLock, lock_of
from pipeline.system.options import range_of
from pipeline.system.output import check_address, check_output, made_by
from pipeline.system.ray_cluster import Cluster, cluster_of
from pipeline.system.settings import write_settings
from pipeline.system.signals import signals_interrupt
from shards.buckets import BUCKETS_FILE
from shards.buckets import counts as bucket_counts
from shards.codec import encode_npy
from shards.location import Location, Url
from shards.manifest import Manifest, refuse_other_spec
from shards.plan import ShardPlan, count_entries
from shards.schema import FORMAT_VERSION, MANIFEST, conditioning_shapes, empty_prompt_file
from shards.sidecar import read_head
from shards.store import open_store

SKIPPED = "skipped.jsonl"
# Patterns of the files that are written before the manifest.
FIRST = (empty_prompt_file("*"), BUCKETS_FILE)


def run(settings: EncodeSettings) -> None:
    """Encode images and captions into latents and prompt embeddings, in shards."""
    check_out(settings)
    with lock_of(settings.out) as lock, cluster_of(settings) as cluster, signals_interrupt():
        write_latents(settings, lock, cluster)


def check_out(settings: EncodeSettings) -> None:
    """Raise UserError unless --out is new, empty, or holds latents."""
    inputs: dict[str, Location | str | None] = {"--data": settings.data, "--teacher": settings.teacher}
    if isinstance(settings.out, Url):
        check_address(settings.out, "encode", inputs, first=FIRST)
        return
    own = made_by(settings.out, "encode", MANIFEST)
    first = [path.name for pattern in FIRST for path in settings.out.glob(pattern)]
    check_output(settings.out, "encode", inputs, own=own, first=first)


def write_latents(settings: EncodeSettings, lock: OutputLock | NoLock, cluster: Cluster | None) -> None:
    """Claim --out and write the shards that it lacks, with the actors of a cluster if there is one."""
    state = process_state("cpu" if cluster else settings.device)
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
            if state.is_main_process:
                renew_times(open_store(settings.out), manifest, source.records)
                if settings.retry_skipped:
                    reopen_skipped(source, settings, manifest)
    unfinished, own = share_unfinished(settings.out, manifest, state, settings.shard_range)
    if not unfinished:
        leave_processes(state)
        if state.is_main_process:
            report(settings.out, manifest, "already finished, nothing to do: ")
        return

    if not cluster:
        encoders_on(state.device, base, family, settings)
    if isinstance(settings.out, Path):
        needed = sizes.total_bytes(latents_sizes(spec, unfinished))
        require_space(settings.out, needed, "use a smaller --resolution")
    if state.is_main_process:
        write_settings(settings.out, "encode", settings)
        for line in [*shown_input(settings, source, spec), *source.notes()]:
            say(line)
        warn_truncated_captions(source, base, family)
    bar = tqdm(total=count_entries(own), unit="image", desc="encode", disable=not state.is_main_process)
    with bar as progress:
        if cluster:
            opening = for_actors(settings, cluster), manifest.spec_sha256
            write_on_cluster(cluster, open_latents_writer, opening, own, settings.out, progress.update)
        else:
            LatentsWriter(settings, manifest, source, base, family).write(own, progress.update)
    leave_processes(state)
    if state.is_main_process:
        report(settings.out, manifest, "")


def warn_truncated_captions(source: OpenSource, base: DiffusionPipeline, family: Family) -> None:
    """Print how many captions are longer than the text encoder reads."""
    truncated = family.count_truncated(base, [record.caption for record in source.records])
    if truncated:
        tokens = base.tokenizer.model_max_length
        say(f"note: {truncated} of {len(source.records)} captions exceed {tokens} tokens and were truncated")


def shown_input(settings: EncodeSettings, source: OpenSource, spec: dict[str, Any]) -> list[str]:
    """What a user should see of the input before a long run."""
    buckets = bucket_sizes(settings.resolution) if settings.buckets else None
    lines = preview(source, settings.resolution, settings.min_size, buckets)
    if settings.buckets:
        counts = zip(sizes_of(spec), bucket_counts(spec), strict=True)
        shown = ", ".join(f"{width} x {height}: {count}" for (height, width), count in counts)
        lines = [f"buckets, width x height: {shown}", *lines]
    return lines


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
        *sizes.lines(latents_sizes(spec, left)),
        *free_line(settings.out),
        *shown_input(settings, source, spec),
        *source.notes(),
    ]
