"""Stage one, second half. latents/ -> cache/: the teacher's predictions and features at sampled timesteps.

(latents, conditioning) x rounds -> the teacher's targets -> entries, in shards.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import nn
from tqdm import tqdm

from pipeline.cache import sizes
from pipeline.cache.cache_spec import cache_spec, checked_taps, counted_entries, existing_cache, wanted_taps
from pipeline.cache.calibrate import adopt_calibrations, calibrated, calibrations_on, learn
from pipeline.cache.images import add_images, bytes_to_copy
from pipeline.cache.latents import captions_of, check_encoders, open_latents, sampling_size
from pipeline.cache.output import bind_parts, claim, finished_heads, refuse_other_window, share_unfinished
from pipeline.cache.parts import BASE, write_teacher_config
from pipeline.cache.planned import bytes_in_float32, bytes_left, cache_sizes, shards_left
from pipeline.cache.ray_actors import write_on_cluster
from pipeline.cache.ray_nodes import device_of, for_actors, learned_here, manifest_here, open_targets_writer
from pipeline.cache.readers import rolling_lines
from pipeline.cache.remote_parts import folder_of, put_folder, take_part
from pipeline.cache.rolling import rolling_shards
from pipeline.cache.students import save_students
from pipeline.cache.taps import sampling_lines
from pipeline.cache.targets_writer import TargetsWriter, teacher_on
from pipeline.models.families import family_of_spec
from pipeline.models.hashing import as_stated, deciding
from pipeline.models.load import find_pipeline, load_base, load_unet, unet_config
from pipeline.models.provenance import write_origin
from pipeline.models.schedule import load_noise_scheduler, set_prediction_type
from pipeline.models.students import levels_of
from pipeline.sampling.generate import INDEX, SAMPLES, GeneratedImages, Sampler, check_sampler, generate, save_images
from pipeline.sampling.process import PipelineRef, generate_in_process, load_pipeline
from pipeline.settings.teacher_cache import TeacherCacheSettings
from pipeline.system.compiling import compile_failures
from pipeline.system.device import DTYPES, leave_processes, process_state
from pipeline.system.disk import format_bytes, free_line, require_space
from pipeline.system.echo import plural, say
from pipeline.system.errors import UserError, attempt_all, failing_with
from pipeline.system.lock import NoLock, OutputLock, lock_of
from pipeline.system.output import check_address, check_output, made_by
from pipeline.system.ray_cluster import Cluster, cluster_of
from pipeline.system.settings import write_settings
from pipeline.system.signals import signals_interrupt
from shards.cache import stored_calibrations
from shards.location import Location, Url
from shards.manifest import Manifest, known_to, refuse_other_spec
from shards.plan import PlannedShard, count_entries
from shards.reader import ShardSet
from shards.readers import read_readers
from shards.schema import IMAGES, MANIFEST
from shards.store import open_store
from shards.window import wanted_shards

Generator = Callable[[list[str], Sampler], GeneratedImages]
SMALLER = "use fewer --rounds, a lower --snr-db or fewer --tokens"


def run(settings: TeacherCacheSettings) -> None:
    """Run the teacher on latents, in rounds, and store its predictions and features."""
    check_out(settings)
    with lock_of(settings.out) as lock, cluster_of(settings) as cluster, signals_interrupt():
        write_cache(settings, lock, cluster)


def check_out(settings: TeacherCacheSettings) -> None:
    """Raise UserError unless --out is new, empty, or holds a cache. Its own images may be its latents."""
    inputs: dict[str, Location | str | None] = {"--teacher": settings.teacher}
    if resolved(settings.latents) != resolved(settings.out / IMAGES):
        inputs = {"--latents": settings.latents, **inputs}
    if isinstance(settings.out, Url):
        check_address(settings.out, "teacher-cache", inputs)
        return
    own = made_by(settings.out, "teacher-cache", MANIFEST)
    check_output(settings.out, "teacher-cache", inputs, own=own)


def resolved(place: Location) -> str:
    return str(place.resolve() if isinstance(place, Path) else place)


def write_cache(settings: TeacherCacheSettings, lock: OutputLock | NoLock, cluster: Cluster | None) -> None:
    """Claim --out and write what it lacks: weights, shards, samples; with the actors of a cluster if there is one."""
    state = process_state("cpu" if cluster else settings.device)
    device = cluster.device if cluster else state.device
    latents = open_latents(settings.latents)
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    base = load_base(folder, settings.variant)
    noise_scheduler = load_noise_scheduler(folder, settings.prediction_type)
    check_encoders(latents, base, f"--teacher {settings.teacher}")
    check_samples(settings, latents, folder, base, noise_scheduler)
    base_bytes = bytes_in_float32(module for module in base.components.values() if isinstance(module, nn.Module))
    # The U-Net needs the memory that they take, and a large one no more of it than its files.
    del base
    unet = load_unet(folder, settings.variant, as_stored=True)
    spec = cache_spec(settings, latents, unet, noise_scheduler, device)
    if found := existing_cache(settings.out):
        refuse_other_spec(settings.out, found.spec, spec)
        # Before rounds are added: damaged ones would stop their making.
        stored_calibrations(open_store(settings.out), found)
    if isinstance(settings.out, Path):
        require_space(settings.out, bytes_left(settings, settings.out, latents, spec, base_bytes, unet), SMALLER)
    only = settings.window is not None and state.is_main_process
    with state.main_process_first(), lock.claim(only=only) as alone:
        manifest = claim(settings.out, "cache", spec, alone=alone, rounds=settings.rounds, window=settings.window)
        manifest = adopt_calibrations(settings.out, manifest)
        images = add_images(latents, settings.out, manifest, alone=alone)
        saved = save_students(settings, folder, unet, noise_scheduler)
        manifest = bind_parts(settings.out, manifest, saved)
        write_origin(settings.out, settings.teacher, folder, settings.revision, settings.latents)
    rolls, store = manifest.window is not None, open_store(settings.out)
    own: list[PlannedShard] = []
    if rolls:
        left = wanted_shards(manifest, read_readers(store)) is not None
    else:
        unfinished, own = share_unfinished(settings.out, manifest, state, settings.shard_range)
        left = bool(unfinished)
    # None of several jobs knows whether it is the last, so the images are left to a run without a range.
    wants_samples = settings.samples > 0 and not settings.shard_range and not has_samples(settings.out)
    if not left and not wants_samples:
        leave_processes(state)
        if state.is_main_process:
            wrote = (
                f"wrote {' and '.join(saved)}, all else was there: " if saved else "already finished, nothing to do: "
            )
            report(settings.out, manifest, wrote)
        return

    if state.is_main_process:
        # With the levels by name, by which `verify` knows what must be there.
        levels = levels_of(settings.students, family_of_spec(spec))
        write_settings(settings.out, "teacher-cache", replace(settings, students=levels))
        write_teacher_config(open_store(settings.out), unet)

    def generated(prompts: list[str], sampler: Sampler) -> GeneratedImages:
        if cluster:
            return cluster.once(generate_on_node, *opening_of(settings, cluster, manifest), prompts, sampler)
        pipeline = teacher_ref(settings, manifest, folder, device)
        return generate_in_process(pipeline, prompts, sampler, "teacher's samples")

    if rolls and wants_samples and state.is_main_process:
        # Students may be done, and show them, long before the last round.
        with failing_with("the teacher's images could not be generated", "Add --samples 0 to go on without."):
            save_teacher_samples(settings, images, folder, generated)
        wants_samples = False
    if cluster:
        manifest = write_on_nodes(settings, lock, cluster, manifest, own)
    else:
        manifest = write_here(settings, lock, state, manifest, images, unet, noise_scheduler, own)
    leave_processes(state)
    # The images need the memory that the teacher takes.
    del unet
    if state.is_main_process:
        finish(settings, manifest, images, folder, generated if wants_samples else None)


def write_here(
    settings: TeacherCacheSettings,
    lock: OutputLock | NoLock,
    state: PartialState,
    manifest: Manifest,
    images: ShardSet,
    unet: UNet2DConditionModel,
    noise_scheduler: DDPMScheduler,
    shards: list[PlannedShard],
) -> Manifest:
    """Write this process's shards. Returns the manifest, which states the calibrations."""
    teacher = teacher_on(state.device, unet, noise_scheduler, manifest.spec, images, compile=settings.compile)
    with state.main_process_first(), lock.claim(), compile_failures(settings.compile):
        learning = functools.partial(learn, images, manifest.spec, teacher, settings.batch_size)
        manifest = calibrated(settings.out, learning)
    teacher = replace(teacher, calibrations=calibrations_on(state.device, settings.out, manifest))
    rolls = manifest.window is not None
    with progress_bar(None if rolls else shards, state) as progress:
        writer = TargetsWriter(settings, manifest, images, teacher)
        for part in rolling_shards(open_store(settings.out), manifest, state) if rolls else [shards]:
            writer.write(part, progress.update)
    return manifest


