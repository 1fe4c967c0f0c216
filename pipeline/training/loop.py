"""Training a U-Net from entries: the loop that `distill` and `finetune` share.

A step: batch of entries -> noisy latents -> student U-Net -> losses -> backward -> AdamW.

The files next to this one, in the order of a run: settings, output, initial_student, transform, optimizer,
checkpoint, objective, metrics, interrupts, validation, report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader

from pipeline.core.diffusion import add_noise
from pipeline.core.taps import Taps
from pipeline.models.families import Family, denoise
from pipeline.system.device import PATIENCE, is_accelerator, use_cpu
from pipeline.system.errors import UserError
from pipeline.system.memory import keep_freed_memory
from pipeline.system.prompts import read_prompts
from pipeline.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from pipeline.training.interrupts import Interrupts
from pipeline.training.metrics import Metrics
from pipeline.training.objective import Objective
from pipeline.training.optimizer import make_optimizer, match_memory_format
from pipeline.training.output import CHECKPOINTS, FINISHED, LOGS, METRICS, VALIDATION
from pipeline.training.settings import TrainingSettings
from pipeline.training.transform import Transform
from pipeline.training.validation import generate_validation
from shards.dataset import Batch, EpochBatches
from shards.files import write_json


@dataclass(kw_only=True)
class Training:
    """Everything that a run updates.

    `model` is the student as accelerate wraps it, `base` the pipeline that it belongs to. `step` counts optimiser
    steps; `position` counts the entries taken from the stream of epochs, by all processes together. `prompts` are for
    validation images.
    """

    student: UNet2DConditionModel
    transform: Transform
    base: Path
    family: Family
    model: torch.nn.Module
    objective: Objective
    taps: Taps
    optimizer: AcceleratedOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    dataset: Sized
    alphas_cumprod: Tensor
    prediction_type: str
    prompts: list[str]
    step: int = 0
    position: int = 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the weights."""
        scaler = self.optimizer.scaler
        return {
            "step": self.step,
            "position": self.position,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
        }

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]

    def load_state(self, state: dict[str, Any]) -> None:
        self.step, self.position = state["step"], state["position"]
        self.optimizer.load_state_dict(state["optimizer"])
        match_memory_format(self.optimizer)
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.optimizer.scaler:
            self.optimizer.scaler.load_state_dict(state["scaler"])


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    if use_cpu(settings.device):
        keep_freed_memory()
    return Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        mixed_precision=settings.mixed_precision,
        cpu=use_cpu(settings.device),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        log_with=tracker(settings.report_to),
        project_config=ProjectConfiguration(logging_dir=str(settings.out / LOGS)),
    )


def tracker(name: str) -> str | None:
    """The tracker's name for accelerate. Raises UserError if its package is not installed."""
    if name == "none":
        return None
    if find_spec(name) is None:
        raise UserError(f"--report-to {name} needs the package {name}. Install it: pip install {name}")
    return name


def start(
    settings: TrainingSettings, transform: Transform, initial: Callable[[], UNet2DConditionModel]
) -> tuple[UNet2DConditionModel, dict[str, Any] | None]:
    """The prepared student of the newest checkpoint and the rest of its state, or the `initial` one and None."""
    checkpoints = list_checkpoints(settings.out / CHECKPOINTS)
    if checkpoints:
        return load_checkpoint(checkpoints[-1][1], lambda folder: transform.load_weights(initial, folder))
    student = initial()
    transform.prepare(student)
    return student, None


def prepare_training(
    settings: TrainingSettings,
    accelerator: Accelerator,
    student: UNet2DConditionModel,
    state: dict[str, Any] | None,
    *,
    objective: Objective,
    transform: Transform,
    family: Family,
    dataset: Sized,
    noise_scheduler: DDPMScheduler,
    base: Path,
) -> Training:
    """Everything that trains the student, on the device; with the `state` of a checkpoint if there is one."""
    # On a CPU, channels_last would have the gradients of convolutions copied.
    on_gpu = accelerator.device.type == "cuda"
    student.to(accelerator.device, memory_format=torch.channels_last if on_gpu else torch.contiguous_format).train()
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if settings.allow_tf32:
        # For matrix products. torch lets convolutions use it anyway.
        torch.backends.cuda.matmul.allow_tf32 = True
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, settings)
    # Not prepared: accelerate would step the schedule once per process.
    lr_scheduler = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
    ema = EMAModel(trained, decay=settings.ema_decay, foreach=True) if settings.use_ema else None
    model, optimizer = accelerator.prepare(torch.compile(student) if settings.compile else student, optimizer)
    training = Training(
        student=student,
        transform=transform,
        base=base,
        family=family,
        model=model,
        objective=objective,
        taps=Taps(student, objective.student_taps),
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        ema=ema,
        dataset=dataset,
        alphas_cumprod=noise_scheduler.alphas_cumprod.to(accelerator.device),
        prediction_type=noise_scheduler.config.prediction_type,
        prompts=read_prompts(settings.validation_prompts) if settings.validation_prompts else [],
    )
    if state is not None:
        training.load_state(state)
        accelerator.print(f"resuming from the checkpoint of step {training.step}")
    if ema:
        ema.to(accelerator.device)
    return training


