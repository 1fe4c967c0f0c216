"""How fast pictures are read, decoded and made square: `encode`'s loader by its workers, against Pillow alone.

    Pillow       the same files in a plain loop: open, convert to RGB, resize, crop; one thread
    N workers    what `encode` takes its pictures from, in order, with its checks

Pictures are JPEGs of 1280 x 960 with detail at all scales. Run it on a quiet machine:

    python tests/benchmarks/pictures.py --work work/pictures
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import PIL
from PIL import Image

from pipeline.data.loading import Framing, load_images
from pipeline.data.source import DataSettings, open_source

SIZE, RESOLUTION = (1280, 960), 512


def write_images_of_one_colour(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for i in range(count):
        layers = [
            Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize(
                SIZE, Image.Resampling.BICUBIC
            )
            for side in (4, 16, 64, 256)
        ]
        mixed = np.mean([np.asarray(layer, np.float32) for layer in layers], 0)
        Image.fromarray(mixed.astype(np.uint8)).save(folder / f"{i:04d}.jpg", quality=90)
        (folder / f"{i:04d}.txt").write_text("a picture")


def with_pillow(files: list[Path]) -> None:
    width, height = (RESOLUTION * side // min(SIZE) for side in SIZE)
    left = (width - RESOLUTION) // 2
    for file in files:
        image = Image.open(file).convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        np.asarray(image.crop((left, 0, left + RESOLUTION, height)))


def seconds_of(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for the pictures; emptied first.")
@click.option("--pictures", default=200, show_default=True)
@click.option("--workers", multiple=True, default=(1, 2, 4), show_default=True)
@click.option("--repeats", default=5, show_default=True, help="Turns of all rows; the median is shown.")
def main(work: Path, pictures: int, workers: tuple[int, ...], repeats: int) -> None:
    shutil.rmtree(work, ignore_errors=True)
    write_images_of_one_colour(work, pictures)
    source = open_source(DataSettings(data=str(work)))
    framing = Framing((RESOLUTION, RESOLUTION), center_crop=True, random_flip=False, seed=0)
    records = list(enumerate(source.records))
    files = sorted(work.glob("*.jpg"))
    rows: dict[str, Callable[[], object]] = {"Pillow": lambda: with_pillow(files)}
    for count in workers:
        rows[f"{count} workers"] = lambda count=count: [
            item.index for item in load_images(source, framing, records, count, 2 * max(8, count))
        ]
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, function in rows.items():
            seconds[name].append(seconds_of(function))
    size = statistics.mean(file.stat().st_size for file in files)
    print(
        f"{os.cpu_count()} cores; Python {platform.python_version()}, Pillow {PIL.__version__}; {pictures} JPEGs of "
        f"{SIZE[0]} x {SIZE[1]}, {size / 1e3:.0f} kB, to {RESOLUTION}\n"
    )
    print("| what | pictures a second | over Pillow |")
    print("|---|---|---|")
    for name, each in seconds.items():
        ratio = statistics.median(bare / own for bare, own in zip(seconds["Pillow"], each, strict=True))
        print(f"| {name} | {pictures / statistics.median(each):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