def write_on_nodes(
    settings: TeacherCacheSettings,
    lock: OutputLock | NoLock,
    cluster: Cluster,
    manifest: Manifest,
    shards: list[PlannedShard],
) -> Manifest:
    """Write shards with the actors of a cluster. Returns the manifest, which states the calibrations."""
    opening = opening_of(settings, cluster, manifest)
    if shards:
        with lock.claim():
            manifest = calibrated(settings.out, lambda: cluster.once(learned_here, *opening))
    with progress_bar(shards, PartialState()) as progress:
        write_on_cluster(cluster, open_targets_writer, opening, shards, settings.out, progress.update)
    return manifest


def progress_bar(shards: list[PlannedShard] | None, state: PartialState) -> Any:
    """A bar of entries; without `shards`, of so many as will be wanted."""
    total = None if shards is None else count_entries(shards)
    return tqdm(total=total, unit="entry", desc="teacher-cache", disable=not state.is_main_process)


def opening_of(
    settings: TeacherCacheSettings, cluster: Cluster, manifest: Manifest
) -> tuple[TeacherCacheSettings, str]:
    """What a process of the cluster is told."""
    return for_actors(settings, cluster, dtype=manifest.spec["dtype"]), manifest.spec_sha256


def teacher_ref(settings: TeacherCacheSettings, manifest: Manifest, folder: Path, device: torch.device) -> PipelineRef:
    """The teacher as the cache's base/ and its own U-Net, to generate with."""
    base_folder = folder_of(settings.out, manifest)
    if isinstance(settings.out, Url):
        take_part(open_store(settings.out), manifest, BASE, base_folder)
    dtype = DTYPES[manifest.spec["dtype"]]
    return PipelineRef(base_folder / BASE, folder / "unet", device, dtype, settings.variant)


