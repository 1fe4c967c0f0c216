"""The options that decide how large an entry of a cache is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.core.taps import token_stride
from pipeline.models.families import LEVELS
from pipeline.system.settings import Settings, option
from shards.codec import CODECS, MAX_SNR_DB


@dataclass(frozen=True, kw_only=True)
class CacheFormat(Settings):
    students: tuple[str, ...] = option(("sd_small",), "Student levels the cache must serve.", choices=tuple(LEVELS))
    codec: str = option("dither", "How features are stored; fp16 and fp32 are exact.", choices=CODECS)
    snr_db: float = option(10.0, "Signal-to-noise ratio of the dither codec, in decibels.", ge=-10.0, le=MAX_SNR_DB)
    token_stride: int = option(4, "Keep one position per N x N cell of the larger taps; N need not divide them.", ge=1)
    token_min: int = option(32, "Subsample only taps with at least this many rows.", ge=1)

    def tap_specs(self, shapes: Mapping[str, tuple[int, int, int]]) -> dict[str, dict[str, Any]]:
        """What a cache's spec states about each tap: the `shape` (C, H, W) of the module's output, and the `stride` of
        its token sampling."""
        return {
            tap: {"shape": list(s), "stride": token_stride(s[1], s[2], self.token_stride, self.token_min)}
            for tap, s in shapes.items()
        }


def sampling_lines(taps: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many positions of each sampled tap are kept, for a plan. `taps` is as in a cache's spec."""
    lines = []
    for tap, spec in taps.items():
        _, height, width = spec["shape"]
        stride = spec["stride"]
        if stride > 1:
            lines.append(f"  {tap}: {height // stride} x {width // stride} of {height} x {width}, stride {stride}")
    return ["positions kept, all of the other taps:", *lines] if lines else ["positions kept: all of every tap"]
