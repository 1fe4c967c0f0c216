"""The options of `encode`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.core.buckets import bucket_sizes
from pipeline.settings.data import DataSettings
from pipeline.system.errors import UserError
from pipeline.system.options import (
    DTYPE_NAMES,
    MAX_BATCH,
    MAX_SIDE,
    MAX_WORKERS,
    EngineOptions,
    HubOptions,
    ShardRangeOptions,
)
from pipeline.system.settings import REQUIRED, option
from shards.location import Location


def check_buckets(resolution: int) -> None:
    """Raise UserError for a resolution that has no buckets."""
    try:
        bucket_sizes(resolution)
    except ValueError as error:
        raise UserError(f"--resolution {error}, as --buckets needs it") from None


@dataclass(frozen=True, kw_only=True)
class EncodeSettings(DataSettings, HubOptions, ShardRangeOptions, EngineOptions):
    """Encode images and captions into latents and prompt embeddings, in shards."""

    command: ClassVar[str] = "encode"
    work_module: ClassVar[str] = "pipeline.commands.encode"
    has_plan: ClassVar[bool] = True

    teacher: str = option(
        REQUIRED,
        "Stable Diffusion pipeline: a folder in diffusers layout, a name on the hub, demo or demo-xl.",
        place=True,
    )
    out: Location = option(REQUIRED, "Directory or address, such as s3://bucket/latents, to write the latents to.")
    resolution: int = option(512, "Side of the square training images, in pixels.", ge=8, le=MAX_SIDE)
    center_crop: bool = option(False, "Crop at the centre instead of a random position.")
    buckets: bool = option(
        False,
        "Keep aspect ratios: cut each image at the centre to the nearest of a list of sizes, from 1:2 to 2:1, with "
        "about the area of the square.",
    )
    random_flip: bool = option(False, "Mirror a random half of the images.")
    min_size: int = option(0, "Skip images whose shorter side has fewer pixels. By default they are enlarged.", ge=0)
    batch_size: int = option(8, "Images per forward pass.", ge=1, le=MAX_BATCH)
    dtype: str = option("fp32", "Precision of the VAE and the text encoder.", choices=DTYPE_NAMES)
    compile: bool = option(False, "Compile the networks with torch.compile: a slow start, then faster passes.")
    workers: int = option(4, "Threads that decode and resize images.", ge=1, le=MAX_WORKERS)
    entries_per_shard: int = option(1000, "Images per shard.", ge=1)
    max_skipped: float = option(0.5, "Largest share of a shard's images that may be skipped.", ge=0, le=1)
    retry_skipped: bool = option(False, "Rewrite the shards that skipped an image which can be read now.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buckets:
            check_buckets(self.resolution)
        if self.views > 1 and self.crops_at_centre and not self.random_flip:
            flag = "--buckets" if self.buckets else "--center-crop"
            raise UserError(
                f"--views {self.views} with {flag} gives the same pixels every time. "
                "Add --random-flip or drop one of the two."
            )

    @property
    def crops_at_centre(self) -> bool:
        """Images are cut to their buckets at the centre."""
        return self.center_crop or self.buckets
