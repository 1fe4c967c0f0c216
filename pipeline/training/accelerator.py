"""accelerate as the settings ask for it: what they say counts, and not what accelerate's environment says."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration

from pipeline.models.fake_quant import require_modelopt
from pipeline.settings.training import PRECISIONS, Chosen, TrainingSettings
from pipeline.system.compiling import refuse_without_compiler
from pipeline.system.device import check_launch, refuse_other_device, use_cpu
from pipeline.system.errors import UserError, first_line
from pipeline.system.memory import keep_freed_memory
from pipeline.training.output import LOGS, existing_spec

# How long processes wait for each other within a step, which may compile or read from a slow disk.
STEP_PATIENCE = timedelta(minutes=30)
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def resolve_precision(settings: Chosen) -> Chosen:
    """The settings with `mixed_precision` and `allow_tf32` decided, so that a spec states them.

    What is not asked for, by an option or by `accelerate launch --mixed_precision`, is as in the training that `out`
    holds already. For a new one it is bf16 and TF32 on a GPU that has bf16, else neither.
    Raises UserError for a precision that accelerate knows and training does not, such as fp8.
    """
    # `accelerate launch` says "no" where it was not told anything.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    stated, default = existing_spec(settings.out), has_bf16(settings.device)
    precision = settings.mixed_precision or (None if launched == "no" else launched)
    precision = precision or stated.get("mixed_precision") or ("bf16" if default else "no")
    tf32 = settings.allow_tf32 if settings.allow_tf32 is not None else stated.get("allow_tf32", default)
    if precision not in PRECISIONS:
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION is {precision}, which is not one of {', '.join(PRECISIONS)}. "
            "Pass --mixed-precision, which takes precedence."
        )
    return replace(settings, mixed_precision=precision, allow_tf32=bool(tf32))


def has_bf16(device: str) -> bool:
    """Whether `--device` resolves to a CUDA GPU that computes in bf16 itself."""
    on_cuda = not use_cpu(device) and torch.cuda.is_available()
    return on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """The accelerator that the settings describe; their `mixed_precision` is resolved.

    Raises UserError for what the device, its software or a package that is missing cannot do, and for a launch that
    would share a network out over devices.
    """
    check_launch(settings.device)
    if settings.qat:
        require_modelopt(f"--qat {settings.qat}")
    if use_cpu(settings.device):
        keep_freed_memory()
    refuse_precision(settings.mixed_precision or "no", settings.device)
    accelerator = Accelerator(
        # As plugins, or accelerate's environment would override them.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=settings.gradient_accumulation_steps),
        dynamo_backend="no",
        mixed_precision=settings.mixed_precision,
        cpu=use_cpu(settings.device),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=STEP_PATIENCE)],
        log_with=tracker(settings.report_to),
        project_config=ProjectConfiguration(logging_dir=str(settings.out / LOGS)),
    )
    refuse_other_device(settings.device, accelerator.device)
    if settings.compile:
        refuse_without_compiler(accelerator.device)
    asked = os.environ.get(ACCUMULATION)
    if asked not in (None, str(settings.gradient_accumulation_steps)):
        accelerator.print(
            f"{ACCUMULATION}={asked} has no effect: --gradient-accumulation-steps is "
            f"{settings.gradient_accumulation_steps}"
        )
    return accelerator


def refuse_precision(precision: str, device: str) -> None:
    """Raise UserError for a mixed precision that the device does not have."""
    if precision == "fp16" and use_cpu(device):
        raise UserError("--mixed-precision fp16 needs a GPU. On a CPU, use bf16 or no.")
    if precision == "bf16" and not use_cpu(device) and torch.cuda.is_available() and not has_bf16(device):
        raise UserError(f"--mixed-precision bf16: {torch.cuda.get_device_name()} does not have bf16. Use fp16 or no.")


def tracker(name: str) -> str | None:
    """The tracker's name for accelerate. Raises UserError if its package is not installed."""
    if name == "none":
        return None
    if find_spec(name) is None:
        raise UserError(f"--report-to {name} needs the package {name}. Install it: pip install {name}")
    return name


def start_trackers(settings: TrainingSettings, accelerator: Accelerator) -> None:
    """Open the tracker's run. Raises UserError if that fails, as it does without a login."""
    if settings.report_to == "none":
        return
    try:
        accelerator.init_trackers("distill-sd", {name: str(value) for name, value in settings.for_others().items()})
    except Exception as error:
        raise UserError(
            f"--report-to {settings.report_to} could not be started ({first_line(error)}). "
            f"Log in to {settings.report_to}, or leave the option out."
        ) from error
