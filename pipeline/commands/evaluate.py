"""`distill-sd evaluate`: a student beside its teacher. What it costs, how near it is, how good its pictures are.

cost.json, fidelity.json and pictures/ are what a run measures and draws, each kept when the command is run again;
evaluation.json, the table that is printed and report.html are made of them.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from pipeline.cache.latents import check_encoders, open_latents
from pipeline.demo.oracle import score_scenes
from pipeline.evaluation.cost import (
    sample_size,
)
from pipeline.evaluation.measure import Task, cached_result, measure_cost, measure_fidelity, measure_quality, read_store
from pipeline.evaluation.model_card import add_evaluation
from pipeline.evaluation.pair import level_of, load_named_pipeline
from pipeline.evaluation.quality import (
    Clip,
    Inception,
    Missing,
    open_clip,
    open_inception,
    open_reference,
    open_torchmetrics,
)
from pipeline.evaluation.report import write_evaluation
from pipeline.evaluation.settings import COST, EVALUATION, FIDELITY, EvaluateSettings
from pipeline.evaluation.table import markdown, rows_of
from pipeline.models.provenance import CARD
from pipeline.sampling.folder import count_missing, generate_missing
from pipeline.sampling.process import load_pipeline
from pipeline.system.command import stage_command
from pipeline.system.device import DTYPES, device_name, process_state, resolve_dtype
from pipeline.system.disk import format_bytes, free_bytes, require_space
from pipeline.system.prompts import read_prompts
from pipeline.system.settings import write_settings
from shards.files import remove_leftovers, write_json
from shards.manifest import refuse_other_spec, sha256_of_json

PICTURES = "pictures"
PICTURES_INDEX = "pictures.json"
# A PNG of a photograph takes about this share of its pixels' bytes.
PNG_SHARE = 0.7


def run(settings: EvaluateSettings) -> None:
    """A student beside its teacher: cost, fidelity on held-out latents, and quality of pictures of given prompts."""
    task = open_task(settings)
    device = task.teacher.model.device
    inception, clip = open_networks(settings, device)
    settings.out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(settings.out, *(settings.out / PICTURES / name for name in task.both))
    write_settings(settings.out, "evaluate", settings)
    cost = cached_result(settings.out / COST, task.specs["cost"], lambda: measure_cost(settings, task))
    if task.latents:
        near = cached_result(settings.out / FIDELITY, task.specs["fidelity"], lambda: measure_fidelity(settings, task))
    else:
        near = {"missing": "needs --latents DIR, which `distill-sd encode` writes of pictures not trained on"}
    quality = {"missing": "needs --prompts FILE, a text file with one prompt a line"}
    if task.prompts:
        files = {name: draw(settings, task, name) for name in task.both}
        quality = measure_quality(settings, task, files, inception, clip, score_scenes)
    evaluation = {
        "teacher": {"model": settings.teacher},
        "student": {"model": settings.student, "level": task.level},
        "cost": cost,
        "fidelity": near,
        "quality": quality,
        "settings": settings.as_json(),
    }
    write_json(settings.out / EVALUATION, evaluation)
    write_evaluation(settings.out, evaluation, task.prompts, {n: settings.out / PICTURES / n for n in task.both})
    click.echo(markdown(rows_of(evaluation)))
    card = add_evaluation(task.student.folder, evaluation)
    click.echo(
        f"{settings.out} holds this in {EVALUATION} and report.html"
        + (f"; the figures are on the card, {task.student.folder / CARD}" if card else "")
    )


def open_task(settings: EvaluateSettings) -> Task:
    """Raises UserError or ShardError for whatever of it cannot be used, or is of another run than what --out holds."""
    prompts = read_prompts(settings.prompts) if settings.prompts else []
    latents = open_latents(settings.latents) if settings.latents else None
    reference = open_reference(settings.reference) if settings.reference else None
    device = process_state(settings.device).device
    dtype = DTYPES[resolve_dtype(settings.dtype, device)]
    teacher = load_named_pipeline(settings.teacher, "--teacher", settings.revision, settings.variant, device, dtype)
    student = load_named_pipeline(settings.student, "--student", None, None, device, dtype)
    level = level_of(teacher, student, settings.level)
    if latents is not None:
        check_encoders(latents, teacher.pipe, f"--teacher {settings.teacher}")
    task = Task(teacher, student, level, latents, prompts, reference)
    task.specs.update(specs_of(settings, task))
    for name, path in stores(settings.out).items():
        if name in task.specs and path.is_file():
            refuse_other_spec(path, read_store(path)["spec"], task.specs[name])
    return task


def specs_of(settings: EvaluateSettings, task: Task) -> dict[str, dict[str, Any]]:
    """What decides each part, for a later run on the same --out: other settings of a part are refused."""
    own = {name: opened.spec for name, opened in task.both.items()}
    dtype = resolve_dtype(settings.dtype, task.teacher.model.device)
    drawn = {**asdict(settings.sampler(settings.batch_size)), "dtype": dtype}
    specs = {
        "cost": {
            **own,
            "dtype": dtype,
            "device": device_name(task.teacher.model.device),
            "repeats": settings.repeats,
            "sampler": asdict(settings.sampler(settings.timing_batch_size)),
        },
    }
    if task.latents is not None:
        specs["fidelity"] = {
            **own,
            "dtype": dtype,
            "level": task.level,
            "latents": task.latents.manifest.spec_sha256,
            "entries": settings.entries,
            "bins": settings.bins,
            "seed": settings.seed,
        }
    if task.prompts:
        given = {"prompts": len(task.prompts), "prompts_sha256": sha256_of_json(task.prompts)}
        specs |= {name: {**own[name], **given, "sampler": drawn} for name in own}
    return specs


def stores(out: Path) -> dict[str, Path]:
    """The file of each part that says what it was made for."""
    pictures = {name: out / PICTURES / name / PICTURES_INDEX for name in ("teacher", "student")}
    return {"cost": out / COST, "fidelity": out / FIDELITY, **pictures}


def open_networks(settings: EvaluateSettings, device: torch.device) -> tuple[Inception | Missing, Clip | Missing]:
    """What judges pictures, or what it lacks: looked at first, so that a mistake does not wait for the pictures."""
    if not settings.prompts:
        return Missing("there are no pictures"), Missing("there are no pictures")
    inception = open_torchmetrics() or open_inception(settings.inception_weights, device)
    return inception, open_clip(settings.clip, device)


def draw(settings: EvaluateSettings, task: Task, name: str) -> list[Path]:
    """The files of one model's pictures, drawn where they are missing."""
    folder = settings.out / PICTURES / name
    require_space(folder, missing_bytes(settings, task, name), "give fewer prompts")
    cached_result(folder / PICTURES_INDEX, task.specs[name], lambda: {"model": task.both[name].name})
    sampler = settings.sampler(settings.batch_size)
    return generate_missing(
        folder, lambda: load_pipeline(task.both[name].model), task.prompts, sampler, f"{name}'s pictures"
    )


