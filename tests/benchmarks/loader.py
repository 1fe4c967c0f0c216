"""The loader alone: entries and megabytes a second by number of worker processes, beside what bounds it.

    loader       batches as stage two takes them: read, checked, decompressed, collated; quantised still
    disk         the same shards' bytes read from end to end, in the page cache or not, as they lie
    zstd         the same taps' members decompressed from memory, on one core

Megabytes are of the shards' bytes. Run it on a quiet machine, on a cache of yours or of the demo:

    python tests/benchmarks/loader.py --cache work/demo/cache --level sd_small
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
from machine import machine
from torch.utils.data import DataLoader

from pipeline.models.levels import LEVELS
from shards.codec import decompress
from shards.dataset import CacheDataset, EpochBatches
from shards.schema import TAP_PREFIX
from shards.store import open_store


def entries_per_second(dataset: CacheDataset, batch_size: int, workers: int, batches: int) -> float:
    """Of the batches after the first of each worker: starting the processes is not in it."""
    loader = DataLoader(
        dataset,
        batch_sampler=EpochBatches(len(dataset), batch_size, seed=0),
        collate_fn=dataset.collate,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
    )
    stream = iter(loader)
    for _ in range(max(1, 2 * workers)):
        next(stream)
    started = time.perf_counter()
    for _ in range(batches):
        next(stream)
    return batches * batch_size / (time.perf_counter() - started)


def seconds_of(function: Callable[[], None]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def read_through(paths: list[Path]) -> None:
    for path in paths:
        with open(path, "rb", buffering=0) as stream:
            while stream.read(1 << 20):
                pass


def packed_taps(dataset: CacheDataset, entries: int) -> list[tuple[bytes, int]]:
    """(bytes, size unpacked) of the taps' members of the first entries."""
    shards, found = dataset.cache.targets, []
    for index in range(entries):
        shard, row = shards.row(index)
        data = shards.store.read(shard)
        for name, (offset, length, raw_bytes, _) in row.members.items():
            if name.startswith(TAP_PREFIX) and name.endswith(".zst"):
                found.append((data[offset : offset + length], raw_bytes))
    return found


def unpack(members: list[tuple[bytes, int]]) -> None:
    for data, raw_bytes in members:
        decompress(data, raw_bytes)


@click.command()
@click.option("--cache", type=Path, required=True, help="A finished cache.")
@click.option("--level", type=click.Choice(list(LEVELS)), default="sd_small", show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--batches", default=60, show_default=True, help="Batches that are timed.")
@click.option("--workers", multiple=True, default=(0, 1, 2, 4), show_default=True)
def main(cache: Path, level: str, batch_size: int, batches: int, workers: tuple[int, ...]) -> None:
    dataset = CacheDataset(open_store(cache), [teacher for _, teacher in LEVELS[level].taps])
    paths = [cache / shard for shard in dataset.cache.manifest.plan.names()]
    size = sum(path.stat().st_size for path in paths)
    per_entry = size / len(dataset) / 1e6
    print(f"{machine()}; {len(dataset)} entries of {1e3 * per_entry:.1f} kB, {level}, batches of {batch_size}\n")
    print("| what | entries a second | MB a second |")
    print("|---|---|---|")
    for count in workers:
        rate = entries_per_second(dataset, batch_size, count, batches)
        print(f"| loader, {count} workers | {rate:.0f} | {rate * per_entry:.1f} |")
    rate = size / 1e6 / seconds_of(lambda: read_through(paths))
    print(f"| disk | {rate / per_entry:.0f} | {rate:.0f} |")
    count = min(64, len(dataset))
    members = packed_taps(dataset, count)
    if members:
        packed = sum(len(data) for data, _ in members) / 1e6
        rate = count / seconds_of(lambda: unpack(members))
        print(f"| zstd, one core | {rate:.0f} | {rate * packed / count:.1f} |")


if __name__ == "__main__":
    main()