def generate_on_node(
    settings: TeacherCacheSettings, spec_sha256: str, prompts: list[str], sampler: Sampler
) -> GeneratedImages:
    """Images by the teacher, in a process of a cluster."""
    device, manifest = device_of(settings.device), manifest_here(settings.out, "cache", spec_sha256)
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    return generate(load_pipeline(teacher_ref(settings, manifest, folder, device)), prompts, sampler, None)


def finish(
    settings: TeacherCacheSettings, manifest: Manifest, latents: ShardSet, folder: Path, generated: Generator | None
) -> None:
    """Generate the samples if there is something to do that with, and tell what the cache holds, also if that fails."""

    def generate_samples() -> None:
        if generated:
            with failing_with(
                f"{settings.out} is complete, but the teacher's images could not be generated",
                "Rerun the same command to generate them, with --samples-batch-size 1 if memory ran out, "
                "or add --samples 0.",
            ):
                save_teacher_samples(settings, latents, folder, generated)

    attempt_all(generate_samples, lambda: report(settings.out, manifest, ""))


def save_teacher_samples(settings: TeacherCacheSettings, latents: ShardSet, folder: Path, generated: Generator) -> None:
    """Generate images with the teacher into the cache, from captions spread over the input.

    Students' reports show them next to their own.
    """
    sampler = samples_sampler(settings, latents, folder)
    images = generated(captions_of(latents, settings.samples), sampler)
    if isinstance(settings.out, Url):
        with tempfile.TemporaryDirectory() as temporary:
            save_images(images, sampler, Path(temporary) / SAMPLES)
            put_folder(open_store(settings.out), SAMPLES, Path(temporary) / SAMPLES, last=INDEX)
        return
    # Another job may have made the same images meanwhile.
    with suppress(FileExistsError):
        save_images(images, sampler, settings.out / SAMPLES)


def has_samples(out: Location) -> bool:
    return (out / SAMPLES).is_dir() if isinstance(out, Path) else open_store(out).exists(f"{SAMPLES}/{INDEX}")


def samples_sampler(settings: TeacherCacheSettings, latents: ShardSet, folder: Path) -> Sampler:
    """How the teacher's samples are generated. Those of a U-Net without a size of its own are as large as the data."""
    size = sampling_size(latents, unet_config(folder))
    return Sampler(guidance_scale=settings.samples_guidance, batch_size=settings.samples_batch_size, size=size)


