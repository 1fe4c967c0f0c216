"""The options of `encode`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.settings.data import DataSettings
from pipeline.system.errors import UserError
from pipeline.system.options import (
    DTYPE_NAMES,
    MAX_BATCH,
    MAX_SIDE,
    MAX_WORKERS,
    DeviceOptions,
    HubOptions,
    ShardRangeOptions,
)
from pipeline.system.settings import REQUIRED, option
from shards.location import Location


@dataclass(frozen=True, kw_only=True)
class EncodeSettings(DataSettings, DeviceOptions, HubOptions, ShardRangeOptions):
    """Encode images and captions into latents and prompt embeddings, in shards."""

    command: ClassVar[str] = "encode"
    work_module: ClassVar[str] = "pipeline.commands.encode"
    has_plan: ClassVar[bool] = True

    teacher: str = option(
        REQUIRED, "Stable Diffusion pipeline: a folder in diffusers layout, a name on the hub, or demo.", place=True
    )
    out: Location = option(REQUIRED, "Directory or address, such as s3://bucket/latents, to write the latents to.")
    resolution: int = option(512, "Side of the square training images, in pixels.", ge=8, le=MAX_SIDE)
    center_crop: bool = option(False, "Crop at the centre instead of a random position.")
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
        if self.views > 1 and self.center_crop and not self.random_flip:
            raise UserError(
                f"--views {self.views} with --center-crop gives the same pixels every time. "
                "Add --random-flip or drop one of the two."
            )
