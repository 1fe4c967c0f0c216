"""What a cache's spec states about its taps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.core.taps import token_stride
from pipeline.settings.cache_format import CacheFormat


def tap_specs(format: CacheFormat, shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, dict[str, Any]]:
    """Of each tap the `shape` (C, H, W) of the module's output, and the `stride` of its token sampling."""
    return {tap: {"shape": list(s), "stride": token_stride(s[1], s[2], format.tokens)} for tap, s in shapes.items()}


def sampling_lines(taps: Mapping[str, Any]) -> list[str]:
    """How many positions of each sampled tap are kept, for a plan, in each bucket. `taps` is as in a cache's spec."""
    lines = []
    for tap, stated in taps.items():
        for spec in stated if isinstance(stated, list) else [stated]:
            _, height, width = spec["shape"]
            stride = spec["stride"]
            if stride == 1:
                continue
            lines.append(f"  {tap}: {height // stride} x {width // stride} of {height} x {width}, stride {stride}")
    return (
        ["positions kept of these taps (the others are kept completely):", *lines]
        if lines
        else ["positions kept: all of every tap"]
    )
