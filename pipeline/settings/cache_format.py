"""The options that decide how large an entry of a cache is."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.models.levels import LEVELS
from pipeline.system.errors import UserError
from pipeline.system.settings import Settings, option
from shards.codec import CODECS, MAX_SNR_DB


@dataclass(frozen=True, kw_only=True)
class CacheFormat(Settings):
    students: tuple[str, ...] = option(("sd_small",), "Student levels the cache must serve.", choices=tuple(LEVELS))
    codec: str = option("dither", "How features are stored; fp16 and fp32 are exact.", choices=CODECS)
    snr_db: float = option(10.0, "Signal-to-noise ratio of the dither codec, in decibels.", ge=-10.0, le=MAX_SNR_DB)
    token_stride: int = option(4, "Keep one position per N x N cell of the larger taps; N need not divide them.", ge=1)
    token_min: int = option(32, "Subsample only taps with at least this many rows.", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.students:
            raise UserError(f"--students names no level. Choose from {', '.join(LEVELS)}.")
