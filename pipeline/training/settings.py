"""The options of every training: optimiser, schedule, precision, checkpoints, logging."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from diffusers.optimization import SchedulerType

from pipeline.system.errors import UserError
from pipeline.system.options import DeviceOptions
from pipeline.system.settings import REQUIRED, option

TRACKERS = ("tensorboard", "wandb", "trackio")
DEFAULT_STEPS = 15000
OPEN_ENDED = ("constant", "constant_with_warmup")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(DeviceOptions):
    out: Path = option(REQUIRED, "Directory to write the student's pipeline to.")
    max_train_steps: int | None = option(None, "Optimiser steps; 15000 unless epochs are given.", ge=1)
    num_train_epochs: int | None = option(None, "Passes over the cache, in place of --max-train-steps.", ge=1)
    train_batch_size: int = option(8, "Entries in one forward pass, on each process.", ge=1)
    gradient_accumulation_steps: int = option(1, "Forward passes in one optimiser step.", ge=1)
    snr_gamma: float | None = option(None, "Min-SNR weights of task and output; 5.0 is usual.", gt=0.0)
    learning_rate: float = option(1e-5, "Learning rate after warm-up.", gt=0.0)
    scale_lr: bool = option(False, "Multiply the learning rate by the entries of a step, over all processes.")
    lr_scheduler: str = option(
        "constant",
        "Course of the learning rate.",
        choices=tuple(s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT),
    )
    lr_warmup_steps: int = option(0, "Optimiser steps of linear warm-up.", ge=0)
    max_grad_norm: float = option(1.0, "Norm that gradients are clipped to.", gt=0.0)
    adam_beta1: float = option(0.9, "AdamW's first decay.", ge=0.0, lt=1.0)
    adam_beta2: float = option(0.999, "AdamW's second decay.", ge=0.0, lt=1.0)
    adam_weight_decay: float = option(1e-2, "AdamW's weight decay.", ge=0.0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon.", gt=0.0)
    use_8bit_adam: bool = option(False, "AdamW with 8-bit moments: less memory; takes the package bitsandbytes.")
    use_ema: bool = option(False, "Keep a moving average of the weights, and save that as the student.")
    ema_decay: float = option(0.9999, "Largest decay of the average; it warms up to it.", ge=0.0, le=1.0)
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    mixed_precision: str = option("no", "Precision of the student's arithmetic.", choices=("no", "fp16", "bf16"))
    compile: bool = option(False, "Compile the student with torch.compile: minutes at the start, faster steps.")
    allow_tf32: bool = option(False, "Let an NVIDIA GPU multiply float32 in TF32: faster, 10 bits of mantissa.")
    checkpointing_steps: int = option(500, "Optimiser steps between checkpoints.", ge=1)
    checkpoints_total_limit: int = option(2, "Checkpoints to keep, the newest.", ge=1)
    logging_steps: int = option(10, "Optimiser steps between lines of metrics.jsonl.", ge=1)
    validation_prompts: Path | None = option(None, "Text file, one prompt a line, to draw while training.")
    validation_steps: int = option(500, "Optimiser steps from one drawing of the prompts to the next.", ge=1)
    report_to: str = option("none", "Also log the metrics to this tracker.", choices=("none", *TRACKERS))
    push_to_hub: str | None = option(None, "Repository on the model hub, as owner/name, to upload the student to.")
    dataloader_num_workers: int | None = option(
        None, "Processes that read and decompress; 0 reads in the training loop. By default 2, on a CPU 0.", ge=0
    )
    seed: int = option(0, "Seed of the order of entries.", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise UserError("--lr-scheduler constant has no warm-up: choose constant_with_warmup")
        if self.max_train_steps is not None and self.num_train_epochs is not None:
            raise UserError("--max-train-steps and --num-train-epochs both say how long to train: give one of them")


# What may differ between two runs that continue one another: none of it changes a step, but by rounding.
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
    "gradient_checkpointing",
    "compile",
    "report_to",
    "validation_prompts",
    "validation_steps",
    "push_to_hub",
)


Chosen = TypeVar("Chosen", bound=TrainingSettings)


def resolve_steps_and_lr(settings: Chosen, entries: int, processes: int) -> Chosen:
    """The settings with steps and learning rate as they follow from the rest.

    An epoch is as many steps as show every entry once; `scale_lr` multiplies by the entries of a step, as diffusers'
    scripts do.
    """
    batch_size = global_batch_size(settings, processes)
    steps = settings.max_train_steps or DEFAULT_STEPS
    if settings.num_train_epochs is not None:
        steps = math.ceil(settings.num_train_epochs * entries / batch_size)
    rate = settings.learning_rate * (batch_size if settings.scale_lr else 1)
    return replace(settings, max_train_steps=steps, num_train_epochs=None, learning_rate=rate, scale_lr=False)


def global_batch_size(settings: TrainingSettings, processes: int) -> int:
    """Entries in one optimiser step."""
    return settings.train_batch_size * settings.gradient_accumulation_steps * processes


def resume_fingerprint(settings: TrainingSettings, processes: int, free: tuple[str, ...]) -> dict[str, Any]:
    """What decides the weights at a given step. The length counts only where the lr schedule hangs on it.

    Of the batch only the whole counts, over processes and accumulation: a step sees the same entries.
    """
    spec = {key: value for key, value in settings.as_json().items() if key not in (*MAY_CHANGE_ON_RESUME, *free)}
    spec["global_batch_size"] = global_batch_size(settings, processes)
    if settings.lr_scheduler not in OPEN_ENDED:
        spec["max_train_steps"] = settings.max_train_steps
    return spec