def run_training(
    settings: TrainingSettings,
    accelerator: Accelerator,
    training: Training,
    stream: Iterator[Batch],
    save: Callable[[], None],
) -> None:
    """Train to the last step and `save` the result, averaged if there is an average. Then free the memory."""
    if settings.report_to != "none":
        accelerator.init_trackers("distill-sd", {k: str(v) for k, v in settings.as_json().items()})
    train(settings, accelerator, training, stream)
    if accelerator.is_main_process:
        if training.ema:
            training.ema.copy_to(training.trained)
        # Of a student that is being replaced, nobody is to be told that it is finished.
        (settings.out / FINISHED).unlink(missing_ok=True)
        save()
        write_json(settings.out / FINISHED, {"step": training.step})
    for active in accelerator.trackers:
        active.finish()
    accelerator.free_memory(training.model, training.optimizer)


def train(settings: TrainingSettings, accelerator: Accelerator, training: Training, stream: Iterator[Batch]) -> None:
    """Step until `max_train_steps`, with metrics and checkpoints. The last step leaves a checkpoint.

    Ctrl-C leaves one too, then raises KeyboardInterrupt.
    """
    total_steps = settings.max_train_steps
    assert total_steps is not None
    metrics = Metrics(settings.out / METRICS, accelerator, settings.command, training.step, total_steps)
    with closing(metrics), Interrupts(accelerator) as interrupts:
        while training.step < total_steps:
            batch = next(stream)
            with accelerator.accumulate(training.model):
                terms = step_losses(training, batch)
                total = training.objective.total(terms)
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


def step_losses(training: Training, batch: Batch) -> dict[str, Tensor]:
    """The loss terms of one batch: float32 scalars by name."""
    noisy = add_noise(batch.latents, batch.added_noise, batch.timesteps, training.alphas_cumprod)
    with training.taps.recording() as features:
        student_pred = denoise(training.model, noisy, batch.timesteps, batch.conditioning, training.family)
    return training.objective.losses(batch, student_pred, features, training.alphas_cumprod, training.prediction_type)


def after_step(
    settings: TrainingSettings, accelerator: Accelerator, training: Training, metrics: Metrics, norm: Tensor, stop: bool
) -> None:
    """What follows an optimiser step: schedule, average, and at intervals metrics, a checkpoint, validation images.

    `stop` makes this step the last of the run, which leaves a checkpoint.
    """
    training.step += 1
    learning_rate = float(training.lr_scheduler.get_last_lr()[0])
    training.lr_scheduler.step()
    if training.ema:
        training.ema.step(training.trained)
    metrics.advance()
    last = stop or training.step == settings.max_train_steps
    checkpointing = last or training.step % settings.checkpointing_steps == 0
    if checkpointing or training.step % settings.logging_steps == 0:
        epoch = training.position / len(training.dataset)
        keys = metrics.first_keys_not_finite()
        line = metrics.log(training.step, learning_rate=learning_rate, epoch=epoch, grad_norm=float(norm))
        # A gradient scaler finds its scale by infinite norms, and skips those steps.
        check_finite(line if training.optimizer.scaler is None else {**line, "grad_norm": 0.0}, keys, settings)
    if checkpointing:
        save_state(settings, accelerator, training)
    if training.prompts and training.step % settings.validation_steps == 0:
        validate(settings, accelerator, training)


def validate(settings: TrainingSettings, accelerator: Accelerator, training: Training) -> None:
    """Images of the student at this step, generated by the main process while the others wait."""
    if accelerator.is_main_process:
        name = f"step-{training.step:07d}"
        generate_validation(
            training.student,
            training.trained,
            training.ema,
            training.base,
            training.prompts,
            settings.out / VALIDATION / name,
            name,
        )
    accelerator.wait_for_everyone()


def save_state(settings: TrainingSettings, accelerator: Accelerator, training: Training) -> None:
    """A checkpoint, written by the main process while the others wait."""
    if accelerator.is_main_process:
        save_checkpoint(
            settings.out / CHECKPOINTS,
            training.step,
            lambda folder: training.transform.save_weights(training.student, folder),
            training.state(),
            settings.checkpoints_total_limit,
        )
    accelerator.wait_for_everyone()


def check_finite(line: dict[str, float], keys: tuple[str, ...], settings: TrainingSettings) -> None:
    """Raise UserError if a line of metrics has NaN or Inf. `keys` are those of the first such batch."""
    bad = ", ".join(name for name, value in line.items() if not math.isfinite(value))
    if bad:
        saved = [folder for _, folder in list_checkpoints(settings.out / CHECKPOINTS)]
        raise UserError(
            f"the loss is NaN or Inf by step {line['step']} ({bad})"
            + (f", first with the entries {', '.join(keys)}. " if keys else ". ")
            + (f"The last good checkpoint is {saved[-1]}. " if saved else "There is no checkpoint yet. ")
            + "Lower --learning-rate, or use --mixed-precision bf16 or no."
        )


def batches(settings: TrainingSettings, dataset: Any, accelerator: Accelerator, position: int) -> Iterator[Batch]:
    """Batches of this process on its device, endlessly, from entry `position` of the stream on."""
    for batch in make_loader(settings, dataset, accelerator, position):
        yield batch.to(accelerator.device)


def make_loader(settings: TrainingSettings, dataset: Any, accelerator: Accelerator, position: int) -> DataLoader:
    """This process's batches as `dataset.collate` makes them, endlessly, from entry `position` on."""
    order = EpochBatches(
        len(dataset),
        settings.train_batch_size,
        settings.seed,
        start=position,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    workers = settings.dataloader_num_workers
    if workers is None:
        # On a CPU, loader processes take more time from training than reading between the steps costs.
        workers = 2 if is_accelerator(accelerator.device) else 0
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=dataset.collate,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
        multiprocessing_context="forkserver" if workers else None,
    )
