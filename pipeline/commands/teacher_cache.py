"""Stage one, second half. latents/ -> cache/: the teacher's predictions and features at sampled timesteps.

(latents, conditioning) x rounds -> the teacher's targets -> entries, in shards.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch import nn
from tqdm import tqdm

from pipeline.cache import sizes
from pipeline.cache.calibrate import adopt_calibrations, calibrated, calibrations_on, read_image
from pipeline.cache.images import add_images, bytes_to_copy
from pipeline.cache.latents import captions_of, check_encoders, open_latents, sampling_size
from pipeline.cache.output import bind_parts, claim, existing_manifest, finished_heads, share_unfinished
from pipeline.cache.parts import BASE, TAP_SET, existing_parts, student_part, write_teacher_config
from pipeline.cache.remote_parts import folder_of, parts_of, put_folder, take_part
from pipeline.cache.taps import sampling_lines, tap_specs
from pipeline.cache.targets import BatchTargets, Teacher, compress_targets, run_teacher
from pipeline.core.taps import Taps
from pipeline.models.checksums import CHECKSUMS, write_checksums
from pipeline.models.families import family_of_spec
from pipeline.models.hashing import config_of, deciding, library_versions, weights_sha256
from pipeline.models.levels.tap_sets import BLOCKS
from pipeline.models.load import family_of, find_pipeline, load_base, load_unet, unet_config
from pipeline.models.provenance import write_origin
from pipeline.models.save import save_base
from pipeline.models.schedule import load_noise_scheduler, set_prediction_type
from pipeline.models.shapes import tap_shapes
from pipeline.models.students import initialised_student, levels_of, meta_student, refuse_foreign
from pipeline.models.tap_pairs import taps_of_teacher
from pipeline.models.weights import network_bytes
from pipeline.sampling.generate import INDEX, SAMPLES, Sampler, check_sampler, save_images
from pipeline.sampling.process import PipelineRef, generate_in_process
from pipeline.settings.teacher_cache import TeacherCacheSettings
from pipeline.system.compiling import compile_failures, compile_networks
from pipeline.system.device import DTYPES, is_accelerator, leave_processes, process_state, resolve_dtype
from pipeline.system.disk import format_bytes, free_line, require_space
from pipeline.system.echo import plural, say, say_wait
from pipeline.system.errors import UserError, attempt_all, failing_with
from pipeline.system.lock import NoLock, OutputLock, lock_of
from pipeline.system.options import range_of
from pipeline.system.output import check_address, check_output, made_by
from pipeline.system.settings import write_settings
from pipeline.system.signals import signals_interrupt
from pipeline.system.threads import in_background, ordered_map
from shards.buckets import BUCKETS, of_bucket
from shards.buckets import counts as bucket_counts
from shards.cache import empty_prompt, same_image, stored_calibrations
from shards.files import atomic_directory
from shards.kept import Kept, read_kept
from shards.location import Location, Url
from shards.manifest import Manifest, known_to, refuse_other_spec
from shards.plan import PlannedShard, ShardPlan, count_entries
from shards.reader import ShardSet
from shards.schema import IMAGES, MANIFEST, conditioning_shapes
from shards.store import open_store
from shards.writer import EntryBuilder, write_shard

# Threads that compress the teacher's targets. zstd releases the interpreter's lock.
PACKERS = 2
SMALLER = "use fewer --rounds, a lower --snr-db or fewer --tokens"


def run(settings: TeacherCacheSettings) -> None:
    """Run the teacher on latents, in rounds, and store its predictions and features."""
    check_out(settings)
    with lock_of(settings.out) as lock, signals_interrupt():
        write_cache(settings, lock)


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


def write_cache(settings: TeacherCacheSettings, lock: OutputLock | NoLock) -> None:
    """Claim --out and write what it lacks: weights, shards, samples."""
    state = process_state(settings.device)
    latents = open_latents(settings.latents)
    folder = find_pipeline(settings.teacher, settings.revision, settings.variant)
    base, unet = load_base(folder, settings.variant), load_unet(folder, settings.variant)
    noise_scheduler = load_noise_scheduler(folder, settings.prediction_type)
    check_encoders(latents, base, f"--teacher {settings.teacher}")
    check_samples(settings, latents, folder, base, noise_scheduler)
    spec = cache_spec(settings, latents, unet, noise_scheduler, state.device)
    if found := existing_cache(settings.out):
        refuse_other_spec(settings.out, found.spec, spec)
        # Before rounds are added: damaged ones would stop their making.
        stored_calibrations(open_store(settings.out), found)
    if isinstance(settings.out, Path):
        require_space(settings.out, bytes_left(settings, settings.out, latents, spec, base, unet), SMALLER)
    with state.main_process_first(), lock.claim() as alone:
        manifest = claim(settings.out, "cache", spec, alone=alone, rounds=settings.rounds)
        manifest = adopt_calibrations(settings.out, manifest)
        images = add_images(latents, settings.out, manifest, alone=alone)
        saved = save_students(settings, folder, unet, noise_scheduler)
        manifest = bind_parts(settings.out, manifest, saved)
        write_origin(settings.out, settings.teacher, folder, settings.revision, settings.latents)
    del base
    unfinished, own = share_unfinished(settings.out, manifest, state, settings.shard_range)
    # None of several jobs knows whether it is the last, so the images are left to a run without a range.
    wants_samples = settings.samples > 0 and not settings.shard_range and not has_samples(settings.out)
    if not unfinished and not wants_samples:
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
    dtype = DTYPES[spec["dtype"]]
    unet.to(state.device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    if settings.compile:
        compile_networks(state.device, unet)
    teacher = Teacher(
        unet,
        family_of_spec(spec),
        Taps(unet, spec["taps"]),
        noise_scheduler.alphas_cumprod.to(state.device),
        empty_prompt(images),
    )
    with state.main_process_first(), lock.claim(), compile_failures(settings.compile):
        manifest = calibrated(settings.out, images, teacher, settings.batch_size)
    teacher = replace(teacher, calibrations=calibrations_on(state.device, settings.out, manifest))
    bar = tqdm(total=count_entries(own), unit="entry", desc="teacher-cache", disable=not state.is_main_process)
    with bar as progress, compile_failures(settings.compile):
        kept = kept_batches(settings, own, manifest, images)
        progress.update(sum(len(part.rows) for part in kept.values()))
        entries = cache_entries(own, kept, manifest, images, teacher, settings)
        for shard, of_shard in itertools.groupby(entries, key=lambda pair: pair[0]):
            written = counted(of_shard, progress.update)
            write_shard(open_store(settings.out), shard, manifest, written, [], kept.get(shard))
    leave_processes(state)
    # The images need the memory that the teacher takes.
    del teacher, unet
    if state.is_main_process:
        base_folder = folder_of(settings.out, manifest)
        if wants_samples and isinstance(settings.out, Url):
            take_part(open_store(settings.out), manifest, BASE, base_folder)
        pipeline = PipelineRef(base_folder / BASE, folder / "unet", state.device, dtype, settings.variant)
        finish(settings, manifest, images, folder, pipeline if wants_samples else None)


def finish(
    settings: TeacherCacheSettings, manifest: Manifest, latents: ShardSet, folder: Path, pipeline: PipelineRef | None
) -> None:
    """Generate the samples if there is a `pipeline` for them, and tell what the cache holds, also if that fails."""

    def generate_samples() -> None:
        if pipeline:
            with failing_with(
                f"{settings.out} is complete, but the teacher's images could not be generated",
                "Rerun the same command to generate them, with --samples-batch-size 1 if memory ran out, "
                "or add --samples 0.",
            ):
                save_teacher_samples(settings, latents, folder, pipeline)

    attempt_all(generate_samples, lambda: report(settings.out, manifest, ""))


def save_teacher_samples(
    settings: TeacherCacheSettings, latents: ShardSet, folder: Path, pipeline: PipelineRef
) -> None:
    """Generate images with the teacher into the cache, from captions spread over the input.

    Students' reports show them next to their own.
    """
    prompts = captions_of(latents, settings.samples)
    sampler = samples_sampler(settings, latents, folder)
    images = generate_in_process(pipeline, prompts, sampler, "teacher's samples")
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


def cache_spec(
    settings: TeacherCacheSettings,
    latents: ShardSet,
    unet: UNet2DConditionModel,
    noise_scheduler: DDPMScheduler,
    device: torch.device,
) -> dict[str, Any]:
    """What the entries are. `strata` is the number of rounds of the first run and never changes."""
    found = existing_cache(settings.out)
    config = dict(noise_scheduler.config)
    spec = {
        "stage": "cache",
        **counted_entries(latents),
        "entries_per_shard": settings.entries_per_shard,
        "strata": found.spec["strata"] if found else settings.rounds,
        "seed": settings.seed,
        "taps": wanted_taps(checked_taps(settings, latents, dict(unet.config)), found),
        **({} if settings.taps == BLOCKS else {TAP_SET: settings.taps}),
        "codec": {"name": settings.codec, **({"snr_db": settings.snr_db} if settings.codec == "dither" else {})},
        "noise_offset": settings.noise_offset,
        "input_perturbation": settings.input_perturbation,
        "uncond_fraction": settings.uncond_fraction,
        "prediction_type": noise_scheduler.config.prediction_type,
        "noise_scheduler": {key: config[key] for key in sorted(config) if not key.startswith("_")},
        "dtype": resolve_dtype(settings.dtype, device),
        "teacher_sha256": weights_sha256(unet),
        "teacher_config": config_of(unet),
        "latents": latents.manifest.spec,
        "libraries": library_versions(),
    }
    return known_to(found.spec, spec) if found else spec


def counted_entries(latents: ShardSet) -> dict[str, Any]:
    """The entries of a round as the spec of the cache states them: all, and where there are buckets, those of each."""
    if BUCKETS not in latents.manifest.spec:
        return {"entries": len(latents)}
    return {"entries": len(latents), BUCKETS: [{"entries": count} for count in latents.counts()]}


def existing_cache(out: Location) -> Manifest | None:
    """The manifest of the cache in `out`, if there is one. Raises UserError for one that is not added to."""
    found = existing_manifest(out, "cache")
    if found is not None and found.has_own_images:
        raise UserError(
            f"{out} holds a cache of format 1, which this version reads but does not add to. Train from it as it is "
            f"(`distill-sd distill --cache {out}`), or make a new one in another --out; the latents can stay."
        )
    return found


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


def wanted_taps(taps: dict[str, Any], found: Manifest | None) -> dict[str, Any]:
    """The taps of the spec: those of the existing cache, if it already has all that are wanted."""
    stored = found.spec["taps"] if found else {}
    return stored if all(stored.get(tap) == tap_spec for tap, tap_spec in taps.items()) else taps


def checked_taps(settings: TeacherCacheSettings, latents: ShardSet, config: dict[str, Any]) -> dict[str, Any]:
    """The taps of the cache's spec, where there are buckets a list for each tap. Raises UserError for a teacher that
    the levels do not fit."""
    spec = latents.manifest.spec
    family = family_of_spec(spec)
    levels = levels_of(settings.students, family)
    refuse_foreign(levels, family, f"--teacher {settings.teacher}")
    try:
        family.check(config)
    except ValueError as error:
        raise UserError(f"--teacher {settings.teacher}: {error}. Pass a teacher of that family.") from None
    taps, conditioning = taps_of_teacher(config, levels, settings.taps), conditioning_shapes(spec)
    described = []
    for bucket in range(len(bucket_counts(spec))):
        shape = of_bucket(spec, bucket)["latents_shape"]
        described.append(tap_specs(settings, tap_shapes(config, shape, conditioning, taps, family)))
    return {tap: [each[tap] for each in described] for tap in taps} if BUCKETS in spec else described[0]


def save_students(
    settings: TeacherCacheSettings, folder: Path, unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler
) -> list[str]:
    """Write base/ and students/<level>/ to the cache, each with its checksums, unless they exist.

    Returns the names of the folders that were written.
    """
    out = settings.out
    if isinstance(out, Path):
        return save_parts(settings, out, existing_parts(out), folder, unet, noise_scheduler)
    with tempfile.TemporaryDirectory(prefix="distill-sd-") as temporary:
        saved = save_parts(settings, Path(temporary), parts_of(out), folder, unet, noise_scheduler)
        for part in saved:
            put_folder(open_store(out), part, Path(temporary) / part, last=CHECKSUMS)
    return saved


def save_parts(
    settings: TeacherCacheSettings,
    out: Path,
    existing: list[str],
    folder: Path,
    unet: UNet2DConditionModel,
    noise_scheduler: DDPMScheduler,
) -> list[str]:
    """Write the folders of weights to `out` that are not among the `existing` ones. Returns their names."""
    saved = []
    if BASE not in existing:
        save_base(folder, settings.variant, noise_scheduler, out / BASE)
        saved.append(BASE)
    teacher_weights = unet.state_dict()
    for level in levels_of(settings.students, family_of(folder)):
        student_folder = out / student_part(level)
        if student_part(level) in existing:
            continue
        try:
            student = initialised_student(dict(unet.config), teacher_weights, level)
        except ValueError as error:
            raise UserError(f"--teacher {settings.teacher}: {error}") from None
        with atomic_directory(student_folder, exist_ok=True) as temporary:
            say_wait(f"writing {student_folder}", network_bytes(student))
            student.save_pretrained(temporary)
            write_checksums(temporary)
        saved.append(student_part(level))
    return saved


def bytes_left(
    settings: TeacherCacheSettings,
    out: Path,
    latents: ShardSet,
    spec: dict[str, Any],
    base: DiffusionPipeline,
    unet: UNet2DConditionModel,
) -> int:
    """About how many bytes a run adds to --out: shards, and weights in float32."""
    found = existing_cache(settings.out)
    unfinished = shards_left(settings, latents, found)
    written = sizes.total_bytes(planned_sizes(latents.manifest.spec, spec["taps"], settings, unfinished))
    shards = bytes_to_copy(latents, out, found) + written
    networks = [] if (out / BASE).is_dir() else [m for m in base.components.values() if isinstance(m, nn.Module)]
    for level in levels_of(settings.students, family_of_spec(latents.manifest.spec)):
        if not (out / student_part(level)).is_dir():
            networks.append(meta_student(dict(unet.config), level))
    return shards + sum(4 * parameter.numel() for network in networks for parameter in network.parameters())


def shards_left(settings: TeacherCacheSettings, latents: ShardSet, found: Manifest | None) -> list[PlannedShard]:
    """The shards that a run writes: those of --shard-range that are unfinished, of all rounds that `found` has too."""
    rounds = max(settings.rounds, (found.rounds or 0) if found else 0)
    plan = ShardPlan(len(latents), settings.entries_per_shard, rounds, buckets=latents.counts())
    return plan.unfinished(open_store(settings.out), range_of(settings.shard_range))


def kept_batches(
    settings: TeacherCacheSettings, shards: list[PlannedShard], manifest: Manifest, images: ShardSet
) -> dict[str, Kept]:
    """The complete batches that interrupted runs kept, by shard, as far as they were made from these images. The last
    batch of a shard is left to be written."""
    found = {}
    for shard in shards:
        kept = read_kept(open_store(settings.out), shard.name, manifest)
        if kept:
            current = zip(kept.rows, (images.row(index)[1] for index in shard.indices), strict=False)
            same = itertools.takewhile(lambda pair: same_image(*pair), current)
            count = min(sum(1 for _ in same), len(shard.indices) - 1)
            found[shard.name] = kept.first(count // settings.batch_size * settings.batch_size)
    return found


def cache_entries(
    shards: list[PlannedShard],
    kept: dict[str, Kept],
    manifest: Manifest,
    images: ShardSet,
    teacher: Teacher,
    settings: TeacherCacheSettings,
) -> Iterator[tuple[str, EntryBuilder]]:
    """(shard, entry) of the shards in order, without what is `kept` of them.

    While a GPU computes a batch, the ones before it are compressed.
    """

    def targets() -> Iterator[tuple[str, BatchTargets]]:
        for shard in shards:
            assert shard.round is not None
            done = len(kept[shard.name].rows) if shard.name in kept else 0
            for first in range(done, len(shard.indices), settings.batch_size):
                chosen = shard.indices[first : first + settings.batch_size]
                batch = [read_image(images, index) for index in chosen]
                yield shard.name, run_teacher(batch, shard.round, of_bucket(manifest.spec, shard.bucket), teacher)

    compressed: Iterable[tuple[str, list[EntryBuilder]]]
    if is_accelerator(teacher.unet.device):
        compressed = ordered_map(compress, in_background(targets(), 2), PACKERS, PACKERS + 1)
    else:
        compressed = map(compress, targets())
    for shard, entries in compressed:
        yield from ((shard, entry) for entry in entries)


def compress(targets: tuple[str, BatchTargets]) -> tuple[str, list[EntryBuilder]]:
    """The finished entries of a batch, with the shard that they belong to."""
    shard, batch = targets
    return shard, compress_targets(batch)


def counted(entries: Iterable[tuple[str, EntryBuilder]], advance: Callable[[int], Any]) -> Iterator[EntryBuilder]:
    for _, entry in entries:
        yield entry
        advance(1)


def report(out: Location, manifest: Manifest, prefix: str) -> None:
    """Print what the cache holds."""
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
        stated = known_to(found.spec, {**stated, "teacher_config": deciding(UNet2DConditionModel, config)})
        names = ("entries_per_shard", "seed", "noise_offset", "input_perturbation", "uncond_fraction")
        wanted = {**stated, **{name: getattr(settings, name) for name in names}}
        refuse_other_spec(settings.out, {name: found.spec[name] for name in wanted}, wanted)
    copied = bytes_to_copy(latents, settings.out, found)
    rounds = max(settings.rounds, (found.rounds or 0) if found else 0)
    left = shards_left(settings, latents, found)
    entries = count_entries(left)
    return [
        f"entries: {plural(len(latents), 'image')} x {plural(rounds, 'round')} = {len(latents) * rounds}",
        f"still to write: {plural(entries, 'entry', 'entries')} in {plural(len(left), 'shard')}",
        *sizes.lines(planned_sizes(latents.manifest.spec, taps, settings, left)),
        *sampling_lines(taps),
        *([f"images to copy from {settings.latents}: {format_bytes(copied)}"] if copied else []),
        *free_line(settings.out),
        "plus the rest of the teacher's pipeline and the students' initial weights",
        f"teacher forward passes: {entries}, in batches of {settings.batch_size}",
    ]


def planned_sizes(
    latents_spec: dict[str, Any], taps: dict[str, Any], settings: TeacherCacheSettings, shards: list[PlannedShard]
) -> list[sizes.Planned]:
    """What the entries of shards take, for each bucket of the latents. `taps` is as in the spec of the cache."""
    spec = {"latents": latents_spec, "taps": taps}
    planned = []
    for bucket in range(len(bucket_counts(latents_spec))):
        stated = of_bucket(spec, bucket)
        shape = stated["latents"]["latents_shape"]
        kept = settings.codec, settings.snr_db, settings.input_perturbation > 0
        entries = count_entries([shard for shard in shards if shard.bucket == bucket])
        named = " x ".join(map(str, shape[1:]))
        planned.append(sizes.Planned(f"latents of {named}", entries, sizes.cache_entry(shape, stated["taps"], *kept)))
    return planned
