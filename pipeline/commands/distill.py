"""Stage two. cache/ -> student/: trains a student from the shards and never loads the teacher.

A step: batch of entries -> noisy latents -> student U-Net -> three losses -> backward -> AdamW.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel

from pipeline.cache.latents import size_in_words
from pipeline.cache.parts import (
    BASE,
    TEACHER,
    bound_parts,
    check_part,
    check_student,
    is_bound,
    missing_student,
    stored_pairs,
    student_part,
    teacher_config,
)
from pipeline.cache.remote_parts import folder_of, take_file, take_part
from pipeline.demo.oracle import score_scenes
from pipeline.evaluation.cost import forward_seconds
from pipeline.evaluation.model_card import write_model_card
from pipeline.models.families import family_of_spec
from pipeline.models.levels import LEVELS
from pipeline.models.load import MODEL_INDEX, family_of, load_unet_folder
from pipeline.models.provenance import CARD, ORIGIN, read_origin
from pipeline.models.students import refuse_foreign
from pipeline.sampling.process import PipelineRef, generate_in_process
from pipeline.sampling.teacher_samples import take_samples, teacher_samples
from pipeline.settings.distill import DistillSettings
from pipeline.settings.training import resolve_steps_and_lr, resume_fingerprint
from pipeline.system.device import DTYPES, leave_processes, resolve_dtype
from pipeline.system.echo import plural
from pipeline.system.errors import UserError
from pipeline.system.jsonl import read_jsonl
from pipeline.system.lock import OutputLock
from pipeline.system.page import REPORT
from pipeline.training.accelerator import make_accelerator, resolve_precision
from pipeline.training.ending import finish
from pipeline.training.held_out import held_out_of
from pipeline.training.initial_student import initial_student, unet_folder, weights_sha256s
from pipeline.training.loader import batches
from pipeline.training.loop import Training, prepare_training, run_training, start
from pipeline.training.objective import Objective
from pipeline.training.output import (
    METRICS,
    VALIDATION,
    check_out,
    checkpointed_step,
    claim,
    finished_step,
    has_extras,
    nothing_left,
    refuse_damaged_result,
)
from pipeline.training.qat import qat_of
from pipeline.training.report import Report, circumstances, write_report
from pipeline.training.rounds import RollingRounds, adopt, register, rolling_batches, rolling_rounds
from pipeline.training.validation import planned_images, validation_images
from shards.dataset import CacheDataset
from shards.location import Location, Url
from shards.manifest import Manifest, read_manifest
from shards.rolling import RollingSet
from shards.store import open_store

# The passes of each U-Net that are timed for the report.
TURNS = 5


def run(settings: DistillSettings) -> None:
    """Train a student from a cache and save it as a complete diffusers pipeline."""
    check_out(settings, inputs_of(settings))
    with OutputLock(settings.out) as lock:
        train_student(settings, lock)


def inputs_of(settings: DistillSettings) -> dict[str, Location | str | None]:
    return {"--cache": settings.cache, "--init-from": settings.init_from}


def objective_of(settings: DistillSettings, spec: Mapping[str, Any]) -> Objective:
    """What is compared with the taps of a cache with this spec. Features without weight need none."""
    pairs = stored_pairs(open_store(settings.cache), settings.level, spec) if settings.feature_weight else ()
    return Objective(pairs, settings.output_weight, settings.feature_weight, settings.feature_loss, settings.snr_gamma)


def train_student(settings: DistillSettings, lock: OutputLock) -> None:
    """Claim --out, train what is left, and write what belongs to a finished student."""
    settings = resolve_precision(settings)
    accelerator = make_accelerator(settings)
    rolling = join_readers(settings, accelerator, lock) if is_rolling(settings) else None
    dataset = open_cache(settings)
    if isinstance(settings.cache, Url):
        with accelerator.local_main_process_first():
            if accelerator.is_local_main_process:
                take_parts(settings, dataset)
            check_parts(settings, dataset.cache.manifest)
    manifest = dataset.cache.manifest
    folder = folder_of(settings.cache, manifest)
    settings = resolve_steps_and_lr(settings, len(dataset), accelerator.num_processes)
    with accelerator.main_process_first():
        if accelerator.is_main_process and rolling is None:
            spec = training_spec(settings, manifest, accelerator.num_processes)
            claim(settings, {"shards_sha256": dataset.cache.digest(), **spec}, lock)
    done = finished_step(settings.out)
    if done >= (settings.max_train_steps or 0) and accelerator.is_main_process:
        refuse_damaged_result(settings.out)
    if nothing_left(settings, accelerator, "student", has_extras(settings)):
        leave_processes(accelerator)
        return

    problems = []
    with accelerator.main_process_first():
        # A copy of what lies at an address was compared when it was taken.
        if accelerator.is_main_process and folder == settings.cache:
            check_part(folder, manifest, BASE, contents=True)
    if done < (settings.max_train_steps or 0):
        training = prepare(settings, dataset, accelerator)
        training.rolling = rolling
        stream = (
            batches(settings, dataset, accelerator, training.position)
            if rolling is None
            else rolling_batches(settings, dataset, accelerator, training.position, rolling)
        )
        with closing(stream):
            problems = run_training(
                settings, accelerator, training, stream, lambda: save_student(settings, training, folder, manifest)
            )
        # The report needs the memory that the student takes.
        del training, stream
    leave_processes(accelerator)
    if accelerator.is_main_process:
        finish(
            settings,
            "student",
            f"the {settings.level} student of {plural(finished_step(settings.out), 'step')} as a diffusers pipeline",
            lambda: save_report(settings, folder, manifest, accelerator.device),
            lambda: write_missing_card(settings, folder, manifest),
            problems,
        )


def write_missing_card(settings: DistillSettings, folder: Path, manifest: Manifest) -> None:
    """A student of an earlier version has no model card."""
    if not (settings.out / CARD).is_file():
        write_model_card(settings.out, settings.as_json(), folder, manifest)


def is_rolling(settings: DistillSettings) -> bool:
    """Whether the cache is a rolling one. Raises UserError for options that do not go with what it is."""
    window = read_manifest(open_store(settings.cache), "cache").window
    if window is not None and not settings.by_rounds:
        raise UserError(
            f"--cache {settings.cache} is a rolling cache (`teacher-cache --window {window}`), whose rounds come and "
            "go. Add --order rounds."
        )
    if window is None and settings.reader is not None:
        raise UserError(
            f"--reader {settings.reader}: --cache {settings.cache} keeps all rounds and knows no readers. Leave "
            "--reader out."
        )
    return window is not None


def join_readers(settings: DistillSettings, accelerator: Accelerator, lock: OutputLock) -> RollingRounds:
    """Claim --out, become a reader of a rolling cache, and wait until the cache can be opened."""
    entries = RollingSet(open_store(settings.cache), settings.rounds)
    if bound_parts(entries.manifest) and not is_bound(entries.manifest, student_part(settings.level)):
        # Before the teacher waits for this reader.
        raise missing_student(settings.cache, settings.level)
    settings = resolve_steps_and_lr(settings, len(entries), accelerator.num_processes)
    rolling = rolling_rounds(settings, entries, accelerator)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            claim(settings, training_spec(settings, entries.manifest, accelerator.num_processes), lock)
            register(settings, rolling)
        adopt(settings, rolling)
    rolling.wait_for_first()
    return rolling


def training_spec(settings: DistillSettings, manifest: Manifest, processes: int) -> dict[str, Any]:
    """What the training is, for a later run that continues it."""
    spec = resume_fingerprint(settings, processes, free=("cache", "reader"))
    if not settings.by_rounds:
        # As in the trainings of earlier versions.
        del spec["order"]
    if settings.init_from is not None:
        spec["init_from"] = weights_sha256s(settings.init_from)
    return {"cache": manifest.spec_sha256, **spec, "rounds": settings.rounds or manifest.rounds}


def prepare(settings: DistillSettings, dataset: CacheDataset, accelerator: Accelerator) -> Training:
    """The student, initial or from the newest checkpoint, and everything that trains it, on the device."""
    spec, folder = dataset.spec, folder_of(settings.cache, dataset.cache.manifest)
    noise_scheduler, family = DDPMScheduler.from_config(spec["noise_scheduler"]), family_of_spec(spec)
    transform = qat_of(
        settings,
        accelerator,
        family,
        noise_scheduler,
        lambda these, where: batches(these, dataset, where, 0),
        # Of a rolling cache, later rounds need not be there.
        there=sum(dataset.counts()) // dataset.rounds if settings.by_rounds else None,
    )
    student, state = start(settings, transform, lambda: initial_student(folder, settings.level, settings.init_from))
    # diffusers would record the folder it was loaded from, which differs after a resume.
    student.register_to_config(_name_or_path=settings.level)
    return prepare_training(
        settings,
        accelerator,
        student,
        state,
        objective=replace(objective_of(settings, spec), calibrations=dataset.calibrations(accelerator.device)),
        transform=transform,
        family=family,
        dataset=dataset,
        noise_scheduler=noise_scheduler,
        base=folder / BASE,
        held_out=held_out_of(settings, spec, len(noise_scheduler.alphas_cumprod)),
    )


def save_student(settings: DistillSettings, training: Training, folder: Path, manifest: Manifest) -> None:
    """The finished pipeline and its model card."""
    (settings.out / REPORT).unlink(missing_ok=True)
    training.transform.convert(training.student, training.base, settings.out, training.prediction_type)
    write_model_card(settings.out, settings.as_json(), folder, manifest)


def save_report(settings: DistillSettings, folder: Path, manifest: Manifest, device: torch.device) -> None:
    """report.html, with images by the teacher, from the cache, and by the student before and after the training."""
    rows = {}
    samples = teacher_samples(folder)
    if samples:
        rows["teacher"], sampler = samples
        unets = {**unet_before(settings, folder), "student": settings.out / "unet"}
        dtype = DTYPES[resolve_dtype("auto", device)]
        for name, unet in unets.items():
            pipeline = PipelineRef(folder / BASE, unet, device, dtype)
            rows[name] = generate_in_process(pipeline, rows["teacher"].prompts, sampler, name)
    lines = read_jsonl(settings.out / METRICS)
    report = Report(
        title=f"{settings.level}, distilled from {name_of(settings.cache)}",
        about=about(settings, folder, manifest, device, lines),
        settings=settings.for_others(),
        metrics=lines,
        rows=rows,
        validation=validation_images(settings.out / VALIDATION),
        passes=pass_seconds(settings, folder, device),
        scorer=score_scenes,
    )
    write_report(settings.out, report)


def name_of(cache: Location) -> str:
    return cache.name if isinstance(cache, Url) else cache.resolve().name


def about(
    settings: DistillSettings, folder: Path, manifest: Manifest, device: torch.device, metrics: list[dict[str, Any]]
) -> dict[str, str]:
    """What the report says of a training's circumstances, as far as they are known."""
    spec, origin = manifest.spec, read_origin(folder)
    teacher, data = (origin.get(name, {}).get("name", "not known") for name in ("teacher", "data"))
    return {
        "teacher": teacher,
        "data": f"{data}: {plural(spec['entries'], 'image')} at {size_in_words(spec['latents'])}",
        "student": f"{settings.level}: it has {LEVELS[settings.level].summary}",
        **circumstances(device, settings.mixed_precision, metrics),
    }


