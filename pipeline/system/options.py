"""Options that several commands share. A command's settings inherit them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.system.errors import UserError
from pipeline.system.settings import Settings, option
from shards.location import is_url

DTYPE_NAMES = ("fp32", "fp16", "bf16")
ENGINES = ("local", "ray")
RAY = ENGINES[1]
PREDICTION_TYPES = ("epsilon", "v_prediction")
# The formats of quantisation-aware training, and the bits of their weights. Inputs of layers have 8.
QAT_BITS = {"int8": 8, "w4a8": 4}
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
class EngineOptions(DeviceOptions):
    """Which processes write the shards of a stage."""

    engine: str = option(
        ENGINES[0],
        "local: this process, or those of `accelerate launch`. ray: those of a ray cluster, of which some may come or "
        "go.",
        choices=ENGINES,
    )
    ray_address: str | None = option(
        None, "A running ray cluster: auto on one of its nodes, or host:port. By default ray starts on this machine."
    )
    gpus_per_actor: float | None = option(
        None, "GPUs for each process of ray, such as 0.5; by default 1, or 0 if the cluster has none.", ge=0, le=1
    )
    cpus_per_actor: int = option(1, "CPUs for each process of ray.", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {
            "--ray-address": self.ray_address is not None,
            "--gpus-per-actor": self.gpus_per_actor is not None,
            "--cpus-per-actor": self.cpus_per_actor != 1,
        }
        if self.engine != RAY:
            if flags := [flag for flag, is_given in given.items() if is_given]:
                raise UserError(f"{' and '.join(flags)} need --engine ray. Add it, or leave them out.")
        elif is_url(self.ray_address or ""):
            raise UserError(
                f"--ray-address {self.ray_address} is an address of ray's client, which loses the run with its "
                "connection. Run the command on a node of the cluster, as by `ray job submit`, with --ray-address auto."
            )
        elif self.device.startswith("cuda:"):
            raise UserError(f"--device {self.device} does not work with --engine ray, which chooses the GPUs itself.")
        elif self.device == "cpu" and self.gpus_per_actor:
            raise UserError(f"--gpus-per-actor {self.gpus_per_actor:g} contradicts --device cpu. Use only one of them.")


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
