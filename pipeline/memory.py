"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
import platform

# glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let malloc keep what is freed for what comes next, where it is glibc's; elsewhere nothing is done.

    As it comes, glibc gives every large tensor of a CPU back to the system, which has to clear the same pages for the
    next step: at the SD-1.x shapes as much as a third of a training step. What is kept is at most the peak's memory.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
