"""On a CPU, a stage keeps its freed memory and returns it for other processes, as its resident size shows."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the malloc of other C libraries is not tuned"
)

A_STAGE = """
from pipeline.system.device import process_state
process_state("cpu")
"""
A_TRAINING = """
from pathlib import Path
import pipeline.commands.distill
from pipeline.distill import DistillSettings
from pipeline.training.accelerator import make_accelerator
make_accelerator(DistillSettings(cache=Path("cache"), out=Path("out"), level="sd_small", device="cpu"))
"""
FREED = """
from pathlib import Path
import torch

def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10

before = resident()
tensors = [torch.ones(64 << 20, dtype=torch.uint8) for _ in range(4)]
# A later allocation that stays alive keeps malloc from shrinking the heap's end.
later = torch.ones(1 << 20)
del tensors
"""
HELD = "print(resident() - before)\n"
# No process is asked for anything, so none has to be started.
GENERATING = """
from pipeline.sampling import process
from pipeline.sampling.process import PipelineRef, generating_process
process.forkserver = lambda *modules: None
with generating_process(PipelineRef(Path("base"), Path("unet"), torch.device("cpu"), torch.float32)):
    pass
"""


def printed_bytes(script: str) -> list[int]:
    """The numbers that a script prints, run in a separate process without a GPU."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": ""},
    )
    return [int(line) for line in result.stdout.splitlines()]


def test_a_stage_keeps_the_memory_it_frees():
    """Before it starts, the same allocations leave nothing behind."""
    before, held = printed_bytes(FREED + HELD + A_STAGE + FREED + HELD)
    assert before < 32 << 20
    assert held > 200 << 20


def test_a_training_keeps_it_too_and_returns_it_before_another_process_generates_images():
    held, left = printed_bytes(A_TRAINING + FREED + HELD + GENERATING + HELD)
    assert held > 200 << 20
    assert left < 32 << 20