def pass_seconds(settings: DistillSettings, folder: Path, device: torch.device) -> dict[str, float]:
    """Seconds per forward pass of one image by U-Nets like the teacher's and the student's, which take turns.

    Time does not depend on weights, so the teacher's are random ones. Empty if the cache does not say what it was like.
    """
    config = teacher_config(folder)
    if config is None:
        return {}
    dtype = DTYPES[resolve_dtype("auto", device)]
    unets = {
        "teacher": UNet2DConditionModel.from_config(config).to(device, dtype),
        "student": load_unet_folder(settings.out / "unet", None, dtype).to(device),
    }
    base = folder / BASE
    return forward_seconds(unets, 1, family_of(base).conditioning_shapes(base), family_of(base), TURNS)


def unet_before(settings: DistillSettings, folder: Path) -> dict[str, Path]:
    """The U-Net that the training started from, by its name in the report."""
    if settings.init_from is None:
        return {"untrained student": folder / student_part(settings.level)}
    return {"student of --init-from": unet_folder(settings.init_from)}


def open_cache(settings: DistillSettings) -> CacheDataset:
    """The entries, of which only what has a weight is read. What else a student needs is looked for in a directory; of
    an address it is taken later, by `take_parts`."""
    store = open_store(settings.cache)
    spec = read_manifest(store, "cache").spec
    refuse_foreign([settings.level], family_of_spec(spec), f"--cache {settings.cache}", "--level")
    teacher_taps = [teacher_tap for _, teacher_tap in objective_of(settings, spec).pairs]
    dataset = CacheDataset(
        store,
        teacher_taps,
        with_teacher_pred=settings.output_weight > 0,
        rounds=settings.rounds,
        rolling=is_rolling(settings),
    )
    if isinstance(settings.cache, Path):
        check_parts(settings, dataset.cache.manifest)
    return dataset


