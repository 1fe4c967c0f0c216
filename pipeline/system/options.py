"""Options that several commands share. A command's settings inherit them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.system.errors import UserError
from pipeline.system.settings import Settings, option

DTYPE_NAMES = ("fp32", "fp16", "bf16")
PREDICTION_TYPES = ("epsilon", "v_prediction")
# Limits that no real run reaches. Beyond them a number too many would fill the memory, or never come to an end.
MAX_BATCH, MAX_SIDE, MAX_WORKERS, MAX_SAMPLING_STEPS = 1 << 16, 1 << 14, 1 << 12, 10_000
SAMPLERS = ("dpm", "ddim", "euler", "euler-ancestral", "heun", "pndm", "unipc")


@dataclass(frozen=True, kw_only=True)
class HubOptions(Settings):
    """Which files of a model to load."""

    revision: str | None = option(None, "Revision of the model on the hub.")
    variant: str | None = option(None, "Variant of the model's weight files, such as fp16.")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Settings):
    device: str = option(
        "auto", "Device to run on: auto (a GPU if there is one), cpu, or one GPU of several, such as cuda:1."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda:\d{1,3}", self.device):
            raise UserError(f"--device {self.device!r} is none of auto, cpu, and a GPU such as cuda:1")


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(DeviceOptions):
    dtype: str = option("auto", "Precision; auto is fp16 on a CUDA GPU, else fp32.", choices=("auto", *DTYPE_NAMES))


@dataclass(frozen=True, kw_only=True)
class ShardRangeOptions(Settings):
    shard_range: str | None = option(
        None, "Write only these of the planned shards, such as 0:50, to split the work over several jobs."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        range_of(self.shard_range)


def range_of(shard_range: str | None) -> slice:
    """The part of the plan that `A:B` names: shards A to B-1. Either end may be omitted; None is the whole plan."""
    if shard_range is None:
        return slice(None)
    matched = re.fullmatch(r"(\d*):(\d*)", shard_range)
    start, end = (int(text) if text else None for text in matched.groups()) if matched else (None, None)
    if (start is None and end is None) or (start is not None and end is not None and start >= end):
        raise UserError(
            f"--shard-range {shard_range!r} is not a range. Write it as 0:50 or 50:100, where the end is exclusive."
        )
    return slice(start, end)
