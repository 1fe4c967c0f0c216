"""The options of `plan`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

from pipeline.settings.cache_format import CacheFormat
from pipeline.settings.encode import check_buckets
from pipeline.system.errors import UserError
from pipeline.system.options import MAX_BATCH, MAX_SIDE, HubOptions, PrecisionOptions
from pipeline.system.settings import REQUIRED, option
from shards.codec import MAX_SNR_DB
from shards.plan import MAX_ENTRIES, MAX_SHARDS

# Bytes by unit: B, KB, MB, ... and KIB, MIB, ...
UNITS = {"B": 1} | {
    prefix + ending: base**power
    for power, prefix in enumerate("KMGTP", 1)
    for ending, base in (("B", 1000), ("IB", 1024))
}
# (decibels, tokens), from the most exact on. The next one is tried if the requested rounds do not fit.
LADDER = ((5.0, 64), (5.0, 16), (0.0, 16))


def bytes_of(size: str) -> int:
    """'500GB' -> 500,000,000,000. Raises UserError if it is not a size."""
    matched = re.fullmatch(r"(\d+(?:\.\d+)?) *([A-Z]+)", size.strip().upper())
    if not matched or matched[2] not in UNITS:
        raise UserError(f"--budget {size!r} is not a size. Write it as 500GB or 1.5TB.")
    return int(Fraction(matched[1]) * UNITS[matched[2]])


def help_of(name: str) -> str:
    """The help of one of the options that decide the size of an entry."""
    return next(setting.metadata["help"] for setting in fields(CacheFormat) if setting.name == name)


@dataclass(frozen=True, kw_only=True)
class PlanSettings(CacheFormat, PrecisionOptions, HubOptions):
    """Estimate what a cache will take: entries, bytes per member, forward passes; with --budget, what fits."""

    command: ClassVar[str] = "plan"
    work_module: ClassVar[str] = "pipeline.commands.plan"
    has_plan: ClassVar[bool] = True

    teacher: str = option(
        REQUIRED, "The teacher: a folder (its configs are enough), a name on the hub, demo or demo-xl.", place=True
    )
    images: int = option(REQUIRED, "Images to train on.", ge=1, le=MAX_ENTRIES)
    rounds: int = option(4, "Passes over the images; with a budget, the minimum to aim for.", ge=1, le=MAX_SHARDS)
    resolution: int = option(512, "Side of the images, in pixels.", ge=8, le=MAX_SIDE)
    buckets: bool = option(False, "Show also what an entry of each bucket takes, as of `encode --buckets`.")
    budget: str | None = option(
        None,
        "Bytes for latents and cache, such as 500GB; chooses rounds, and decibels and tokens if they are not given.",
    )
    snr_db: float | None = option(  # type: ignore[assignment]
        None, f"{help_of('snr_db')} Default: {LADDER[0][0]:g}, or less to fit a budget.", ge=-10.0, le=MAX_SNR_DB
    )
    tokens: int | None = option(  # type: ignore[assignment]
        None, f"{help_of('tokens')} Default: {LADDER[0][1]}, or fewer to fit a budget.", ge=0
    )
    trial: bool = option(
        False, "Run the teacher on a few batches on this machine to estimate the time; needs its weights."
    )
    batch_size: int = option(8, "Entries per forward pass of the trial.", ge=1, le=MAX_BATCH)
    out: Path = option(Path("."), "Where the cache would go, to show its free space.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buckets:
            check_buckets(self.resolution)
        if self.budget is not None:
            bytes_of(self.budget)
            if self.codec != "dither":
                raise UserError(f"--budget chooses the decibels of the dither codec. Drop --codec {self.codec}.")

    def at(self, snr_db: float, tokens: int) -> PlanSettings:
        """The settings with these values where none are given."""
        return replace(
            self,
            snr_db=snr_db if self.snr_db is None else self.snr_db,
            tokens=tokens if self.tokens is None else self.tokens,
        )
