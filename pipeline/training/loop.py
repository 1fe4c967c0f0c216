"""Training a U-Net from entries: the loop that `distill` and `finetune` share.

A step: batch of entries -> noisy latents -> student U-Net -> losses -> backward -> AdamW.

The files next to this one, in the order of a run: settings, output, accelerator, initial_student, transform, optimizer,
checkpoint, loader, objective, metrics, interrupts, validation, held_out, report.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from pipeline.core.diffusion import add_noise
from pipeline.core.taps import Taps
from pipeline.models.families import Family, denoise
from pipeline.models.load import load_scheduler
from pipeline.models.schedule import set_prediction_type
from pipeline.sampling.generate import Sampler, check_sampler
from pipeline.settings.training import TrainingSettings
from pipeline.system.compiling import compile_failures
from pipeline.system.device import leave_processes
from pipeline.system.echo import say
from pipeline.system.errors import FAILURES, UserError, first_line
from pipeline.training.accelerator import start_trackers
from pipeline.training.checkpoint import (
    keep_newest,
    list_checkpoints,
    load_checkpoint,
    reading_checkpoint,
    save_checkpoint,
)
from pipeline.training.held_out import HeldOut
from pipeline.training.interrupts import Interrupts
from pipeline.training.metrics import Metrics, SeenBatch
from pipeline.training.objective import Objective
from pipeline.training.optimizer import (
    check_moments,
    know_8bit_moments,
    laid_out_like,
    make_optimizer,
    match_memory_format,
)
from pipeline.training.output import (
    CHECKPOINTS,
    FINISHED,
    METRICS,
    VALIDATION,
    checkpointed_step,
    hashes_of_result,
    require_room,
)
from pipeline.training.peers import Peers
from pipeline.training.transform import Transform
from pipeline.training.validation import evaluated, generate_validation, prompts_of
from shards.dataset import Batch
from shards.files import write_json

# Entries that a message names; a step may have hundreds.
KEYS_NAMED = 3


class Rolling(Protocol):
    """What the loop asks of the rounds of a rolling cache; see `rounds.RollingRounds`."""

    def stopped_waiting(self, position: int, peers: Peers, interrupts: Interrupts) -> bool: ...

    def has_passed_one(self, position: int) -> bool: ...

    def saved(self, position: int, *, is_last: bool) -> None: ...


@dataclass(kw_only=True)
class Training:
    """Everything that a run updates.

    `model` is the student as accelerate wraps it, `base` the pipeline that it belongs to. `step` counts optimiser
    steps; `position` counts the entries taken from the stream of epochs, by all processes together. `prompts` are for
    validation images, and `held_out` is for the error on images that are not trained on. `metrics` are the sums since
    the last line of metrics.jsonl, where the training stopped between two. `problems` tell what failed without
    stopping the training. `rolling` is for a cache of which only some rounds are there.
    """

    student: UNet2DConditionModel
    transform: Transform
    base: Path
    family: Family
    model: torch.nn.Module
    peers: Peers
    objective: Objective
    taps: Taps
    optimizer: AcceleratedOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: EMAModel | None
    dataset: Sized
    alphas_cumprod: Tensor
    prediction_type: str
    prompts: list[str]
    held_out: HeldOut | None = None
    step: int = 0
    position: int = 0
    metrics: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    rolling: Rolling | None = None

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
            "metrics": self.metrics,
        }

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.student.parameters() if parameter.requires_grad]

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` returned. Raises ValueError, KeyError or the like if it is of another training."""
        if (state["ema"] is None) != (self.ema is None):
            raise ValueError("it was made with another --use-ema")
        self.step, self.position, self.metrics = state["step"], state["position"], state.get("metrics")
        self.optimizer.load_state_dict(state["optimizer"])
        check_moments(self.optimizer)
        match_memory_format(self.optimizer)
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
            if [shadow.shape for shadow in self.ema.shadow_params] != [weights.shape for weights in self.trained]:
                raise ValueError("its EMA is of another student")
            pairs = zip(self.trained, self.ema.shadow_params, strict=True)
            self.ema.shadow_params = [laid_out_like(parameter, shadow) for parameter, shadow in pairs]
        if self.optimizer.scaler and state["scaler"]:
            self.optimizer.scaler.load_state_dict(state["scaler"])


