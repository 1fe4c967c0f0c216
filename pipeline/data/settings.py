"""The options that say which pictures and captions are taken."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.system.settings import REQUIRED, Settings, option

CAPTIONS = ("first", "all", "random")


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    data: str = option(
        REQUIRED, "Images and captions: a folder, tars, a parquet or arrow file, or a dataset's name or saved folder."
    )
    image_column: str | None = option(
        None, "Where the image is; by default file_name in a metadata.jsonl, image in a table, any picture in a tar."
    )
    caption_column: str | None = option(
        None, "Where the caption is; by default text, and in a tar the .txt, else caption in the .json."
    )
    captions: str = option(
        "first",
        "Of several captions of one picture: the first, all (an entry each), or one at random.",
        choices=CAPTIONS,
    )
    split: str = option("train", "Split of a dataset.")
    dataset_config_name: str | None = option(None, "Configuration of a dataset on the hub.")
    dataset_revision: str | None = option(None, "Revision of a dataset on the hub.")
    max_samples: int | None = option(None, "Take this many pictures, drawn at random.", ge=1)
    views: int = option(1, "Crops (and flips) of each picture, an entry each.", ge=1)
    seed: int = option(0, "Seed of crops, flips, posterior draws and choices.", ge=0)
