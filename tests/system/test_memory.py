"""What is freed on a CPU is kept, and given back for other processes: seen in the resident size."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc is left as it is")

STARTS = {
    "nothing": "",
    "a stage": "from pipeline import models; models.process_state('cpu')",
    "a training": """
from pathlib import Path
from pipeline.distill_settings import DistillSettings
from pipeline.trainer import make_accelerator
make_accelerator(DistillSettings(cache=Path("cache"), out=Path("out"), level="sd_small", device="cpu"))
""",
}
FREED = """
from pathlib import Path
import torch

def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10

before = resident()
tensors = [torch.ones(64 << 20, dtype=torch.uint8) for _ in range(4)]
# What is allocated later and lives holds the end of the heap.
later = torch.ones(1 << 20)
del tensors
"""
DRAWING = """
from pipeline.samples import Model, drawing_apart
with drawing_apart(Model(Path("base"), Path("unet"), torch.device("cpu"), torch.float32)):
    print(resident() - before)
"""


def printed_bytes(script: str) -> int:
    """The number that a script ends with, in a process of its own without a GPU."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": ""},
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("start", STARTS)
def test_a_stage_keeps_what_it_frees(start):
    held = printed_bytes(STARTS[start] + FREED + "print(resident() - before)")
    assert held < 32 << 20 if start == "nothing" else held > 200 << 20


def test_a_stage_gives_it_back_for_a_process_that_draws():
    imported_before = "import pipeline.samples\n"
    assert printed_bytes(imported_before + STARTS["a stage"] + FREED + DRAWING) < 32 << 20
