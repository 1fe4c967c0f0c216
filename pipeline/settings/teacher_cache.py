"""The options of `teacher-cache`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.settings.cache_format import CacheFormat
from pipeline.system.errors import UserError
from pipeline.system.options import (
    MAX_BATCH,
    PREDICTION_TYPES,
    RAY,
    EngineOptions,
    HubOptions,
    PrecisionOptions,
    ShardRangeOptions,
)
from pipeline.system.settings import REQUIRED, option
from shards.location import Location
from shards.plan import MAX_SHARDS


@dataclass(frozen=True, kw_only=True)
class TeacherCacheSettings(CacheFormat, PrecisionOptions, HubOptions, ShardRangeOptions, EngineOptions):
    """Run the teacher on latents, in rounds, and store its predictions and features."""

    command: ClassVar[str] = "teacher-cache"
    work_module: ClassVar[str] = "pipeline.commands.teacher_cache"
    has_plan: ClassVar[bool] = True

    teacher: str = option(
        REQUIRED,
        "The pipeline that the latents were made with: a folder, a name on the hub, demo or demo-xl.",
        place=True,
    )
    latents: Location = option(REQUIRED, "Directory or address that `encode` wrote to.")
    out: Location = option(REQUIRED, "Directory or address, such as s3://bucket/cache, to write the cache to.")
    rounds: int = option(4, "Passes over the latents, each with its own noise and timesteps.", ge=1, le=MAX_SHARDS)
    window: int | None = option(
        None,
        "Make a rolling cache: keep so many rounds, those that the slowest training reads next, and delete what all "
        "have passed. Trainings use `distill --order rounds`.",
        ge=1,
    )
    samples: int = option(
        8, "Images to generate with the teacher for the students' reports; 0 for none.", ge=0, le=10_000
    )
    samples_guidance: float = option(7.0, "Classifier-free guidance of those images.", ge=1.0)
    samples_batch_size: int = option(4, "Images per forward pass of those images.", ge=1, le=MAX_BATCH)
    batch_size: int = option(8, "Entries per forward pass.", ge=1, le=MAX_BATCH)
    seed: int = option(0, "Seed for noise, timesteps, dither and all other random draws.", ge=0)
    noise_offset: float = option(0.0, "Standard deviation of an offset added to each channel of the noise.", ge=0.0)
    input_perturbation: float = option(0.0, "Strength of extra input noise that is not part of the target.", ge=0.0)
    uncond_fraction: float = option(0.0, "Share of entries that get the empty prompt.", ge=0.0, le=1.0)
    prediction_type: str | None = option(
        None, "The teacher's prediction type; by default as in its scheduler's config.", choices=PREDICTION_TYPES
    )
    compile: bool = option(False, "Compile the teacher with torch.compile: a slow start, then faster passes.")
    entries_per_shard: int = option(250, "Entries per shard.", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and self.window >= self.rounds:
            raise UserError(
                f"--window {self.window} is not less than --rounds {self.rounds}, so all rounds would be kept. Leave "
                "--window out, or ask for more rounds."
            )
        if self.window is not None and self.shard_range is not None:
            raise UserError(
                f"--shard-range {self.shard_range} names a part of a plan that is written once. A rolling cache is "
                "written by one job: with --window, use `accelerate launch` for several GPUs."
            )
        if self.window is not None and self.engine == RAY:
            raise UserError(
                "--window does not work with --engine ray: a rolling cache is written by one job. Drop one of the two, "
                "and use `accelerate launch` for several GPUs."
            )
