"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import platform
import resource
from pathlib import Path

import torch

# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let malloc keep what is freed for what comes next, where it is glibc's (mallopt(3)); elsewhere do nothing.

    By default glibc gives whatever is larger than 32 MB back to the system, which clears the same pages again at the
    next step: on a CPU a good part of a training step (tests/benchmarks/stage_two.md). The price is that the process
    stays as large as its peak, which holes in what is kept can make a little larger.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def give_back_freed_memory() -> None:
    """Give what was kept back to the system now (malloc_trim(3)), for other processes to use."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory(device: torch.device) -> int:
    """The most memory this process has held so far, in bytes: torch's on a CUDA GPU, else the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux hands the parent's ru_maxrss down to its children; VmHWM begins anew.
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
