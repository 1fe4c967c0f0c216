"""accelerate as the settings ask for it: what they say counts, and not what accelerate's environment says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from shutil import which

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration

from pipeline.system.device import refuse_other_device, refuse_sharding, use_cpu
from pipeline.system.errors import FAILURES, UserError, first_line
from pipeline.system.memory import keep_freed_memory
from pipeline.training.output import LOGS
from pipeline.training.settings import PRECISIONS, Chosen, TrainingSettings

# How long processes wait for each other within a step, which may compile or read from a slow disk.
STEP_PATIENCE = timedelta(minutes=30)
ACCUMULATION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"


def resolve_precision(settings: Chosen) -> Chosen:
    """The settings with a `mixed_precision`: as they say, else as `accelerate launch` says, else no.

    Raises UserError for a precision that accelerate knows and training does not, such as fp8.
    """
    precision = settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in PRECISIONS:
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION is {precision}, which is not one of {', '.join(PRECISIONS)}. "
            "Pass --mixed-precision, which takes precedence."
        )
    return replace(settings, mixed_precision=precision)


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """The accelerator that the settings describe; their `mixed_precision` is resolved.

    Raises UserError for what the device, its software or a package that is missing cannot do, and for a launch that
    would share a network out over devices.
    """
    refuse_sharding()
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
    on_cuda = not use_cpu(device) and torch.cuda.is_available()
    if precision == "bf16" and on_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
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


def refuse_without_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile lacks what it generates code with: a C++ compiler, on a GPU a C compiler."""
    if device.type == "cuda":
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
        missing = None if any(map(which, names)) else f"no C compiler: {', '.join(names)} not found"
    else:
        missing = _missing_cpp_compiler()
    if missing:
        raise UserError(
            f"--compile needs a compiler ({missing}). Install one, such as `apt install g++`, or leave --compile out."
        )


def _missing_cpp_compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except FAILURES as error:
        return first_line(error)
    return None


@contextmanager
def compile_failures(compiled: bool) -> Iterator[None]:
    """Raise UserError where torch.compile fails, which it does in the first step, for what it finds on the machine."""
    if not compiled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        raise UserError(f"--compile failed ({first_line(error)}). Fix this, or leave --compile out.") from error
