"""How long `teacher-cache` takes to start, by the number of planned shards.

Timed from the call of the stage, in a process that has imported it, to the teacher's first forward pass: opening the
latents, loading a miniature teacher, the manifest, the plan, and what is still to be written. Shards hold one entry
each; a share of them is marked as finished beforehand. The shapes of the teacher's taps are computed before, in the
warm-up: they take about a second whatever the plan.

    python tests/benchmarks/start.py --work work/start
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.stages import reset_accelerate, run_encode
from support.tiny import tiny_pipeline, write_images

from pipeline.cache import targets_writer
from pipeline.commands import teacher_cache
from pipeline.teacher_cache import TeacherCacheSettings
from shards.plan import ShardPlan
from shards.schema import sidecar_name

IMAGES = 100


class Started(Exception):
    """Raised in place of the first forward pass."""


def seconds_to_start(work: Path, shards: int, finished: float) -> float:
    """Seconds to the first forward pass with so many planned shards, of which a share is finished."""
    out, rounds = work / "cache", shards // IMAGES
    shutil.rmtree(out, ignore_errors=True)
    settings = TeacherCacheSettings(
        teacher=str(work / "teacher"),
        latents=work / "latents",
        out=out,
        rounds=rounds,
        entries_per_shard=1,
        samples=0,
        device="cpu",
    )
    out.mkdir()
    plan = ShardPlan(IMAGES, 1, rounds)
    for shard in plan.shards[: int(finished * len(plan))]:
        (out / sidecar_name(shard.name)).touch()
    started = time.perf_counter()
    with mock.patch.object(targets_writer, "run_teacher", side_effect=Started):
        try:
            teacher_cache.run(settings)
        except Started:
            seconds = time.perf_counter() - started
    reset_accelerate()
    return seconds


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for a teacher, latents and plans; emptied first.")
@click.option("--shards", multiple=True, default=(500, 5_000, 50_000), show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(work: Path, shards: tuple[int, ...], repeats: int) -> None:
    shutil.rmtree(work, ignore_errors=True)
    tiny_pipeline().save_pretrained(work / "teacher")
    run_encode(work / "teacher", write_images(work / "images", IMAGES), work / "latents", entries_per_shard=IMAGES)
    seconds_to_start(work, IMAGES, 0.0)  # warm-up
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}\n")
    print("| planned shards | of them finished | seconds to the first forward pass |")
    print("|---|---|---|")
    for count in shards:
        for finished in (0.0, 0.5):
            seconds = statistics.median(seconds_to_start(work, count, finished) for _ in range(repeats))
            print(f"| {count:,} | {finished:.0%} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
