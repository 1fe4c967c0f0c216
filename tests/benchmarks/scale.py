"""Does anything grow? With the work that is done, and with the size of a set.

Memory and time per entry over 100,000 entries, tenth by tenth, of each stage's long loop. A tiny random teacher, so
that the loop around it is what is measured: `encode` of 100,000 small images, `teacher-cache` of one round over them,
and all entries of the cache read in training's order.

Then caches of a thousand, a million and ten million entries, of the size that SD-1.x's have: sidecars as the stages
write them, next to tars without contents. What it takes to open one and to find an entry, and what the commands take
that look at all of it. Each runs in a process of its own. Run it on a quiet machine:

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
from typing import Any
from unittest import mock

import click
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.tiny import tiny_pipeline

from pipeline.cache import latents_writer, targets_writer
from pipeline.commands import encode, teacher_cache
from pipeline.commands.inspect_shards import take_inventory
from pipeline.encode import EncodeSettings
from pipeline.models.students import teacher_taps
from pipeline.teacher_cache import TeacherCacheSettings
from shards.cache import Cache
from shards.dataset import CacheDataset, EpochBatches
from shards.manifest import Manifest, read_manifest, write_manifest
from shards.schema import BLOCK, stated_shapes
from shards.sidecar import Head, crc32_of_tensors, sidecar_bytes
from shards.store import Store, open_store
from shards.survey import survey, survey_images

TENTHS, BATCH = 10, 50
IMAGE_CRC32 = crc32_of_tensors({name: [0, 0, 0, 7] for name in ("latents.npy", "prompt_embeds.npy")})

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


def watched(stage, writer, settings) -> list[Point]:
    """Run a stage, whose shards the module `writer` writes; a point at each shard that is finished."""
    points = [(0, time.perf_counter(), megabytes_resident())]
    write_shard = writer.write_shard

    def write(store: Store, shard: str, manifest: Manifest, entries, skipped, kept=None) -> None:
        count = 0

        def counted():
            nonlocal count
            for entry in entries:
                count += 1
                yield entry

        write_shard(store, shard, manifest, counted(), skipped, kept)
        points.append((points[-1][0] + count, time.perf_counter(), megabytes_resident()))

    with mock.patch.object(writer, "write_shard", write):
        stage.run(settings)
    return points


def run_encode(work: Path, entries_per_shard: int) -> list[Point]:
    return watched(
        encode,
        latents_writer,
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
        targets_writer,
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


def in_process(function: Callable, *arguments) -> Any:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def tenths(points: list[Point]) -> list[tuple[float, float]]:
    """(microseconds an entry, megabytes at the end) of each tenth of the entries."""
    total = points[-1][0]
    ends = [next(p for p in points if p[0] >= total * tenth / TENTHS) for tenth in range(TENTHS + 1)]
    return [
        (1e6 * (end[1] - start[1]) / (end[0] - start[0]), end[2]) for start, end in zip(ends, ends[1:], strict=False)
    ]


def write_hollow(directory: Path, manifest: Manifest, lengths: dict[str, int]) -> None:
    """A finished set of tars without contents. `lengths` are the bytes of each member."""
    directory.mkdir(parents=True, exist_ok=True)
    store = open_store(directory)
    write_manifest(store, manifest)
    members = sorted(lengths)
    sizes = np.array([lengths[name] for name in members])
    ends = np.cumsum(BLOCK + -(-sizes // BLOCK) * BLOCK)
    offsets = ends - (-(-sizes // BLOCK) * BLOCK)
    crcs = dict.fromkeys(members, 7)
    image_crc32 = crc32_of_tensors({name: [0, 0, 0, crc] for name, crc in crcs.items()}) if not manifest.is_cache else 0
    for shard in manifest.plan:
        count = len(shard.indices)
        table = np.empty((count, 2 + 4 * len(members)), "<i8")
        table[:, 0], table[:, 1] = shard.indices, image_crc32 or IMAGE_CRC32
        start = int(ends[-1]) * np.arange(count)
        for number, name in enumerate(members):
            first = 2 + 4 * number
            table[:, first] = start + offsets[number]
            table[:, first + 1 : first + 4] = lengths[name], lengths[name], crcs[name]
        length = count * int(ends[-1])
        head = Head(shard.name, count, length, "0" * 64, [], members, (shard.indices[0], shard.indices[-1]))
        with open(directory / shard.name, "wb") as tar:
            tar.truncate(length)
        (directory / manifest.sidecar_name(shard.name)).write_bytes(sidecar_bytes(manifest, head, table.tobytes()))


def write_hollow_cache(work: Path, entries: int) -> Path:
    """A cache of so many entries, of at most 8 rounds."""
    images = max(entries // 8, 1000)
    spec = {
        "stage": "latents",
        "entries": images,
        "entries_per_shard": 1000,
        **stated_shapes((4, 64, 64), {"prompt_embeds": (77, 768)}),
    }
    taps = {f"tap{number}": {"shape": [640, 8, 8], "stride": 1} for number in range(11)}
    cache = {
        "stage": "cache",
        "entries": images,
        "entries_per_shard": 250,
        "taps": taps,
        "codec": {"name": "dither", "snr_db": 10.0},
        "noise_scheduler": {"num_train_timesteps": 1000},
        "latents": spec,
    }
    lengths = {"json": 300, "latents.npy": 32896, "prompt_embeds.npy": 118400}
    write_hollow(work / "cache" / "images", Manifest(spec), lengths)
    lengths = {"json": 1300, "noise.npy": 32896, "teacher_pred.npy": 32896}
    lengths |= {f"tap.{tap}.npy.zst": 10_000 for tap in taps}
    write_hollow(work / "cache", Manifest(cache, rounds=entries // images), lengths)
    return work / "cache"


def timed(function: Callable) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def look_at(cache: Path) -> dict[str, float]:
    """Seconds and megabytes to open a cache, microseconds to find an entry and its image, and seconds of commands."""
    resident = megabytes_resident()
    started = time.perf_counter()
    opened = Cache(open_store(cache))
    found = {"open": time.perf_counter() - started, "MB": megabytes_resident() - resident}
    places = np.random.default_rng(0).integers(len(opened), size=10_000).tolist()

    def find() -> None:
        for place in places:
            opened.targets.row(place)
            opened.images.row(place % len(opened.images))

    found["find"] = min(timed(find) for _ in range(3)) / len(places) * 1e6
    found["start"] = timed(lambda: len(opened.manifest.plan.unfinished(open_store(cache))))
    found["verify"] = timed(lambda: survey_all(cache))
    found["inspect"] = timed(lambda: take_inventory(open_store(cache), opened.manifest))
    return found


def survey_all(cache: Path) -> None:
    """What `verify` does first, without --full."""
    store = open_store(cache)
    manifest = read_manifest(store, "cache")
    targets = survey(store, manifest)
    images = survey_images(store, manifest, targets)
    assert not targets.problems + images.problems


def opening_table(work: Path, sizes: tuple[int, ...]) -> list[str]:
    lines = ["| entries | shards | open, s | open, MB | find an entry and its image, µs | verify, s | inspect, s |"]
    lines.append("|---" * 7 + "|")
    for entries in sizes:
        cache = write_hollow_cache(work / str(entries), entries)
        shards = len(list(cache.rglob("*.tar")))
        found = in_process(look_at, cache)
        shutil.rmtree(work / str(entries))
        cells = f"{found['open']:.2f} | {found['MB']:.0f} | {found['find']:.1f} | {found['verify']:.1f}"
        lines.append(f"| {entries:,} | {shards:,} | {cells} | {found['inspect']:.1f} |")
    return lines


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for images and shards; emptied first.")
@click.option("--images", default=100_000, show_default=True, help="Images of the long loops; 0 for none.")
@click.option("--entries", multiple=True, default=(1000, 1_000_000, 10_000_000), help="Sizes of the caches to open.")
def main(work: Path, images: int, entries: tuple[int, ...]) -> None:
    shutil.rmtree(work, ignore_errors=True)
    if images:
        loops(work, images)
    print("\n".join(["", *opening_table(work, entries)]))


def loops(work: Path, images: int) -> None:
    """Print the table of the long loops."""
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