def start(
    settings: TrainingSettings, transform: Transform, initial: Callable[[], UNet2DConditionModel]
) -> tuple[UNet2DConditionModel, dict[str, Any] | None]:
    """The prepared student of the newest checkpoint and the rest of its state, or the `initial` one and None."""
    checkpoints = list_checkpoints(settings.out / CHECKPOINTS)
    if checkpoints:
        if settings.use_8bit_adam:
            know_8bit_moments()
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
    held_out: HeldOut | None = None,
) -> Training:
    """Everything that trains the student, on the device; with the `state` of a checkpoint if there is one."""
    prompts = prompts_of(settings)
    if prompts:
        scheduler = load_scheduler(base)
        set_prediction_type(scheduler, noise_scheduler.config.prediction_type)
        check_sampler(scheduler, Sampler(), str(base))
    # On a CPU, channels_last would have the gradients of convolutions copied.
    on_gpu = accelerator.device.type == "cuda"
    student.to(accelerator.device, memory_format=torch.channels_last if on_gpu else torch.contiguous_format).train()
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if settings.allow_tf32:
        # For matrix products. torch lets convolutions use it anyway.
        torch.set_float32_matmul_precision("high")
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, settings, accelerator.device)
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
        peers=Peers(accelerator),
        objective=objective,
        taps=Taps(student, objective.student_taps),
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        ema=ema,
        dataset=dataset,
        alphas_cumprod=noise_scheduler.alphas_cumprod.to(accelerator.device),
        prediction_type=noise_scheduler.config.prediction_type,
        prompts=prompts,
        held_out=held_out,
    )
    if state is not None:
        with reading_checkpoint(list_checkpoints(settings.out / CHECKPOINTS)[-1][1]):
            training.load_state(state)
        accelerator.print(f"resuming from step {training.step} of {settings.max_train_steps}")
    if ema:
        ema.to(settings.ema_device or accelerator.device)
    return training


def run_training(
    settings: TrainingSettings,
    accelerator: Accelerator,
    training: Training,
    stream: Iterator[Batch],
    save: Callable[[], None],
) -> list[str]:
    """Train to the last step and `save` the result, averaged if there is an average.

    Returns what failed without stopping the training, a sentence each.
    """
    start_trackers(settings, accelerator)
    if accelerator.is_main_process:
        # A run that was killed after it wrote one may have left more.
        keep_newest(settings.out / CHECKPOINTS, settings.checkpoints_total_limit)
        require_room(settings, training.student, training.base, training.ema is not None)
    train(settings, accelerator, training, stream)
    if accelerator.is_main_process:
        if training.ema:
            training.ema.copy_to(training.trained)
        # Without it, a run that is killed while it saves is one that has its last step to save.
        (settings.out / FINISHED).unlink(missing_ok=True)
        save()
        write_json(settings.out / FINISHED, {"step": training.step, "sha256": hashes_of_result(settings.out)})
    training.peers.wait()
    for active in accelerator.trackers:
        active.finish()
    accelerator.free_memory(training.model, training.optimizer)
    return training.problems


def train(settings: TrainingSettings, accelerator: Accelerator, training: Training, stream: Iterator[Batch]) -> None:
    """Step until `max_train_steps`, with metrics and checkpoints. The last step leaves a checkpoint.

    Ctrl-C leaves one too, in all processes at the same step, then raises KeyboardInterrupt, which names the step.
    """
    total_steps = settings.max_train_steps
    assert total_steps is not None
    path = settings.out / METRICS
    metrics = Metrics(path, accelerator, settings.command, training.step, total_steps, training.metrics)
    with closing(metrics), Interrupts() as interrupts, training.peers.told_when_lost():
        if not training.step:
            measure_held_out(accelerator, training, metrics)
        # The position of the next step.
        begins = training.position
        while training.step < total_steps:
            waits = training.rolling if training.position == begins else None
            if waits and waits.stopped_waiting(training.position, training.peers, interrupts):
                if training.step > checkpointed_step(settings.out):
                    save_state(settings, accelerator, training, metrics)
                raise stopped(accelerator, training, total_steps)
            batch = next(stream)
            with accelerator.accumulate(training.model), compile_failures(settings.compile):
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
                begins = training.position
                stop = training.peers.any(interrupts.requested)
                after_step(settings, accelerator, training, metrics, norm, stop)
                if stop:
                    raise stopped(accelerator, training, total_steps)


def stopped(accelerator: Accelerator, training: Training, total_steps: int) -> KeyboardInterrupt:
    """Leave the other processes, and the error that ends a training which was told to stop and is saved."""
    for active in accelerator.trackers:
        active.finish()
    leave_processes(accelerator)
    done = f"Stopped at step {training.step} of {total_steps}"
    return KeyboardInterrupt(f"{done}. Rerun the same command to resume from there.")