def take_parts(settings: DistillSettings, dataset: CacheDataset) -> None:
    """Copy what a student needs besides the shards from an address to this machine, as far as it is not there."""
    store, manifest = dataset.cache.store, dataset.cache.manifest
    folder = folder_of(settings.cache, manifest)
    for part in (BASE, student_part(settings.level)):
        take_part(store, manifest, part, folder)
    for name in (ORIGIN, TEACHER):
        take_file(store, name, folder)
    if settings.report:
        take_samples(store, folder)


def check_parts(settings: DistillSettings, manifest: Manifest) -> None:
    """Raise UserError unless the cache has all that the student needs besides the shards, as it was written.

    The files are looked for and not read, since there is much of them.
    """
    part, folder = student_part(settings.level), folder_of(settings.cache, manifest)
    if not (folder / part / "config.json").is_file():
        raise missing_student(settings.cache, settings.level)
    if not (folder / BASE / MODEL_INDEX).is_file():
        raise UserError(
            f"{settings.cache} has no base/, the pipeline that the student becomes part of. Copy the complete cache."
        )
    for name in (BASE, part):
        check_part(folder, manifest, name, contents=False)
    if not is_bound(manifest, part):
        check_student(folder, settings.level, manifest.spec)
    read_origin(folder)
    if settings.report:
        teacher_samples(folder)
        teacher_config(folder)


def plan(settings: DistillSettings) -> list[str]:
    """What a run would do."""
    check_out(settings, inputs_of(settings))
    dataset = open_cache(settings)
    settings = resolve_steps_and_lr(settings, len(dataset), 1)
    held_out_of(settings, dataset.spec, 1000)
    steps, done = settings.max_train_steps or 0, checkpointed_step(settings.out)
    batch = settings.train_batch_size * settings.gradient_accumulation_steps
    left = max(0, steps - done)
    return [
        f"entries: {len(dataset)}, with the taps {', '.join(dataset.taps) or 'none'}",
        f"steps: {steps}, {done} of them done, with {plural(batch, 'entry', 'entries')} each per process",
        f"epochs: {steps * batch / len(dataset):.2f} on one process",
        f"forward passes still to run: {left * settings.gradient_accumulation_steps}",
        *planned_images(settings),
    ]
