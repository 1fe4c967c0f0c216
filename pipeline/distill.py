"""Stage two. cache/ -> student/: trains a student from the shards and never sees the teacher.

A step: batch of entries -> noisy latents -> student U-Net -> three losses -> backward -> AdamW.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel

from pipeline.core.losses import FEATURE_LOSSES
from pipeline.demo.oracle import score_scenes
from pipeline.evaluation.model_card import write_model_card
from pipeline.models.families.sd import LEVELS
from pipeline.models.hub import upload
from pipeline.models.load import MODEL_INDEX
from pipeline.models.provenance import CARD
from pipeline.models.save import save_pipeline
from pipeline.sampling.generate import SAMPLES, load_images
from pipeline.sampling.process import PipelineRef, generate_in_process
from pipeline.system.command import stage_command
from pipeline.system.device import DTYPES, resolve_dtype
from pipeline.system.errors import UserError
from pipeline.system.page import REPORT
from pipeline.system.settings import REQUIRED, option
from pipeline.training.checkpoint import list_checkpoints, load_checkpoint
from pipeline.training.initial_student import initial_student, weights_sha256s
from pipeline.training.loop import (
    CHECKPOINTS,
    METRICS,
    Training,
    batches,
    claim,
    finished_step,
    make_accelerator,
    nothing_left,
    prepare_training,
    run_training,
)
from pipeline.training.report import write_report
from pipeline.training.settings import TrainingSettings, resolve_steps_and_lr, resume_fingerprint
from shards.dataset import CacheDataset
from shards.manifest import read_manifest


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainingSettings):
    cache: Path = option(REQUIRED, "Directory that `teacher-cache` wrote.")
    rounds: int | None = option(
        None,
        "Train on the cache's first N rounds alone; later ones may still be being written. By default on all.",
        ge=1,
    )
    level: str = option(REQUIRED, "The student's architecture and tap pairs.", choices=tuple(LEVELS))
    init_from: Path | None = option(
        None, "Saved student, or its pipeline, to train on; by default the cache's, filled from the teacher."
    )
    output_weight: float = option(0.5, "Weight of the loss to the teacher's prediction.", ge=0.0)
    feature_weight: float = option(0.5, "Weight of the sum of the taps' losses.", ge=0.0)
    feature_loss: str = option(
        "mse",
        "A tap's loss: mean square error, or that as a share of the teacher's mean square.",
        choices=tuple(FEATURE_LOSSES),
    )
    report: bool = option(True, "End with report.html: loss curves, pictures beside the teacher's, cost.")

    command = "distill"


def run(settings: DistillSettings) -> None:
    """Train a student from a cache; ends with a whole diffusers pipeline."""
    accelerator = make_accelerator(settings)
    dataset = open_cache(settings)
    settings = resolve_steps_and_lr(settings, len(dataset), accelerator.num_processes)
    with accelerator.main_process_first():
        claim(settings, training_spec(settings, accelerator.num_processes))
    done = finished_step(settings.out)
    reported = not settings.report or (settings.out / REPORT).is_file()
    if nothing_left(settings, accelerator, "student", reported):
        return

    if done < settings.max_train_steps:
        training = prepare(settings, dataset, accelerator)
        stream = batches(settings, dataset, accelerator, training.position)
        run_training(settings, accelerator, training, stream, lambda: save_student(settings, training.student))
        # The report needs the memory that the student took.
        del training, stream
    if accelerator.is_main_process:
        if settings.report:
            save_report(settings, accelerator.device)
        seen = f"; see {settings.out / REPORT}" if settings.report else ""
        click.echo(
            f"{settings.out} holds the {settings.level} student of {finished_step(settings.out)} steps, "
            f"as a diffusers pipeline{seen}"
        )
        if settings.push_to_hub:
            if not (settings.out / CARD).is_file():
                # A student of an earlier version.
                write_model_card(settings.out, settings.as_json())
            click.echo(f"uploaded to {upload(settings.out, settings.push_to_hub)}")
    accelerator.wait_for_everyone()


def prepare(settings: DistillSettings, dataset: CacheDataset, accelerator: Accelerator) -> Training:
    """The student, initialised or of the newest checkpoint, and what trains it, on the device."""
    noise_scheduler = DDPMScheduler.from_config(dataset.shards.manifest.spec["noise_scheduler"])
    student, state = start(settings)
    return prepare_training(
        settings, accelerator, student, state, dataset, noise_scheduler, settings.cache / "base", pairs_of(settings)
    )


def save_student(settings: DistillSettings, student: UNet2DConditionModel) -> None:
    """The finished pipeline and its model card."""
    (settings.out / REPORT).unlink(missing_ok=True)
    save_pipeline(settings.cache / "base", student, settings.out)
    write_model_card(settings.out, settings.as_json())


def save_report(settings: DistillSettings, device: torch.device) -> None:
    """report.html, with the student's pictures beside the teacher's of the cache and the untrained student's."""
    rows = {}
    if (settings.cache / SAMPLES).is_dir():
        rows["teacher"], sampler = load_images(settings.cache / SAMPLES)
        folders = {
            "untrained student": settings.cache / "students" / settings.level,
            "student": settings.out / "unet",
        }
        dtype = DTYPES[resolve_dtype("auto", device)]
        for name, folder in folders.items():
            model = PipelineRef(settings.cache / "base", folder, device, dtype)
            rows[name] = generate_in_process(model, rows["teacher"].prompts, sampler, name)
    lines = (settings.out / METRICS).read_text(encoding="utf-8").splitlines()
    title = f"{settings.level}, distilled from {settings.cache}"
    write_report(settings.out, title, settings.as_json(), [json.loads(line) for line in lines], rows, score_scenes)


