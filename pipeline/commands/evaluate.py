"""`distill-sd evaluate`: compares a student with its teacher in cost, fidelity and image quality.

cost.json, fidelity.json and pictures/ hold what a run measures and generates. A rerun keeps them. evaluation.json, the
printed table and report.html are made from them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.cache.latents import check_encoders, open_latents
from pipeline.demo.oracle import score_scenes
from pipeline.evaluation.measure import (
    Task,
    cached_result,
    measure_cost,
    measure_fidelity,
    measure_quality,
    read_result,
    sampler_of,
)
from pipeline.evaluation.model_card import add_evaluation, split_card
from pipeline.evaluation.pair import level_of, load_named_pipeline
from pipeline.evaluation.quality import (
    Clip,
    Inception,
    Missing,
    load_clip,
    load_inception,
    missing_torchmetrics,
    open_reference,
)
from pipeline.evaluation.report import write_evaluation
from pipeline.evaluation.table import plain_text, rows_of
from pipeline.models.provenance import CARD
from pipeline.sampling.folder import count_missing, generate_missing
from pipeline.sampling.generate import check_sampler, image_size
from pipeline.sampling.process import load_pipeline
from pipeline.settings.evaluate import COST, EVALUATION, FIDELITY, EvaluateSettings
from pipeline.system.device import DTYPES, device_name, process_state, resolve_dtype
from pipeline.system.disk import format_bytes, free_bytes, require_space
from pipeline.system.echo import say
from pipeline.system.errors import UserError
from pipeline.system.lock import OutputLock
from pipeline.system.names import public_name
from pipeline.system.output import check_output, made_by
from pipeline.system.page import REPORT
from pipeline.system.prompts import read_prompts
from pipeline.system.settings import write_settings
from shards.files import remove_leftovers, write_json
from shards.manifest import refuse_other_spec, sha256_of_json

IMAGES = "pictures"
IMAGES_INDEX = "pictures.json"
# A photograph's PNG takes about this share of the bytes of its pixels.
PNG_SHARE = 0.7


def run(settings: EvaluateSettings) -> None:
    """Compare a student with its teacher: cost, fidelity on held-out latents, and quality of generated images."""
    check_out(settings)
    with OutputLock(settings.out) as lock:
        measure(settings, lock)


def check_out(settings: EvaluateSettings) -> None:
    """Raise UserError unless --out is new, empty, or holds an evaluation."""
    flags = {"--teacher": settings.teacher, "--student": settings.student, "--clip": settings.clip}
    inputs = {**flags, "--latents": settings.latents, "--reference": settings.reference}
    check_output(settings.out, "evaluate", inputs, own=made_by(settings.out, "evaluate", COST))


def measure(settings: EvaluateSettings, lock: OutputLock) -> None:
    """Claim --out and measure what it lacks."""
    task = open_task(settings)
    device = task.teacher.model.device
    inception, clip = load_networks(settings, device)
    lock.take()
    remove_leftovers(settings.out, *(settings.out / IMAGES / name for name in task.pipelines))
    write_settings(settings.out, "evaluate", settings)
    cost = cached_result(settings.out / COST, task.specs["cost"], lambda: measure_cost(settings, task))
    if task.latents:
        fidelity = cached_result(
            settings.out / FIDELITY, task.specs["fidelity"], lambda: measure_fidelity(settings, task)
        )
    else:
        fidelity = {"missing": "needs --latents DIR, held-out images encoded with `distill-sd encode`"}
    quality = {"missing": "needs --prompts FILE, a text file with one prompt per line"}
    if task.prompts:
        files = {name: generate_images(settings, task, name) for name in task.pipelines}
        quality = measure_quality(settings, task, files, inception, clip, score_scenes)
    evaluation = {
        "teacher": {"model": public_name(settings.teacher)},
        "student": {"model": public_name(settings.student), "level": task.level},
        "cost": cost,
        "fidelity": fidelity,
        "quality": quality,
        "settings": settings.for_others(),
    }
    write_json(settings.out / EVALUATION, evaluation)
    folders = {name: settings.out / IMAGES / name for name in task.pipelines}
    write_evaluation(settings.out, evaluation, task.prompts, folders)
    say(plain_text(rows_of(evaluation)))
    say(f"Wrote {settings.out / EVALUATION} and {REPORT}.")
    if settings.update_card:
        card = task.student.folder / CARD
        add_evaluation(task.student.folder, evaluation)
        say(f"Added the results to the model card {card}.")


def plan(settings: EvaluateSettings) -> list[str]:
    """What a run would measure and generate."""
    check_out(settings)
    task = open_task(settings)
    existing = {name for name, path in result_files(settings.out).items() if path.is_file()}
    lines = [f"level: {task.level}", f"cost: {'already measured' if 'cost' in existing else 'to measure'}"]
    if task.latents is not None:
        passes = 2 * settings.bins * min(settings.entries, len(task.latents))
        lines.append(f"fidelity: {'already measured' if 'fidelity' in existing else f'{passes} U-Net forward passes'}")
    if task.prompts:
        folders = {name: settings.out / IMAGES / name for name in task.pipelines}
        left = sum(count_missing(folder, len(task.prompts)) for folder in folders.values())
        size = format_bytes(sum(missing_bytes(settings, task, name) for name in task.pipelines))
        lines.append(f"images: {2 * len(task.prompts)}, {left} still to generate, about {size}")
    return [*lines, f"free disk space: {format_bytes(free_bytes(settings.out))}"]


def open_task(settings: EvaluateSettings) -> Task:
    """Load and check all inputs.

    Raises UserError or ShardError for an input that cannot be used, and if --out holds results of other settings.
    """
    prompts = read_prompts(settings.prompts) if settings.prompts else []
    latents = open_latents(settings.latents) if settings.latents else None
    reference = open_reference(settings.reference) if settings.reference else None
    device = process_state(settings.device).device
    dtype = DTYPES[resolve_dtype(settings.dtype, device)]
    teacher = load_named_pipeline(settings.teacher, "--teacher", settings.revision, settings.variant, device, dtype)
    student = load_named_pipeline(settings.student, "--student", None, None, device, dtype)
    if settings.out.resolve() in (teacher.folder.resolve(), student.folder.resolve()):
        raise UserError(
            f"--out {settings.out} is the folder of a pipeline, whose report it would replace. Use another."
        )
    if settings.update_card:
        split_card(student.folder)
    level = level_of(teacher, student, settings.level)
    for loaded, flag in ((teacher, "--teacher"), (student, "--student")):
        check_sampler(loaded.pipe.scheduler, sampler_of(settings, 1), f"{flag} {loaded.name}")
    if latents is not None:
        check_encoders(latents, teacher.pipe, f"--teacher {settings.teacher}")
    task = Task(teacher, student, level, latents, prompts, reference)
    task.specs.update(specs_of(settings, task))
    for name, path in result_files(settings.out).items():
        if name in task.specs and path.is_file():
            refuse_other_spec(path, read_result(path)["spec"], task.specs[name])
    return task


def specs_of(settings: EvaluateSettings, task: Task) -> dict[str, dict[str, Any]]:
    """Everything that determines each result. A later run with the same --out is refused if these differ."""
    models = {name: loaded.spec for name, loaded in task.pipelines.items()}
    dtype = resolve_dtype(settings.dtype, task.teacher.model.device)
    sampler = {**asdict(sampler_of(settings, settings.batch_size)), "dtype": dtype}
    specs = {
        "cost": {
            **models,
            "dtype": dtype,
            "device": device_name(task.teacher.model.device),
            "repeats": settings.repeats,
            "sampler": asdict(sampler_of(settings, settings.timing_batch_size)),
        },
    }
    if task.latents is not None:
        specs["fidelity"] = {
            **models,
            "dtype": dtype,
            "level": task.level,
            "latents": task.latents.manifest.spec_sha256,
            "shards_sha256": task.latents.digest(),
            "entries": settings.entries,
            "bins": settings.bins,
            "seed": settings.seed,
        }
    if task.prompts:
        prompts = {"prompts": len(task.prompts), "prompts_sha256": sha256_of_json(task.prompts)}
        specs |= {name: {**models[name], **prompts, "sampler": sampler} for name in models}
    return specs


def result_files(out: Path) -> dict[str, Path]:
    """The file with the spec of each result."""
    images = {name: out / IMAGES / name / IMAGES_INDEX for name in ("teacher", "student")}
    return {"cost": out / COST, "fidelity": out / FIDELITY, **images}


def load_networks(settings: EvaluateSettings, device: torch.device) -> tuple[Inception | Missing, Clip | Missing]:
    """The networks that score images, or why they are missing. Loaded first, so that mistakes show up early."""
    if not settings.prompts:
        return Missing("there are no images"), Missing("there are no images")
    inception = missing_torchmetrics() or load_inception(settings.inception_weights, device)
    return inception, load_clip(settings.clip, device)


def generate_images(settings: EvaluateSettings, task: Task, name: str) -> list[Path]:
    """The files of one model's images. Generates those that are missing."""
    folder, loaded = settings.out / IMAGES / name, task.pipelines[name]
    require_space(folder, missing_bytes(settings, task, name), "pass fewer prompts")
    cached_result(folder / IMAGES_INDEX, task.specs[name], lambda: {"model": public_name(loaded.name)})
    sampler = sampler_of(settings, settings.batch_size)
    return generate_missing(folder, lambda: load_pipeline(loaded.model), task.prompts, sampler, f"{name}'s images")


def missing_bytes(settings: EvaluateSettings, task: Task, name: str) -> int:
    """The approximate size in bytes of the images still to generate."""
    pipe = task.pipelines[name].pipe
    height, width = image_size(pipe)
    return int(count_missing(settings.out / IMAGES / name, len(task.prompts)) * 3 * height * width * PNG_SHARE)