def missing_bytes(settings: EvaluateSettings, task: Task, name: str) -> int:
    """About what the pictures still to draw take on disk."""
    pipe = task.both[name].pipe
    height, width = (side * pipe.vae_scale_factor for side in sample_size(pipe.unet.config))
    return int(count_missing(settings.out / PICTURES / name, len(task.prompts)) * 3 * height * width * PNG_SHARE)


def plan(settings: EvaluateSettings) -> list[str]:
    """What a run would measure and draw."""
    task = open_task(settings)
    there = stores(settings.out)
    lines = [f"level: {task.level}", f"cost: {'measured already' if there['cost'].is_file() else 'to measure'}"]
    if task.latents is not None:
        passes = 2 * settings.bins * min(settings.entries, len(task.latents))
        lines.append(f"fidelity: {'measured already' if there['fidelity'].is_file() else f'{passes} U-Net forwards'}")
    if task.prompts:
        folders = {name: settings.out / PICTURES / name for name in task.both}
        left = sum(count_missing(folder, len(task.prompts)) for folder in folders.values())
        size = format_bytes(sum(missing_bytes(settings, task, name) for name in task.both))
        lines.append(f"pictures: {2 * len(task.prompts)}, {left} of them still to draw, about {size}")
    return [*lines, f"free where it goes: {format_bytes(free_bytes(settings.out))}"]


command = stage_command("evaluate", EvaluateSettings, plan, run)

if __name__ == "__main__":
    command()