def check_samples(
    settings: TeacherCacheSettings,
    latents: ShardSet,
    folder: Path,
    base: DiffusionPipeline,
    noise_scheduler: DDPMScheduler,
) -> None:
    """Raise UserError if the teacher's samples could not be generated after the last shard."""
    set_prediction_type(base.scheduler, noise_scheduler.config.prediction_type)
    if not settings.samples:
        return
    model, sampler = f"--teacher {settings.teacher}", samples_sampler(settings, latents, folder)
    check_sampler(base.scheduler, sampler, model)
    if sampler.size and any(side % 8 for side in sampler.size):
        raise UserError(
            f"{model} states no size of its images, and those of {settings.latents} have {sampler.size[0]} pixels, "
            "which is no multiple of 8, so no samples can be generated. Add --samples 0."
        )
    with failing_with(f"the VAE of {model} cannot decode", "Fix it, or add --samples 0."), torch.inference_mode():
        base.vae.decode(torch.zeros(1, base.vae.config.latent_channels, 4, 4))


def report(out: Location, manifest: Manifest, prefix: str) -> None:
    """Print what the cache holds."""
    if manifest.window is not None:
        there = {shard.name for shard in manifest.plan} - {s.name for s in manifest.plan.unfinished(open_store(out))}
        lines = rolling_lines(open_store(out), manifest, there)
        say("\n".join([f"{prefix}all readers of {out} are done", *(f"  {line}" for line in lines)]))
        return
    heads = finished_heads(out, manifest)
    if heads is None:
        return
    count, size = sum(head.count for head in heads), sum(head.bytes for head in heads)
    per_entry = f", {size / count:,.0f} bytes per entry" if count else ""
    held = f"{plural(count, 'entry', 'entries')} ({plural(manifest.rounds or 0, 'round')})"
    say(f"{prefix}{out} holds {held} in {plural(len(heads), 'shard')}, {format_bytes(size)}{per_entry}")


def plan(settings: TeacherCacheSettings) -> list[str]:
    """What a run would write. The size of quantised taps is that of Gaussian features."""
    check_out(settings)
    latents = open_latents(settings.latents)
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    base = load_base(folder, settings.variant)
    check_encoders(latents, base, f"--teacher {settings.teacher}")
    check_samples(settings, latents, folder, base, load_noise_scheduler(folder, settings.prediction_type))
    found = existing_cache(settings.out)
    config = unet_config(folder)
    taps = wanted_taps(checked_taps(settings, latents, config), found)
    if found is not None:
        stated = {"latents": latents.manifest.spec, **counted_entries(latents), "taps": taps}
        decides = as_stated(deciding(UNet2DConditionModel, config), found.spec.get("teacher_config"))
        stated = known_to(found.spec, {**stated, "teacher_config": decides})
        names = ("entries_per_shard", "seed", "noise_offset", "input_perturbation", "uncond_fraction")
        wanted = {**stated, **{name: getattr(settings, name) for name in names}}
        refuse_other_spec(settings.out, {name: found.spec[name] for name in wanted}, wanted)
    copied = bytes_to_copy(latents, settings.out, found)
    if found is not None:
        refuse_other_window(settings.out, found, settings.window)
    rounds = max(settings.rounds, (found.rounds or 0) if found else 0)
    left = shards_left(settings, latents, found)
    entries = count_entries(left)
    passes = entries if settings.window is None else len(latents) * rounds
    return [
        f"entries: {plural(len(latents), 'image')} x {plural(rounds, 'round')} = {len(latents) * rounds}",
        *([f"at a time: the entries of {plural(settings.window, 'round')}"] if settings.window else []),
        f"still to write: {plural(entries, 'entry', 'entries')} in {plural(len(left), 'shard')}",
        *sizes.lines(cache_sizes(latents.manifest.spec, taps, settings, left)),
        *sampling_lines(taps),
        *([f"images to copy from {settings.latents}: {format_bytes(copied)}"] if copied else []),
        *free_line(settings.out),
        "plus the rest of the teacher's pipeline and the students' initial weights",
        f"teacher forward passes: {'up to ' if settings.window else ''}{passes}, in batches of {settings.batch_size}",
    ]
