"""What is freed is kept: counted in the pages that the system has to hand out."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

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
FAULTS = """
import resource, torch
fetched = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)
    fetched.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(fetched)[len(fetched) // 2] * resource.getpagesize())
"""


GIVEN_BACK = """
from pathlib import Path
import torch
from pipeline.memory import keep_freed_memory
from pipeline.samples import Model, drawing_apart

def resident():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10

keep_freed_memory()
before = resident()
tensors = [torch.ones(64 << 20, dtype=torch.uint8) for _ in range(4)]
# A later allocation that lives holds the end of the heap.
later = torch.ones(1 << 20)
del tensors
kept = resident() - before
with drawing_apart(Model(Path("base"), Path("unet"), torch.device("cpu"), torch.float32)):
    print(kept, resident() - before)
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc is left as it is")


def last_line(script: str) -> str:
    """What a script ends with, in a process of its own without a GPU."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2], env={"PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


@glibc
@pytest.mark.parametrize("start", STARTS)
def test_large_tensors_are_given_the_pages_of_those_freed_before_them(start):
    fetched = int(last_line(STARTS[start] + FAULTS))
    assert fetched < 4 << 20 if start != "nothing" else fetched > 32 << 20


@glibc
def test_what_was_kept_is_given_back_for_a_process_that_draws():
    kept, left = map(int, last_line(GIVEN_BACK).split())
    assert kept > 200 << 20
    assert left < 32 << 20
