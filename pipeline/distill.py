"""Stage two. cache/ -> student/: trains a student from the shards and never loads the teacher.

A step: batch of entries -> noisy latents -> student U-Net -> three losses -> backward -> AdamW.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import click
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from pipeline.core.losses import FEATURE_LOSSES
from pipeline.demo.oracle import score_scenes
from pipeline.evaluation.model_card import write_model_card
from pipeline.models.families import LEVELS, family_of_spec
from pipeline.models.hub import upload
from pipeline.models.load import MODEL_INDEX, load_scheduler
from pipeline.models.provenance import CARD
from pipeline.sampling.generate import SAMPLES, Sampler, check_sampler, load_images
from pipeline.sampling.process import PipelineRef, generate_in_process
from pipeline.system.command import stage_command
from pipeline.system.device import DTYPES, resolve_dtype
from pipeline.system.errors import UserError
from pipeline.system.page import REPORT
from pipeline.system.settings import REQUIRED, option
from pipeline.training.initial_student import initial_student, weights_sha256s
from pipeline.training.loop import (
    METRICS,
    Training,
    batches,
    checkpointed_step,
    claim,
    finished_step,
    make_accelerator,
    nothing_left,
    prepare_training,
    run_training,
    start,
)
from pipeline.training.objective import Objective
from pipeline.training.report import write_report
from pipeline.training.settings import TrainingSettings, resolve_steps_and_lr, resume_fingerprint
from pipeline.training.transform import Transform
from shards.dataset import CacheDataset
from shards.manifest import read_manifest
from shards.store import open_store


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainingSettings):
    cache: Path = option(REQUIRED, "Directory that `teacher-cache` wrote.")
    rounds: int | None = option(
        None,
        "Train only on the first N rounds of the cache; later ones may still be unfinished. By default on all.",
        ge=1,
    )
    level: str = option(REQUIRED, "The student's architecture and tap pairs.", choices=tuple(LEVELS))
    init_from: Path | None = option(
        None, "Saved student, or its pipeline, to start from; by default the cache's, filled from the teacher."
    )
    output_weight: float = option(0.5, "Weight of the loss against the teacher's prediction.", ge=0.0)
    feature_weight: float = option(0.5, "Weight of the sum of the taps' losses.", ge=0.0)
    feature_loss: str = option(
        "mse",
        "Loss per tap: mean square error, or its share of the teacher's mean square.",
        choices=tuple(FEATURE_LOSSES),
    )
    report: bool = option(True, "Write report.html at the end: loss curves, images, cost.")

    command: ClassVar[str] = "distill"

    @property
    def objective(self) -> Objective:
        """Features without weight need no taps."""
        pairs = LEVELS[self.level].taps if self.feature_weight else ()
        return Objective(pairs, self.output_weight, self.feature_weight, self.feature_loss, self.snr_gamma)


def run(settings: DistillSettings) -> None:
    """Train a student from a cache and save it as a complete diffusers pipeline."""
    accelerator = make_accelerator(settings)
    dataset = open_cache(settings)
    settings = resolve_steps_and_lr(settings, len(dataset), accelerator.num_processes)
    with accelerator.main_process_first():
        claim(settings, training_spec(settings, accelerator.num_processes))
    done = finished_step(settings.out)
    reported = not settings.report or (settings.out / REPORT).is_file()
    if nothing_left(settings, accelerator, "student", reported):
        return

    if done < (settings.max_train_steps or 0):
        training = prepare(settings, dataset, accelerator)
        stream = batches(settings, dataset, accelerator, training.position)
        run_training(settings, accelerator, training, stream, lambda: save_student(settings, training))
        # The report needs the memory that the student takes.
        del training, stream
    if accelerator.is_main_process:
        if settings.report:
            save_report(settings, accelerator.device)
        report = f"; see {settings.out / REPORT}" if settings.report else ""
        click.echo(
            f"{settings.out} holds the {settings.level} student of {finished_step(settings.out)} steps "
            f"as a diffusers pipeline{report}"
        )
        if settings.push_to_hub:
            if not (settings.out / CARD).is_file():
                # A student of an earlier version.
                write_model_card(settings.out, settings.as_json())
            click.echo(f"uploaded to {upload(settings.out, settings.push_to_hub)}")
    accelerator.wait_for_everyone()


def training_spec(settings: DistillSettings, processes: int) -> dict[str, Any]:
    """What the training is, for a later run that continues it."""
    spec = resume_fingerprint(settings, processes, free=("cache", "report"))
    if settings.init_from is not None:
        spec["init_from"] = weights_sha256s(settings.init_from)
    manifest = read_manifest(open_store(settings.cache), "cache")
    return {"cache": manifest.spec_sha256, **spec, "rounds": settings.rounds or manifest.rounds}


def prepare(settings: DistillSettings, dataset: CacheDataset, accelerator: Accelerator) -> Training:
    """The student, initial or from the newest checkpoint, and everything that trains it, on the device."""
    spec, transform = dataset.shards.manifest.spec, Transform()
    base = settings.cache / "base"
    if settings.validation_prompts:
        check_sampler(load_scheduler(base), Sampler(), str(base))
    student, state = start(
        settings, transform, lambda: initial_student(settings.cache, settings.level, settings.init_from)
    )
    # diffusers would record the folder it was loaded from, which differs after a resume.
    student.register_to_config(_name_or_path=settings.level)
    return prepare_training(
        settings,
        accelerator,
        student,
        state,
        objective=settings.objective,
        transform=transform,
        family=family_of_spec(spec),
        dataset=dataset,
        noise_scheduler=DDPMScheduler.from_config(spec["noise_scheduler"]),
        base=base,
    )


def save_student(settings: DistillSettings, training: Training) -> None:
    """The finished pipeline and its model card."""
    (settings.out / REPORT).unlink(missing_ok=True)
    training.transform.convert(training.student, training.base, settings.out)
    write_model_card(settings.out, settings.as_json())


def save_report(settings: DistillSettings, device: torch.device) -> None:
    """report.html, with the student's images next to the teacher's from the cache and the untrained student's."""
    rows = {}
    if (settings.cache / SAMPLES).is_dir():
        rows["teacher"], sampler = load_images(settings.cache / SAMPLES)
        folders = {
            "untrained student": settings.cache / "students" / settings.level,
            "student": settings.out / "unet",
        }
        dtype = DTYPES[resolve_dtype("auto", device)]
        for name, folder in folders.items():
            pipeline = PipelineRef(settings.cache / "base", folder, device, dtype)
            rows[name] = generate_in_process(pipeline, rows["teacher"].prompts, sampler, name)
    lines = (settings.out / METRICS).read_text(encoding="utf-8").splitlines()
    title = f"{settings.level}, distilled from {settings.cache}"
    write_report(settings.out, title, settings.as_json(), [json.loads(line) for line in lines], rows, score_scenes)