def open_cache(settings: DistillSettings) -> CacheDataset:
    """The entries, of which only what has a weight is read."""
    teacher_taps = [teacher for _, teacher in pairs_of(settings)]
    dataset = CacheDataset(
        settings.cache, teacher_taps, with_teacher_pred=settings.output_weight > 0, rounds=settings.rounds
    )
    if not (settings.cache / "students" / settings.level / "config.json").is_file():
        raise UserError(
            f"{settings.cache} has no initial weights of {settings.level}: "
            f"run `teacher-cache --students {settings.level}` on it, with the other settings as they were"
        )
    if not (settings.cache / "base" / MODEL_INDEX).is_file():
        raise UserError(f"{settings.cache} has no base/, the pipeline that takes the student: copy the whole cache")
    return dataset


def start(settings: DistillSettings) -> tuple[UNet2DConditionModel, dict[str, Any] | None]:
    """The student of the newest checkpoint and the rest of its state, or the initialised one and None."""
    checkpoints = list_checkpoints(settings.out / CHECKPOINTS)
    if checkpoints:
        student, saved = load_checkpoint(checkpoints[-1][1])
    else:
        student, saved = initial_student(settings.cache, settings.level, settings.init_from), None
    # diffusers would write down where it was loaded from, which is another place after a stop.
    student.register_to_config(_name_or_path=settings.level)
    return student, saved


def plan(settings: DistillSettings) -> list[str]:
    """What a run would do."""
    dataset = open_cache(settings)
    settings = resolve_steps_and_lr(settings, len(dataset), 1)
    done = max([step for step, _ in list_checkpoints(settings.out / CHECKPOINTS)], default=0)
    batch = settings.train_batch_size * settings.gradient_accumulation_steps
    left = max(0, settings.max_train_steps - done)
    return [
        f"entries: {len(dataset)}, with the taps {', '.join(dataset.taps) or 'none'}",
        f"steps: {settings.max_train_steps}, {done} of them done; each of {batch} entries a process",
        f"epochs: {settings.max_train_steps * batch / len(dataset):.2f} on one process",
        f"forward passes still to run: {left * settings.gradient_accumulation_steps}",
    ]


def pairs_of(settings: DistillSettings) -> tuple[tuple[str, str], ...]:
    """(student tap, teacher tap) that the loss needs: none when features have no weight."""
    return LEVELS[settings.level].taps if settings.feature_weight else ()


def training_spec(settings: DistillSettings, processes: int) -> dict[str, Any]:
    """What the training is, for whoever would go on with it."""
    spec = resume_fingerprint(settings, processes, free=("cache", "report"))
    if settings.init_from is not None:
        spec["init_from"] = weights_sha256s(settings.init_from)
    manifest = read_manifest(settings.cache, "cache")
    return {"cache": manifest.spec_sha256, **spec, "rounds": settings.rounds or manifest.rounds}


command = stage_command("distill", DistillSettings, plan, run)

if __name__ == "__main__":
    command()
