"""How the C library treats freed memory, and how much memory the process has used."""

from __future__ import annotations

import ctypes
import gc
import platform
import resource
from pathlib import Path

import torch

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make malloc keep freed memory for later allocations (mallopt(3)). Without glibc, do nothing.

    By default glibc returns freed blocks larger than 32 MB to the system, which must clear their pages again at the
    next step. On a CPU this takes a good part of a training step (tests/benchmarks/stage_two.md). The price is that
    the process stays as large as its peak, and fragmentation can make that peak a little larger.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Return the memory of objects that are gone to the system and the GPU, for other processes to use.

    A network that accelerate wrapped refers to itself, and goes only when it is collected. malloc keeps what was freed
    (malloc_trim(3)), and so does torch on a GPU.
    """
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far, in bytes: torch's allocations on a CUDA GPU, else the resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # On Linux a child inherits its parent's ru_maxrss. VmHWM starts at zero.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
