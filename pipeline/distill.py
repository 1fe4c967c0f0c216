"""Stage two. cache/ -> student/: trains a student from the shards and never sees the teacher.

A step: batch of entries -> noisy latents -> student U-Net -> three losses -> backward -> AdamW.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import InitProcessGroupKwargs
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline import models
from pipeline.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from pipeline.checksums import changed_files
from pipeline.command import stage_command
from pipeline.diffusion import add_noise, min_snr_weights, target
from pipeline.errors import UserError
from pipeline.interrupts import Interrupts
from pipeline.losses import FEATURE_LOSSES, distillation_losses, total_loss
from pipeline.metrics import Metrics
from pipeline.report import REPORT, write_report
from pipeline.samples import SAMPLES, Model, draw_apart, load_samples
from pipeline.settings import REQUIRED, Settings, option
from pipeline.students import LEVELS
from pipeline.taps import Taps, sample_tokens
from pipeline.workspace import write_settings
from shards.dataset import Batch, CacheDataset, EpochBatches
from shards.files import remove_leftovers, write_json
from shards.manifest import read_manifest, refuse_other_spec

SPEC, FINISHED, METRICS, CHECKPOINTS = "spec.json", "finished.json", "metrics.jsonl", "checkpoints"
OPEN_ENDED = ("constant", "constant_with_warmup")


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings):
    cache: Path = option(REQUIRED, "Directory that `teacher-cache` wrote.")
    out: Path = option(REQUIRED, "Directory to write the student's pipeline to.")
    rounds: int | None = option(
        None, "Train on the cache's first N rounds alone; later ones may still be being written. By default on all.",
        low=1,
    )  # fmt: skip
    level: str = option(REQUIRED, "The student's architecture and tap pairs.", choices=tuple(LEVELS))
    max_train_steps: int = option(15000, "Optimiser steps.", low=1)
    train_batch_size: int = option(8, "Entries in one forward pass, on each process.", low=1)
    gradient_accumulation_steps: int = option(1, "Forward passes in one optimiser step.", low=1)
    output_weight: float = option(0.5, "Weight of the loss to the teacher's prediction.", low=0.0)
    feature_weight: float = option(0.5, "Weight of the sum of the taps' losses.", low=0.0)
    feature_loss: str = option(
        "mse", "A tap's loss: mean square error, or that as a share of the teacher's mean square.",
        choices=tuple(FEATURE_LOSSES),
    )  # fmt: skip
    snr_gamma: float | None = option(None, "Min-SNR weights of task and output; 5.0 is usual.", above=0.0)
    learning_rate: float = option(1e-5, "Learning rate after warm-up.", above=0.0)
    lr_scheduler: str = option(
        "constant", "Course of the learning rate.",
        choices=tuple(s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT),
    )  # fmt: skip
    lr_warmup_steps: int = option(0, "Optimiser steps of linear warm-up.", low=0)
    max_grad_norm: float = option(1.0, "Norm that gradients are clipped to.", above=0.0)
    adam_beta1: float = option(0.9, "AdamW's first decay.", low=0.0, below=1.0)
    adam_beta2: float = option(0.999, "AdamW's second decay.", low=0.0, below=1.0)
    adam_weight_decay: float = option(1e-2, "AdamW's weight decay.", low=0.0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", above=0.0)
    use_ema: bool = option(False, "Keep a moving average of the weights, and save that as the student.")
    ema_decay: float = option(0.9999, "Largest decay of the average; it warms up to it.", low=0.0, high=1.0)
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    mixed_precision: str = option("no", "Precision of the student's arithmetic.", choices=("no", "fp16", "bf16"))
    checkpointing_steps: int = option(500, "Optimiser steps between checkpoints.", low=1)
    checkpoints_total_limit: int = option(2, "Checkpoints to keep, the newest.", low=1)
    logging_steps: int = option(10, "Optimiser steps between lines of metrics.jsonl.", low=1)
    dataloader_num_workers: int | None = option(
        None, "Processes that read and decompress; 0 reads in the training loop. By default 2, on a CPU 0.", low=0
    )
    report: bool = option(True, "End with report.html: loss curves, pictures beside the teacher's, cost.")
    seed: int = option(0, "Seed of the order of entries.", low=0)
    device: str = option("auto", "auto takes the GPU if there is one.", choices=models.DEVICES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise UserError("--lr-scheduler constant has no warm-up: choose constant_with_warmup")


# What may differ between two runs that continue one another: none of it changes a step's arithmetic.
FREE = ("cache", "out", "max_train_steps", "checkpointing_steps", "checkpoints_total_limit", "logging_steps",
        "dataloader_num_workers", "device", "gradient_checkpointing", "report")  # fmt: skip


def run(settings: DistillSettings) -> None:
    """Train a student from a cache; ends with a whole diffusers pipeline."""
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        mixed_precision=settings.mixed_precision,
        cpu=models.use_cpu(settings.device),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=models.PATIENCE)],
    )
    dataset = open_cache(settings)
    with accelerator.main_process_first():
        claim(settings)
    done = finished_step(settings.out)
    if done >= settings.max_train_steps and (not settings.report or (settings.out / REPORT).is_file()):
        accelerator.print(
            f"already finished, nothing to do: {settings.out} holds a student of {done} steps; "
            "raise --max-train-steps to train it further"
        )
        return
    accelerator.wait_for_everyone()

    if done < settings.max_train_steps:
        training = prepare(settings, dataset, accelerator)
        train(settings, accelerator, training)
        if accelerator.is_main_process:
            save_student(settings, training)
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
    accelerator.wait_for_everyone()


@dataclass
class Training:
    """All that a run steps: `model` is the student as accelerate wraps it, `step` counts optimiser steps.

    `position` is the number of samples taken from the stream of epochs, by all processes together.
    """

    student: UNet2DConditionModel
    model: torch.nn.Module
    taps: Taps
    optimizer: AcceleratedOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    dataset: CacheDataset
    alphas_cumprod: Tensor
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
    optimizer = torch.optim.AdamW(
        student.parameters(), settings.learning_rate, (settings.adam_beta1, settings.adam_beta2),
        settings.adam_epsilon, settings.adam_weight_decay, fused=True,
    )  # fmt: skip
    # Not prepared: accelerate would step the schedule once for each process.
    lr_scheduler = get_scheduler(
        settings.lr_scheduler, optimizer, num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )  # fmt: skip
    ema = EMAModel(student.parameters(), decay=settings.ema_decay, foreach=True) if settings.use_ema else None
    model, optimizer = accelerator.prepare(student, optimizer)
    training = Training(
        student, model, Taps(student, [name for name, _ in pairs_of(settings)]), optimizer, lr_scheduler, ema,
        dataset, noise_scheduler.alphas_cumprod.to(accelerator.device),
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


def save_state(settings: DistillSettings, accelerator: Accelerator, training: Training) -> None:
    """A checkpoint, written by the main process while the others wait."""
    if accelerator.is_main_process:
        save_checkpoint(
            settings.out / CHECKPOINTS, training.step, training.student, training.state(),
            settings.checkpoints_total_limit,
        )  # fmt: skip
    accelerator.wait_for_everyone()


def save_student(settings: DistillSettings, training: Training) -> None:
    """The finished pipeline in the output directory: the averaged weights when there is an average."""
    if training.ema:
        training.ema.copy_to(training.student.parameters())
    (settings.out / REPORT).unlink(missing_ok=True)
    models.save_pipeline(settings.cache / "base", training.student, settings.out)
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


def pairs_of(settings: DistillSettings) -> tuple[tuple[str, str], ...]:
    """(student tap, teacher tap) that the loss needs: none when features have no weight."""
    return LEVELS[settings.level].taps if settings.feature_weight else ()


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
        folder = settings.cache / "students" / settings.level
        changed = changed_files(folder)
        if changed:
            raise UserError(
                f"{folder}: {changed[0]}; copy it from a whole cache, or delete the folder and run "
                f"`teacher-cache --students {settings.level}` again, with the other settings as they were"
            )
        try:
            student, saved = UNet2DConditionModel.from_pretrained(folder), None
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{folder} cannot be loaded ({reason}): copy it from a whole cache") from error
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


def training_spec(settings: DistillSettings) -> dict[str, Any]:
    """What decides the weights at a given step. The length counts only where the lr schedule hangs on it."""
    spec = {key: value for key, value in settings.as_json().items() if key not in FREE}
    if settings.lr_scheduler not in OPEN_ENDED:
        spec["max_train_steps"] = settings.max_train_steps
    manifest = read_manifest(settings.cache, "cache")
    return {"cache": manifest.spec_sha256, **spec, "rounds": settings.rounds or manifest.rounds}


def claim(settings: DistillSettings) -> None:
    """Take the output directory for these settings.

    Raises ShardError with the difference if it holds a checkpoint or a student of other ones.
    """
    path, spec = settings.out / SPEC, training_spec(settings)
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
