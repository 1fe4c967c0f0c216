"""Does anything grow? Memory and time per entry over 100,000 entries, tenth by tenth, of each stage's long loop.

A tiny random teacher, so that the loop around it is what is measured: `encode` of 100,000 small images,
`teacher-cache` of one round over them, and all entries of the cache read in training's order. Each runs in a process
of its own. Run it on a quiet machine:

    OMP_NUM_THREADS=1 python tests/benchmarks/scale.py --work work/scale
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import click
import numpy as np
import torch
from PIL import Image

from shards.store import Store, open_store

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.tiny import tiny_pipeline

from pipeline.commands import encode, teacher_cache
from pipeline.encode import EncodeSettings
from pipeline.models.students import teacher_taps
from pipeline.teacher_cache import TeacherCacheSettings
from shards.dataset import CacheDataset, EpochBatches

TENTHS, BATCH = 10, 50

Point = tuple[int, float, float]
"""Entries so far, seconds, megabytes resident."""


def megabytes_resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def write_images_of_one_colour(folder: Path, count: int) -> None:
    """`count` images of 40 px, each of one colour."""
    folder.mkdir(parents=True)
    colours = np.random.default_rng(0).integers(256, size=(count, 3))
    with open(folder / "metadata.jsonl", "w") as lines:
        for i, colour in enumerate(colours):
            Image.new("RGB", (40, 40), tuple(map(int, colour))).save(folder / f"{i:06d}.png")
            lines.write(f'{{"file_name": "{i:06d}.png", "text": "a plain picture"}}\n')


def watched(stage, settings) -> list[Point]:
    """Run a stage; a point at each shard that it finished."""
    points = [(0, time.perf_counter(), megabytes_resident())]
    write_shard = stage.write_shard

    def write(store: Store, shard: str, spec_sha256: str, entries, skipped) -> None:
        count = 0

        def counted():
            nonlocal count
            for entry in entries:
                count += 1
                yield entry

        write_shard(store, shard, spec_sha256, counted(), skipped)
        points.append((points[-1][0] + count, time.perf_counter(), megabytes_resident()))

    with mock.patch.object(stage, "write_shard", write):
        stage.run(settings)
    return points


def run_encode(work: Path, entries_per_shard: int) -> list[Point]:
    return watched(
        encode,
        EncodeSettings(
            teacher=str(work / "teacher"),
            data=str(work / "pictures"),
            out=work / "latents",
            resolution=32,
            batch_size=BATCH,
            entries_per_shard=entries_per_shard,
            workers=2,
            device="cpu",
        ),
    )


def run_teacher_cache(work: Path, entries_per_shard: int) -> list[Point]:
    return watched(
        teacher_cache,
        TeacherCacheSettings(
            teacher=str(work / "teacher"),
            latents=work / "latents",
            out=work / "cache",
            rounds=1,
            tokens=16,
            samples=0,
            batch_size=BATCH,
            entries_per_shard=entries_per_shard,
            device="cpu",
        ),
    )


def run_reading(work: Path, entries_per_shard: int) -> list[Point]:
    """Every entry of the cache once, in training's order, collated but not dequantised."""
    dataset = CacheDataset(open_store(work / "cache"), teacher_taps(("sd_small",)))
    points = [(0, time.perf_counter(), megabytes_resident())]
    for number, indices in enumerate(EpochBatches(len(dataset), BATCH, seed=0), 1):
        dataset.collate([dataset[i] for i in indices])
        if number * BATCH % entries_per_shard == 0:
            points.append((number * BATCH, time.perf_counter(), megabytes_resident()))
        if number * BATCH >= len(dataset):
            return points


def in_process(function: Callable, *arguments) -> list[Point]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def tenths(points: list[Point]) -> list[tuple[float, float]]:
    """(microseconds an entry, megabytes at the end) of each tenth of the entries."""
    total = points[-1][0]
    ends = [next(p for p in points if p[0] >= total * tenth / TENTHS) for tenth in range(TENTHS + 1)]
    return [
        (1e6 * (end[1] - start[1]) / (end[0] - start[0]), end[2]) for start, end in zip(ends, ends[1:], strict=False)
    ]


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for images and shards; emptied first.")
@click.option("--images", default=100_000, show_default=True, help="Images, and so entries.")
def main(work: Path, images: int) -> None:
    shutil.rmtree(work, ignore_errors=True)
    write_images_of_one_colour(work / "pictures", images)
    tiny_pipeline().save_pretrained(work / "teacher")
    stages = {"encode": run_encode, "teacher-cache": run_teacher_cache, "reading": run_reading}
    points = {name: in_process(stage, work, images // 50) for name, stage in stages.items()}
    columns = [tenths(each) for each in points.values()]
    counts = ", ".join(f"{name} {each[-1][0]:,}" for name, each in points.items())
    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}; entries: {counts}\n"
    )
    print(f"| tenth | {' | '.join(f'{name}, µs an entry | MB' for name in stages)} |")
    print("|---" * (1 + 2 * len(stages)) + "|")
    for tenth, row in enumerate(zip(*columns, strict=True), 1):
        print(f"| {tenth} | {' | '.join(f'{micros:.0f} | {memory:.0f}' for micros, memory in row)} |")


if __name__ == "__main__":
    main()