def open_cache(settings: DistillSettings) -> CacheDataset:
    """The entries, of which only what has a weight is read."""
    teacher_taps = [teacher_tap for _, teacher_tap in settings.objective.pairs]
    dataset = CacheDataset(
        open_store(settings.cache),
        teacher_taps,
        with_teacher_pred=settings.output_weight > 0,
        rounds=settings.rounds,
    )
    if not (settings.cache / "students" / settings.level / "config.json").is_file():
        raise UserError(
            f"{settings.cache} has no initial weights of {settings.level}. "
            f"Run `teacher-cache --students {settings.level}` on it with the other settings unchanged."
        )
    if not (settings.cache / "base" / MODEL_INDEX).is_file():
        raise UserError(
            f"{settings.cache} has no base/, the pipeline that the student becomes part of. Copy the complete cache."
        )
    return dataset


def plan(settings: DistillSettings) -> list[str]:
    """What a run would do."""
    dataset = open_cache(settings)
    settings = resolve_steps_and_lr(settings, len(dataset), 1)
    steps, done = settings.max_train_steps or 0, checkpointed_step(settings.out)
    batch = settings.train_batch_size * settings.gradient_accumulation_steps
    left = max(0, steps - done)
    return [
        f"entries: {len(dataset)}, with the taps {', '.join(dataset.taps) or 'none'}",
        f"steps: {steps}, {done} of them done, with {batch} entries each per process",
        f"epochs: {steps * batch / len(dataset):.2f} on one process",
        f"forward passes still to run: {left * settings.gradient_accumulation_steps}",
    ]


command = stage_command("distill", DistillSettings, plan, run)

if __name__ == "__main__":
    command()
