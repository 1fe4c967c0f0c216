"""Training from a store that answers late: seconds of a step, and how long it waits for its batch, beside a directory.

    directory       `distill` as it is, from a cache on this disk
    store, N ms     the same cache in an S3 store on this machine, each of whose answers comes N milliseconds late

All rows run `distill`'s own loop, with the loader processes that it takes by default; of the directory also with one,
as the store has. Each run is a process of its own, and so is each store: moto's server behind a proxy that waits. The
last column is the loader alone, with one process: how many entries a second it could give a faster device.

    python tests/benchmarks/remote.py --work work/remote --arch demo --batch-size 16
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import click
from machine import machine
from stage_two import RESOLUTIONS, WARM_UP, Case, prepare

from pipeline.commands import distill
from pipeline.models.levels import LEVELS
from pipeline.training import loop
from pipeline.training.accelerator import make_accelerator
from pipeline.training.loader import collated_batches
from pipeline.training.loop import train
from shards.location import Url

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.buckets import Bucket, create, environment, fill, s3_server

ADDRESS = "s3://bucket/cache"


@dataclass(frozen=True)
class Run:
    """Of a step, the seconds in all and of waiting for its batch; entries a second of the loader alone."""

    step: float
    waiting: float
    entries: float


def serve(cache: Path, delay: float, pipe: Connection) -> None:
    """A store that holds the cache and answers `delay` seconds late, until the pipe is closed."""
    with s3_server() as bucket:
        create()
        fill("cache", cache)
        bucket.delay = delay
        pipe.send(bucket.endpoint)
        with contextlib.suppress(EOFError):
            pipe.recv()


def run(case: Case, workers: int | None, endpoint: str | None, pipe: Connection) -> None:
    """A few steps of training, then batches without a training."""
    shutil.rmtree(case.work / "student", ignore_errors=True)
    settings = replace(case.settings(), dataloader_num_workers=workers)
    if endpoint:
        os.environ.update(environment(Bucket(endpoint)), XDG_CACHE_HOME=str(case.work / "home"))
        settings = replace(settings, cache=Url(ADDRESS))
    ends, waits = [], []

    def timed(batches: Iterator) -> Iterator:
        while True:
            asked = time.perf_counter()
            ends.append(asked)
            batch = next(batches)
            waits.append(time.perf_counter() - asked)
            yield batch

    with mock.patch.object(loop, "save_state"):
        accelerator, dataset = make_accelerator(settings), distill.open_cache(settings)
        if endpoint:
            distill.take_parts(settings, dataset)
        settings.out.mkdir(parents=True)
        training = distill.prepare(settings, dataset, accelerator)
        with contextlib.closing(distill.batches(settings, dataset, accelerator, 0)) as batches:
            train(settings, accelerator, training, timed(batches))
        ends.append(time.perf_counter())
    # What is read ahead while the first steps run would count for nothing.
    with contextlib.closing(
        collated_batches(replace(settings, dataloader_num_workers=1), dataset, accelerator, 0)
    ) as batches:
        for _ in range(4):
            next(batches)
        started = time.perf_counter()
        for _ in range(case.steps):
            next(batches)
        entries = case.steps * case.batch_size / (time.perf_counter() - started)
    pipe.send(
        Run((ends[-1] - ends[WARM_UP]) / case.steps, sum(waits[WARM_UP : WARM_UP + case.steps]) / case.steps, entries)
    )


def of_row(case: Case, workers: int | None, delay: float | None) -> Run:
    """One run, with a store of its own unless `delay` is None."""
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    server = None
    if delay is not None:
        server = context.Process(target=serve, args=(case.work / "cache", delay, far))
        server.start()
    mine, theirs = context.Pipe()
    process = context.Process(target=run, args=(case, workers, near.recv() if server else None, theirs))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    finally:
        process.join()
        near.close()
        far.close()
        if server:
            server.join()


def table(runs: dict[str, list[Run]]) -> str:
    """Medians over the turns. The ratio is to the directory of the same turn."""
    lines = [
        "| batches from | a step, s | of it waiting | step over the directory's | loader alone, entries a second |",
        "|---|---|---|---|---|",
    ]
    reference = next(iter(runs.values()))
    for row, each in runs.items():
        ratio = statistics.median(run.step / first.step for run, first in zip(each, reference, strict=True))
        step, waiting, entries = (statistics.median(getattr(run, name) for run in each) for name in Run.__annotations__)
        lines.append(f"| {row} | {step:.3f} | {100 * waiting / step:.1f} % | {ratio:.2f} | {entries:.0f} |")
    return "\n".join(lines)


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for the teacher, shards and students; emptied first.")
@click.option("--arch", type=click.Choice(list(RESOLUTIONS)), default="demo", show_default=True)
@click.option("--level", type=click.Choice(list(LEVELS)), default="sd_small", show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--steps", default=20, show_default=True, help=f"Steps that are timed, after {WARM_UP} that are not.")
@click.option("--repeats", default=3, show_default=True, help="Turns of all rows.")
@click.option("--images", default=256, show_default=True, help="Images, and so entries of the cache.")
@click.option("--delay", "delays", multiple=True, default=(0, 20, 80), show_default=True, help="Milliseconds.")
@click.option("--device", default="auto", show_default=True, help="auto or cpu.")
def main(
    work: Path,
    arch: str,
    level: str,
    batch_size: int,
    steps: int,
    repeats: int,
    images: int,
    delays: tuple[int, ...],
    device: str,
) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    case = Case(work, arch, level, batch_size, steps, device, "no", False, False, None)
    prepare(case, images)
    rows: dict[str, tuple[int | None, float | None]] = {"directory": (None, None), "directory, one process": (1, None)}
    rows |= {f"store, {delay} ms": (None, delay / 1000) for delay in delays}
    runs: dict[str, list[Run]] = {row: [] for row in rows}
    for _ in range(repeats):
        for row, (workers, delay) in rows.items():
            runs[row].append(of_row(case, workers, delay))
    size = sum(path.stat().st_size for path in (work / "cache").rglob("*.tar")) / images / 1e3
    print(f"{machine(device)}; {level}, batches of {batch_size}, {size:.1f} kB an entry with its image\n")
    print(table(runs))


if __name__ == "__main__":
    main()
