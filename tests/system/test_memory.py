"""On a CPU, a stage keeps its freed memory and returns it for other processes, as its resident size shows."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the malloc of other C libraries is not tuned"
)

STARTS = {
    "nothing": "",
    "a stage": "from pipeline.system.device import process_state; process_state('cpu')",
    "a training": """
from pathlib import Path
from pipeline.distill import DistillSettings
from pipeline.training.accelerator import make_accelerator
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
# A later allocation that stays alive keeps malloc from shrinking the heap's end.
later = torch.ones(1 << 20)
del tensors
"""
GENERATING = """
from pipeline.sampling.process import PipelineRef, generating_process
with generating_process(PipelineRef(Path("base"), Path("unet"), torch.device("cpu"), torch.float32)):
    print(resident() - before)
"""


def printed_bytes(script: str) -> int:
    """The number that a script prints last, run in a separate process without a GPU."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": ""},
    )
    return int(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("start", STARTS)
def test_a_stage_keeps_the_memory_it_frees(start):
    held = printed_bytes(STARTS[start] + FREED + "print(resident() - before)")
    assert held < 32 << 20 if start == "nothing" else held > 200 << 20


def test_a_stage_returns_the_memory_before_another_process_generates_images():
    imported_before = "import pipeline.sampling.process\n"
    assert printed_bytes(imported_before + STARTS["a stage"] + FREED + GENERATING) < 32 << 20
