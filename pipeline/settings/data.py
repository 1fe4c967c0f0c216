"""The options that choose the images and captions."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.system.settings import REQUIRED, Settings, option

CAPTIONS = ("first", "all", "random")


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    data: str = option(
        REQUIRED,
        "Images and captions: a folder, tars, a parquet or arrow file, a saved dataset's folder, or a dataset's name. "
        "Tars and tables may lie at an address, such as s3://bucket/tars.",
        place=True,
    )
    image_column: str | None = option(
        None,
        "Column of the images. By default file_name in a list, image in a table, any image file in a tar.",
    )
    caption_column: str | None = option(
        None,
        "Column of the captions, or a.b for the field b of a nested column a. By default text; in a tar the .txt, the "
        ".caption, or caption in the .json.",
    )
    captions: str = option(
        "first",
        "Which captions of an image with several to use: the first, all (one entry each), or one at random.",
        choices=CAPTIONS,
    )
    shuffle_tags: bool = option(False, "Put the comma-separated tags of each caption in a random order.")
    split: str = option("train", "Split of a dataset, or the subfolder of a folder that holds the list of images.")
    dataset_config_name: str | None = option(None, "Configuration of a dataset on the hub.")
    dataset_revision: str | None = option(None, "Revision of a dataset on the hub.")
    max_samples: int | None = option(None, "Use only this many images, drawn at random.", ge=1)
    views: int = option(1, "Crops (and flips) per image, one entry each.", ge=1, le=1000)
    seed: int = option(0, "Seed for crops, flips, posterior samples and random selections.", ge=0)
