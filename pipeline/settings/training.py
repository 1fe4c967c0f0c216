"""The options of every training: optimiser, schedule, precision, checkpoints, logging."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline.system.errors import UserError
from pipeline.system.options import MAX_BATCH, MAX_WORKERS, QAT_BITS, DeviceOptions
from pipeline.system.settings import REQUIRED, option
from shards.location import Location, without_secrets

TRACKERS = ("tensorboard", "wandb", "trackio")
DEFAULT_STEPS = 15000
OPEN_ENDED = ("constant", "constant_with_warmup")
PRECISIONS = ("no", "fp16", "bf16")
# Those of diffusers that need no further options.
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(DeviceOptions):
    out: Path = option(REQUIRED, "Directory to write the student's pipeline to.")
    max_train_steps: int | None = option(None, "Optimiser steps; 15000 unless epochs are given.", ge=1)
    num_train_epochs: int | None = option(None, "Passes over the entries, in place of --max-train-steps.", ge=1)
    train_batch_size: int = option(8, "Entries per forward pass and process.", ge=1, le=MAX_BATCH)
    gradient_accumulation_steps: int = option(1, "Forward passes per optimiser step.", ge=1, le=MAX_BATCH)
    snr_gamma: float | None = option(None, "Gamma of Min-SNR weights for task and output; 5.0 is usual.", gt=0.0)
    learning_rate: float = option(1e-5, "Learning rate after warm-up.", gt=0.0)
    scale_lr: bool = option(False, "Multiply the learning rate by the entries per step, over all processes.")
    lr_scheduler: str = option(
        "constant",
        "Learning-rate schedule.",
        choices=LR_SCHEDULERS,
    )
    lr_warmup_steps: int = option(0, "Optimiser steps of linear warm-up.", ge=0)
    max_grad_norm: float = option(1.0, "Largest gradient norm; larger gradients are clipped.", gt=0.0)
    adam_beta1: float = option(0.9, "AdamW beta1.", ge=0.0, lt=1.0)
    adam_beta2: float = option(0.999, "AdamW beta2.", ge=0.0, lt=1.0)
    adam_weight_decay: float = option(1e-2, "AdamW weight decay.", ge=0.0)
    adam_epsilon: float = option(1e-8, "AdamW epsilon.", gt=0.0)
    use_8bit_adam: bool = option(
        False, "AdamW with 8-bit moments, which take less memory; by torchao, or by bitsandbytes on a GPU that has it."
    )
    use_ema: bool = option(False, "Keep an exponential moving average of the weights and save it as the student.")
    ema_decay: float = option(0.9999, "Decay of the average, after its warm-up.", ge=0.0, le=1.0)
    ema_device: str | None = option(
        None,
        "Where the average is kept: cpu saves its memory on a GPU, and copies the weights at each step. By default "
        "where the student is trained.",
        choices=("cpu",),
    )
    qat: str | None = option(
        None,
        "Train for integers, by rounding weights and the inputs of layers in every pass: int8, or w4a8 for weights of "
        "4 bits. By default not.",
        choices=tuple(QAT_BITS),
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    mixed_precision: str | None = option(
        None,
        "Precision of the student's forward and backward passes. By default what `accelerate launch` says, else bf16 "
        "on a GPU that has it, else no.",
        choices=PRECISIONS,
    )
    compile: bool = option(False, "Compile the student with torch.compile: a slow start, then faster steps.")
    allow_tf32: bool | None = option(
        None, "Multiply float32 matrices in TF32: faster, with 10 bits of mantissa. By default on GPUs that have it."
    )
    checkpointing_steps: int = option(500, "Optimiser steps between checkpoints.", ge=1)
    checkpoints_total_limit: int = option(2, "Newest checkpoints to keep.", ge=1)
    logging_steps: int = option(10, "Optimiser steps between lines of metrics.jsonl.", ge=1)
    validation_prompts: Path | None = option(
        None, "Text file with one prompt per line, to generate images of during training."
    )
    validation_latents: Location | None = option(
        None,
        "Latents of held-out images, or a cache of them, to measure the error on before, during and after training; a "
        "directory or an address.",
    )
    validation_steps: int = option(500, "Optimiser steps between validation images and held-out errors.", ge=1)
    report: bool = option(True, "Write report.html at the end: loss curves, images, cost.")
    fp16_variant: bool = option(
        False, "Write the weights in fp16 too, next to those in fp32: diffusers loads them as the variant fp16."
    )
    report_to: str = option("none", "Also log the metrics to this tracker.", choices=("none", *TRACKERS))
    push_to_hub: str | None = option(None, "Repository on the model hub, as owner/name, to upload the student to.")
    dataloader_num_workers: int | None = option(
        None,
        "Processes that read and decompress; 0 reads in the training loop. Default: 2; on a CPU 0, or 1 if the entries "
        "lie at an address.",
        ge=0,
        le=MAX_WORKERS,
    )
    seed: int = option(0, "Seed for the order of entries.", ge=0)

    @property
    def entries(self) -> Location:
        """The shards that are trained on."""
        raise NotImplementedError

    @property
    def by_rounds(self) -> bool:
        """Whether one round is taken after another."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.push_to_hub is not None and not REPOSITORY.fullmatch(self.push_to_hub):
            raise UserError(
                f"--push-to-hub {without_secrets(self.push_to_hub)!r} is not the name of a repository. Give owner/name."
            )
        if self.qat and self.compile:
            raise UserError(f"--compile does not work with --qat {self.qat}. Leave --compile out.")
        if self.ema_device and not self.use_ema:
            raise UserError(f"--ema-device {self.ema_device} is for the average of --use-ema. Add that option.")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise UserError("--lr-scheduler constant has no warm-up. Use constant_with_warmup.")
        if self.max_train_steps is not None and self.num_train_epochs is not None:
            raise UserError(
                "--max-train-steps and --num-train-epochs both set the length of the training. Use only one."
            )


