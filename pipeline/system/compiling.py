"""torch.compile: what it needs on the machine, and its failures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from shutil import which

import torch
from torch import nn

from pipeline.system.errors import FAILURES, UserError, first_line


def compile_networks(device: torch.device, *networks: nn.Module) -> None:
    """Have the networks compiled at their first pass, in place. Raises UserError where there is no compiler."""
    refuse_without_compiler(device)
    for network in networks:
        network.compile()


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
        cause = getattr(error, "inner_exception", error)
        raise UserError(f"--compile failed ({first_line(cause)}). Fix this, or leave --compile out.") from error
