"""Stage two. cache/ -> student/: trains a student from the shards and never sees the teacher.

A step: batch of entries -> noisy latents -> student U-Net -> three losses -> backward -> AdamW.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline import models
from pipeline.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from pipeline.command import stage_command
from pipeline.diffusion import add_noise, min_snr_weights, target
from pipeline.distill_settings import DistillSettings, pairs_of, training_spec, worked_out
from pipeline.errors import UserError
from pipeline.hub import open_repository, upload
from pipeline.initial_student import initial_student
from pipeline.interrupts import Interrupts
from pipeline.losses import distillation_losses, total_loss
from pipeline.metrics import Metrics
from pipeline.model_card import write_model_card
from pipeline.optimizers import make_optimizer
from pipeline.origin import CARD
from pipeline.prompts import read_prompts
from pipeline.report import REPORT, write_report
from pipeline.samples import SAMPLES, Model, draw_apart, load_samples
from pipeline.taps import Taps, sample_tokens
from pipeline.validation import draw_validation
from pipeline.workspace import write_settings
from shards.dataset import Batch, CacheDataset, EpochBatches
from shards.files import remove_leftovers, write_json
from shards.manifest import refuse_other_spec

SPEC, FINISHED, METRICS, CHECKPOINTS = "spec.json", "finished.json", "metrics.jsonl", "checkpoints"
LOGS, VALIDATION = "logs", "validation"


def run(settings: DistillSettings) -> None:
    """Train a student from a cache; ends with a whole diffusers pipeline."""
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        mixed_precision=settings.mixed_precision,
        cpu=models.use_cpu(settings.device),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=models.PATIENCE)],
        log_with=tracker(settings.report_to),
        project_config=ProjectConfiguration(logging_dir=str(settings.out / LOGS)),
    )
    dataset = open_cache(settings)
    settings = worked_out(settings, len(dataset), accelerator.num_processes)
    with accelerator.main_process_first():
        claim(settings, accelerator.num_processes)
    done = finished_step(settings.out)
    reported = not settings.report or (settings.out / REPORT).is_file()
    if done >= settings.max_train_steps and reported and not settings.push_to_hub:
        accelerator.print(
            f"already finished, nothing to do: {settings.out} holds a student of {done} steps; "
            "raise --max-train-steps to train it further"
        )
        return
    if settings.push_to_hub and accelerator.is_main_process:
        open_repository(settings.push_to_hub)
    accelerator.wait_for_everyone()

    if done < settings.max_train_steps:
        training = prepare(settings, dataset, accelerator)
        if settings.report_to != "none":
            accelerator.init_trackers("distill-sd", {k: str(v) for k, v in settings.as_json().items()})
        train(settings, accelerator, training)
        if accelerator.is_main_process:
            save_student(settings, training)
        for each in accelerator.trackers:
            each.finish()
        # The report needs the memory that optimiser and gradients took.
        accelerator.free_memory(training.model, training.optimizer)
        del training
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


def tracker(name: str) -> str | None:
    """The tracker as accelerate calls it. Raises UserError if its package is not there."""
    if name == "none":
        return None
    if find_spec(name) is None:
        raise UserError(f"--report-to {name} needs the package {name}: pip install {name}")
    return name


@dataclass
class Training:
    """All that a run steps: `model` is the student as accelerate wraps it, `step` counts optimiser steps.

    `position` is the number of samples taken from the stream of epochs, by all processes together; `prompts`
    are those to draw now and then.
    """

    student: UNet2DConditionModel
    model: torch.nn.Module
    taps: Taps
    optimizer: AcceleratedOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    dataset: CacheDataset
    alphas_cumprod: Tensor
    prompts: list[str]
    step: int = 0
    position: int = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the student itself."""
        scaler = self.optimizer.scaler
        return {
            "step": self.step,
            "position": self.position,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.position = state["step"], state["position"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.optimizer.scaler:
            self.optimizer.scaler.load_state_dict(state["scaler"])


def prepare(settings: DistillSettings, dataset: CacheDataset, accelerator: Accelerator) -> Training:
    """The student, initialised or of the newest checkpoint, and what trains it, on the device."""
    noise_scheduler = DDPMScheduler.from_config(dataset.shards.manifest.spec["noise_scheduler"])
    student, state = start(settings)
    student.to(accelerator.device, memory_format=torch.channels_last).train()
    if settings.allow_tf32:
        # For matrices; convolutions may use it anyway, as torch has it.
        torch.backends.cuda.matmul.allow_tf32 = True
    optimizer = make_optimizer(
        student.parameters(), settings.learning_rate, (settings.adam_beta1, settings.adam_beta2),
        settings.adam_epsilon, settings.adam_weight_decay, settings.use_8bit_adam,
    )  # fmt: skip
    # Not prepared: accelerate would step the schedule once for each process.
    lr_scheduler = get_scheduler(
        settings.lr_scheduler, optimizer, num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )  # fmt: skip
    ema = EMAModel(student.parameters(), decay=settings.ema_decay, foreach=True) if settings.use_ema else None
    model, optimizer = accelerator.prepare(torch.compile(student) if settings.compile else student, optimizer)
    training = Training(
        student, model, Taps(student, [name for name, _ in pairs_of(settings)]), optimizer, lr_scheduler, ema,
        dataset, noise_scheduler.alphas_cumprod.to(accelerator.device),
        read_prompts(settings.validation_prompts) if settings.validation_prompts else [],
    )  # fmt: skip
    if state is not None:
        training.load_state(state)
        accelerator.print(f"going on from the checkpoint of step {training.step}")
    if ema:
        ema.to(accelerator.device)
    return training


def train(settings: DistillSettings, accelerator: Accelerator, training: Training) -> None:
    """Step until `max_train_steps`, with metrics and checkpoints; the last step leaves a checkpoint.

    Ctrl-C leaves one too, and raises KeyboardInterrupt after it.
    """
    metrics = Metrics(settings.out / METRICS, accelerator, training.step, settings.max_train_steps)
    stream = batches(settings, training.dataset, accelerator, training.position)
    with closing(metrics), Interrupts(accelerator) as interrupts:
        while training.step < settings.max_train_steps:
            batch = next(stream)
            with accelerator.accumulate(training.model):
                terms = step_losses(training, settings, batch)
                total = total_loss(terms, settings.output_weight, settings.feature_weight)
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(training.model.parameters(), settings.max_grad_norm)
                training.optimizer.step()
                training.optimizer.zero_grad()
            metrics.add(terms, total, batch.keys)
            training.position += len(batch.keys) * accelerator.num_processes
            if accelerator.sync_gradients:
                stop = interrupts.agreed((training.step + 1) % settings.logging_steps == 0)
                after_step(settings, accelerator, training, metrics, norm, stop)
                if stop:
                    raise KeyboardInterrupt


def after_step(
    settings: DistillSettings, accelerator: Accelerator, training: Training, metrics: Metrics, norm: Tensor, stop: bool
) -> None:
    """What follows an optimiser step: schedule, average, and now and then a line of metrics and a checkpoint.

    `stop` says that this step is the last of the run and shall leave a checkpoint.
    """
    training.step += 1
    learning_rate = training.lr_scheduler.get_last_lr()[0]
    training.lr_scheduler.step()
    if training.ema:
        training.ema.step(training.student.parameters())
    metrics.advance()
    last = stop or training.step == settings.max_train_steps
    checkpointing = last or training.step % settings.checkpointing_steps == 0
    if checkpointing or training.step % settings.logging_steps == 0:
        epoch = training.position / len(training.dataset)
        keys = metrics.first_keys_not_finite()
        line = metrics.log(training.step, learning_rate=learning_rate, epoch=epoch, grad_norm=float(norm))
        # With a gradient scaler an infinite norm is its way to find the scale; that step was skipped.
        check_finite(line if training.optimizer.scaler is None else {**line, "grad_norm": 0.0}, keys, settings)
    if checkpointing:
        save_state(settings, accelerator, training)
    if training.prompts and training.step % settings.validation_steps == 0:
        validate(settings, accelerator, training)


def validate(settings: DistillSettings, accelerator: Accelerator, training: Training) -> None:
    """Pictures of the student at this step, drawn by the main process while the others wait."""
    if accelerator.is_main_process:
        name = f"step-{training.step:07d}"
        draw_validation(
            training.student, training.ema, settings.cache / "base", training.prompts,
            settings.out / VALIDATION / name, name,
        )  # fmt: skip
    accelerator.wait_for_everyone()


def save_state(settings: DistillSettings, accelerator: Accelerator, training: Training) -> None:
    """A checkpoint, written by the main process while the others wait."""
    if accelerator.is_main_process:
        save_checkpoint(
            settings.out / CHECKPOINTS, training.step, training.student, training.state(),
            settings.checkpoints_total_limit,
        )  # fmt: skip
    accelerator.wait_for_everyone()


def save_student(settings: DistillSettings, training: Training) -> None:
    """The finished pipeline and its model card: the averaged weights when there is an average."""
    if training.ema:
        training.ema.copy_to(training.student.parameters())
    (settings.out / REPORT).unlink(missing_ok=True)
    models.save_pipeline(settings.cache / "base", training.student, settings.out)
    write_model_card(settings.out, settings.as_json())
    write_json(settings.out / FINISHED, {"step": training.step})


def save_report(settings: DistillSettings, device: torch.device) -> None:
    """report.html, with the student's pictures beside the teacher's of the cache and the untrained student's."""
    rows = {}
    if (settings.cache / SAMPLES).is_dir():
        rows["teacher"], sampler = load_samples(settings.cache / SAMPLES)
        folders = {
            "untrained student": settings.cache / "students" / settings.level,
            "student": settings.out / "unet",
        }
        dtype = models.DTYPES[models.resolve_dtype("auto", device)]
        for name, folder in folders.items():
            model = Model(settings.cache / "base", folder, device, dtype)
            rows[name] = draw_apart(model, rows["teacher"].prompts, sampler, name)
    lines = (settings.out / METRICS).read_text(encoding="utf-8").splitlines()
    title = f"{settings.level}, distilled from {settings.cache}"
    write_report(settings.out, title, settings.as_json(), [json.loads(line) for line in lines], rows)


def step_losses(training: Training, settings: DistillSettings, batch: Batch) -> dict[str, Tensor]:
    """The loss terms of one batch: float32 scalars by name (see `losses.distillation_losses`)."""
    pairs = pairs_of(settings)
    latents, noise, timesteps = batch.latents, batch.noise, batch.timesteps
    noisy = add_noise(latents, noise, timesteps, training.alphas_cumprod)
    with training.taps.recording() as features:
        prediction = training.model(noisy, timesteps, encoder_hidden_states=batch.prompt_embeds.float()).sample
    sampled, stored = {}, {}
    for student_tap, teacher_tap in pairs:
        feature = batch.features[teacher_tap]
        sampled[student_tap] = sample_tokens(features[student_tap], feature.rows, feature.columns, feature.stride)
        stored[teacher_tap] = feature.decode()
    prediction_type = training.dataset.shards.manifest.spec["prediction_type"]
    aim = target(latents, noise, timesteps, training.alphas_cumprod, prediction_type)
    weights = None
    if settings.snr_gamma is not None:
        weights = min_snr_weights(timesteps, training.alphas_cumprod, settings.snr_gamma, prediction_type)
    return distillation_losses(
        prediction, aim, batch.teacher_pred, sampled, stored, pairs, settings.feature_loss, weights
    )


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
    if not (settings.cache / "base" / models.MODEL_INDEX).is_file():
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
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return student, saved


def batches(
    settings: DistillSettings, dataset: CacheDataset, accelerator: Accelerator, position: int
) -> Iterator[Batch]:
    """Batches of this process on its device, without end, from sample `position` of the stream on."""
    order = EpochBatches(
        len(dataset), settings.train_batch_size, settings.seed, start=position,
        rank=accelerator.process_index, world_size=accelerator.num_processes,
    )  # fmt: skip
    workers = settings.dataloader_num_workers
    if workers is None:
        # Processes beside a student that trains on all cores cost it more than reading between its steps does.
        workers = 2 if models.computes_beside(accelerator.device) else 0
    loader = DataLoader(
        dataset, batch_sampler=order, collate_fn=dataset.collate, num_workers=workers,
        pin_memory=accelerator.device.type == "cuda", multiprocessing_context="forkserver" if workers else None,
    )  # fmt: skip
    for batch in loader:
        yield batch.to(accelerator.device)


def check_finite(line: dict[str, float], keys: tuple[str, ...], settings: DistillSettings) -> None:
    """Raise UserError if anything measured in a line of metrics is NaN or Inf; `keys` are of the first such batch."""
    bad = ", ".join(name for name, value in line.items() if not math.isfinite(value))
    if bad:
        saved = [folder for _, folder in list_checkpoints(settings.out / CHECKPOINTS)]
        raise UserError(
            f"the loss is NaN or Inf by step {line['step']} ({bad})"
            + (f", first with the entries {', '.join(keys)}" if keys else "")
            + (f"; the last good checkpoint is {saved[-1]}" if saved else "; there is no checkpoint yet")
            + ". Lower --learning-rate, or use --mixed-precision bf16 or no"
        )


def claim(settings: DistillSettings, processes: int) -> None:
    """Take the output directory for these settings.

    Raises ShardError with the difference if it holds a checkpoint or a student of other ones.
    """
    path, spec = settings.out / SPEC, training_spec(settings, processes)
    if list_checkpoints(settings.out / CHECKPOINTS) or finished_step(settings.out):
        if not path.is_file():
            raise UserError(f"{settings.out} holds a training without its {SPEC}: choose another output directory")
        refuse_other_spec(settings.out, json.loads(path.read_text(encoding="utf-8")), spec)
        remove_leftovers(settings.out, settings.out / CHECKPOINTS)
        return
    settings.out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(settings.out, settings.out / CHECKPOINTS)
    write_json(path, spec)
    write_settings(settings.out, "distill", settings)


def finished_step(out: Path) -> int:
    """The step of the student that `out` holds as a pipeline; 0 if it holds none."""
    path = out / FINISHED
    return json.loads(path.read_text(encoding="utf-8"))["step"] if path.is_file() else 0


def plan(settings: DistillSettings) -> list[str]:
    """What a run would do."""
    dataset = open_cache(settings)
    settings = worked_out(settings, len(dataset), 1)
    done = max([step for step, _ in list_checkpoints(settings.out / CHECKPOINTS)], default=0)
    batch = settings.train_batch_size * settings.gradient_accumulation_steps
    left = max(0, settings.max_train_steps - done)
    return [
        f"entries: {len(dataset)}, with the taps {', '.join(dataset.taps) or 'none'}",
        f"steps: {settings.max_train_steps}, {done} of them done; each of {batch} entries a process",
        f"epochs: {settings.max_train_steps * batch / len(dataset):.2f} on one process",
        f"forward passes still to run: {left * settings.gradient_accumulation_steps}",
    ]


command: Callable = stage_command("distill", DistillSettings, plan, run)

if __name__ == "__main__":
    command()
