"""The options of `download`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.system.options import MAX_WORKERS
from pipeline.system.settings import REQUIRED, Settings, option

DISTRIBUTORS = ("multiprocessing", "pyspark", "ray")


@dataclass(frozen=True, kw_only=True)
class DownloadSettings(Settings):
    """Download the images of a list into WebDataset tars, for `encode --data`."""

    command: ClassVar[str] = "download"
    work_module: ClassVar[str] = "pipeline.commands.download"

    urls: Path = option(REQUIRED, "A parquet file of image URLs and captions.")
    out: Path = option(REQUIRED, "Directory for the tars. Existing files are kept.")
    url_column: str = option("url", "Column of the URLs.")
    caption_column: str = option("caption", "Column of the captions.")
    image_size: int = option(512, "Shrink larger images until their shorter side has this many pixels.", ge=1)
    entries_per_tar: int = option(10_000, "URLs per tar.", ge=2)
    max_samples: int | None = option(None, "Use only this many URLs, drawn at random.", ge=1)
    seed: int = option(0, "Seed for the order of the URLs.", ge=0)
    processes: int = option(os.cpu_count() or 1, "Processes that download and resize.", ge=1, le=MAX_WORKERS)
    threads: int = option(64, "Concurrent downloads per process.", ge=1, le=MAX_WORKERS)
    timeout: int = option(10, "Seconds to wait for a server to respond.", ge=1)
    retries: int = option(1, "Retries per URL.", ge=0)
    distributor: str = option("multiprocessing", "How img2dataset distributes the work.", choices=DISTRIBUTORS)
    img2dataset: str = option("img2dataset", "The img2dataset program, if it is not on the PATH.")
