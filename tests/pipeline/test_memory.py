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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library's malloc is left as it is")
@pytest.mark.parametrize("start", STARTS)
def test_large_tensors_are_given_the_pages_of_those_freed_before_them(start):
    script = subprocess.run(
        [sys.executable, "-c", STARTS[start] + FAULTS], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2], env={"PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    fetched = int(script.stdout.splitlines()[-1])
    assert fetched < 4 << 20 if start != "nothing" else fetched > 32 << 20