def step_losses(training: Training, batch: Batch) -> dict[str, Tensor]:
    """The loss terms of one batch: float32 scalars by name."""
    noisy = add_noise(batch.latents, batch.added_noise, batch.timesteps, training.alphas_cumprod)
    with training.taps.recording(noisy) as features:
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
        average(training.ema, training.trained)
    metrics.advance()
    interval = training.step == settings.max_train_steps or training.step % settings.checkpointing_steps == 0
    logging = interval or training.step == 1 or training.step % settings.logging_steps == 0
    if logging or stop:
        means = metrics.means()
        # A gradient scaler finds its scale by infinite norms, and skips those steps.
        norms = {"grad_norm": float(norm)}
        check_finite(means if training.optimizer.scaler else means | norms, training.step, metrics, settings)
    if logging:
        epoch = training.position / len(training.dataset)
        metrics.log(training.step, means, learning_rate=learning_rate, epoch=epoch, **norms)
    validating = training.step % settings.validation_steps == 0
    if not stop and (validating or training.step == settings.max_train_steps):
        # Before the checkpoint: a run that is killed between the two repeats both.
        measure_held_out(accelerator, training, metrics)
    # The teacher goes on when a checkpoint tells that a round is not needed any more.
    if interval or stop or (training.rolling and training.rolling.has_passed_one(training.position)):
        save_state(settings, accelerator, training, metrics)
    if training.prompts and not stop and validating:
        validate(settings, accelerator, training)


def average(ema: EMAModel, trained: list[torch.nn.Parameter]) -> None:
    """Take the weights into the average, on the average's device."""
    device = ema.shadow_params[0].device
    # Weights without gradients would be copied, not averaged.
    ema.step([weights.detach().to(device).requires_grad_() for weights in trained])


def validate(settings: TrainingSettings, accelerator: Accelerator, training: Training) -> None:
    """Images of the student at this step, generated by the main process while the others wait.

    A failure is noted and told, and the training goes on.
    """
    if accelerator.is_main_process:
        name = f"step-{training.step:07d}"
        try:
            with evaluated(training.student, training.trained, training.ema):
                generate_validation(
                    training.student,
                    training.prediction_type,
                    training.base,
                    training.prompts,
                    settings.out / VALIDATION / name,
                    name,
                )
        except (UserError, *FAILURES) as error:
            training.problems.append(
                f"validation images of step {training.step} failed ({first_line(error)}). To make some of the finished "
                f"student, run `distill-sd sample --model {settings.out} --prompts {settings.validation_prompts}`."
            )
            say(training.problems[-1], err=True)
    training.peers.wait()


def measure_held_out(accelerator: Accelerator, training: Training, metrics: Metrics) -> None:
    """The student's error on held-out entries, measured by the main process while the others wait."""
    if training.held_out is None:
        return
    if accelerator.is_main_process:
        with evaluated(training.student, training.trained, training.ema):
            errors = training.held_out.errors(
                training.student, training.family, training.alphas_cumprod, training.prediction_type, accelerator
            )
        metrics.note(training.step, errors)
    training.peers.wait()


def save_state(settings: TrainingSettings, accelerator: Accelerator, training: Training, metrics: Metrics) -> None:
    """A checkpoint, written by the main process while the others wait."""
    training.metrics = metrics.state()
    if accelerator.is_main_process:
        save_checkpoint(
            settings.out / CHECKPOINTS,
            training.step,
            lambda folder: training.transform.save_weights(training.student, folder),
            training.state(),
            settings.checkpoints_total_limit,
        )
    if training.rolling:
        training.rolling.saved(training.position, is_last=training.step == settings.max_train_steps)
    training.peers.wait()


def check_finite(values: dict[str, float], step: int, metrics: Metrics, settings: TrainingSettings) -> None:
    """Raise UserError if one of a step's values is NaN or Inf."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        saved = [folder for _, folder in list_checkpoints(settings.out / CHECKPOINTS)]
        first = metrics.first_not_finite()
        raise UserError(
            f"the loss is NaN or Inf by step {step} ({', '.join(bad)})"
            + (f", first with the entries {named(first.keys)}. " if first else ". ")
            + (f"The last good checkpoint is {saved[-1]}. " if saved else "There is no checkpoint yet. ")
            + remedy(first, settings)
        )


def named(keys: tuple[str, ...]) -> str:
    """The first of some keys, and how many more there are."""
    more = len(keys) - KEYS_NAMED
    return ", ".join(keys[:KEYS_NAMED]) + (f" and {more} more" if more > 0 else "")


def remedy(first: SeenBatch | None, settings: TrainingSettings) -> str:
    """What to do about a loss that is not finite, given the first batch that had one."""
    precision = "" if settings.mixed_precision in (None, "no") else "use --mixed-precision no"
    if first is not None and first.step == 0:
        # No weight had been changed, so the learning rate is not to blame.
        check = f"It was so before the first step: check the entries with `distill-sd verify --full {settings.entries}`"
        return f"{check}, or {precision}." if precision else f"{check}, and the weights that the training starts from."
    if settings.mixed_precision == "fp16":
        precision = "use --mixed-precision bf16 or no"
    return f"Lower --learning-rate, or {precision}." if precision else "Lower --learning-rate."
