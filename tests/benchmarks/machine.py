"""What a benchmark ran on, for the head of its table, and processes of its own for what it measures."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import accelerate
import diffusers
import torch
import transformers

# A process for every measurement is a fork of one that has imported these, and nothing else.
IMPORTED = ["pipeline.encode", "pipeline.teacher_cache", "pipeline.distill", "diffusers.pipelines.stable_diffusion"]


def machine(device: str = "auto") -> str:
    """Cores, the GPU unless `device` is cpu, and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else "no GPU"
    return (
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {gpu}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}, "
        f"accelerate {accelerate.__version__}"
    )


def in_process(function: Callable, *arguments):
    """What the function returns in a process of its own, so that its peak memory is its own."""
    context = get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def run_stage(*arguments: object) -> tuple[float, float, float]:
    """Run one stage; returns seconds in all, seconds a unit of its progress bar, and peak memory in GB."""
    started = time.monotonic()
    process = subprocess.Popen(["distill-sd", *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    shown = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(shown)
    seconds = time.monotonic() - started
    done, minutes, rest = re.findall(r"(\d+)/\1 \[(\d+):(\d+)<", shown)[-1]
    return seconds, (60 * int(minutes) + int(rest)) / int(done), usage.ru_maxrss / 1e6


def stage_table(stages: dict[str, tuple[float, float, float]]) -> str:
    """What `run_stage` measured, a stage a row."""
    rows = (f"| {name} | {all_:.0f} | {each:.1f} | {memory:.1f} |" for name, (all_, each, memory) in stages.items())
    return "\n".join(
        ["| stage | seconds in all | seconds an entry or step | peak memory, GB |", "|---|---|---|---|", *rows]
    )