# Settings that may differ between a run and its continuation: they change a step by rounding at most.
MAY_CHANGE_ON_RESUME = (
    "out",
    "train_batch_size",
    "gradient_accumulation_steps",
    "max_train_steps",
    "num_train_epochs",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
    "dataloader_num_workers",
    "device",
    "ema_device",
    "gradient_checkpointing",
    "compile",
    "report_to",
    "validation_prompts",
    "validation_latents",
    "report",
    "fp16_variant",
    "validation_steps",
    "push_to_hub",
)


Chosen = TypeVar("Chosen", bound=TrainingSettings)


def resolve_steps_and_lr(settings: Chosen, entries: int, processes: int) -> Chosen:
    """The settings with steps and learning rate worked out.

    An epoch has as many steps as it takes to see every entry once. `scale_lr` multiplies by the entries per step, as
    in diffusers' scripts.
    """
    batch_size = global_batch_size(settings, processes)
    steps = settings.max_train_steps or DEFAULT_STEPS
    if settings.num_train_epochs is not None:
        steps = math.ceil(settings.num_train_epochs * entries / batch_size)
    rate = settings.learning_rate * (batch_size if settings.scale_lr else 1)
    return replace(settings, max_train_steps=steps, num_train_epochs=None, learning_rate=rate, scale_lr=False)


def global_batch_size(settings: TrainingSettings, processes: int) -> int:
    """Entries per optimiser step."""
    return settings.train_batch_size * settings.gradient_accumulation_steps * processes


def resume_fingerprint(settings: TrainingSettings, processes: int, free: tuple[str, ...]) -> dict[str, Any]:
    """The settings that decide the weights at a given step; `free` ones do not count.

    The length counts only if the lr schedule depends on it. Of the batch only its global size counts, over processes
    and accumulation, since a step then sees the same entries.
    """
    spec = {key: value for key, value in settings.as_json().items() if key not in (*MAY_CHANGE_ON_RESUME, *free)}
    spec["global_batch_size"] = global_batch_size(settings, processes)
    if settings.lr_scheduler not in OPEN_ENDED:
        spec["max_train_steps"] = settings.max_train_steps
    return spec
