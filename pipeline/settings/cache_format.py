"""The options that decide how large an entry of a cache is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pipeline.models.levels import LEVELS
from pipeline.models.levels.tap_sets import BLOCKS, TAP_SETS
from pipeline.system.errors import UserError
from pipeline.system.settings import Settings, option
from shards.codec import CODECS, MAX_SNR_DB


@dataclass(frozen=True, kw_only=True)
class CacheFormat(Settings):
    replaced: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("token_stride", "token_min"), "--tokens N, which keeps about N positions of each tap"
    )

    students: tuple[str, ...] | None = option(
        None,
        "Student levels the cache must serve; by default sd_small, or sdxl_small of an SDXL teacher.",
        choices=tuple(LEVELS),
    )
    taps: str = option(
        BLOCKS,
        "Outputs of the teacher to store: of its blocks, of all their ResNets and attentions, or of the self-attention "
        "in their transformer blocks.",
        choices=tuple(TAP_SETS),
    )
    codec: str = option("dither", "How features are stored; fp16 and fp32 are exact.", choices=CODECS)
    snr_db: float = option(5.0, "Signal-to-noise ratio of the dither codec, in decibels.", ge=-10.0, le=MAX_SNR_DB)
    tokens: int = option(64, "Positions to keep of each tap, at least; 0 keeps all of every tap.", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.students is not None and not self.students:
            raise UserError(f"--students names no level. Choose from {', '.join(LEVELS)}.")
