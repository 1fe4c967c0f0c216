"""Stage two against online training: samples a second and peak memory; one student, batch and precision in all rows.

    cache       `distill` as it is: batches from the shards, through its loader's processes
    in memory   the same steps on batches that are there already: the bound
    online      as distill-sd trains: VAE, text encoder and teacher run at every step, of pixels ready in memory
    online, teacher cast        the same with the teacher's weights in half precision, as in BK-SDM; not in fp32
    online, latents cached      as distill-sd, without VAE and text encoder

All rows run `distill`'s own loop; only the source of the batches differs. Each run is a process of its own, so its
memory is its own, and the rows take turns. Weights are random for `sd15`, the bundled teacher's for `demo`. On a
quiet machine:

    python tests/benchmarks/stage_two.py --work work/stage-two --arch demo --batch-size 16
"""

from __future__ import annotations

import itertools
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click
import torch
from machine import in_process, machine
from online import OnlineBatches, encoded_inputs, stored_inputs
from sd15_road import random_checkpoint, random_images
from torch import Tensor

from pipeline.commands import distill, encode, teacher_cache
from pipeline.demo.scenes import write_folder
from pipeline.encode import EncodeSettings
from pipeline.models.bundled import teacher_folder
from pipeline.models.levels import LEVELS
from pipeline.system.device import use_cpu
from pipeline.teacher_cache import TeacherCacheSettings
from pipeline.training import loop
from pipeline.training.accelerator import make_accelerator
from pipeline.training.loop import train
from shards.dataset import Batch, Feature
from shards.reader import ShardSet
from shards.store import open_store

RESOLUTIONS = {"demo": 64, "sd15": 512}
REFERENCE, CAST = "online", "online, teacher cast"
ROWS = ("cache", "in memory", REFERENCE, CAST, "online, latents cached")
WARM_UP = 2


@dataclass(frozen=True)
class Run:
    """Seconds of a step, of them those that decode the taps, and peak memory in GB: of the process, and of the device
    (None on a CPU)."""

    seconds: float
    decoding: float
    process: float
    device: float | None


@dataclass(frozen=True)
class Case:
    """What all rows share."""

    work: Path
    arch: str
    level: str
    batch_size: int
    steps: int
    device: str
    mixed_precision: str
    gradient_checkpointing: bool
    compile: bool
    workers: int | None

    @property
    def teacher(self) -> Path:
        return teacher_folder() if self.arch == "demo" else self.work / "teacher"

    def settings(self) -> distill.DistillSettings:
        return distill.DistillSettings(
            cache=self.work / "cache",
            out=self.work / "student",
            level=self.level,
            report=False,
            max_train_steps=WARM_UP + self.steps,
            train_batch_size=self.batch_size,
            device=self.device,
            mixed_precision=self.mixed_precision,
            gradient_checkpointing=self.gradient_checkpointing,
            compile=self.compile,
            dataloader_num_workers=self.workers,
        )


def prepare(case: Case, images: int) -> None:
    """Teacher, images, latents and a cache of one round, for both students."""
    if case.arch == "demo":
        write_folder(case.work / "images", images)
    else:
        random_images(case.work / "images", images)
        random_checkpoint(case.teacher)
    common = {"teacher": str(case.teacher), "batch_size": min(8, images), "device": case.device}
    encode.run(
        EncodeSettings(
            data=str(case.work / "images"), out=case.work / "latents", resolution=RESOLUTIONS[case.arch], **common
        )
    )
    teacher_cache.run(
        TeacherCacheSettings(
            latents=case.work / "latents",
            out=case.work / "cache",
            rounds=1,
            samples=0,
            students=("sd_small", "sd_tiny"),
            **common,
        )
    )


def source_of(row: str, case: Case, device: torch.device) -> Callable:
    """What stands for `distill.batches` in that row."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[case.mixed_precision]
    if row == "cache":
        return distill.batches
    if row == "in memory":
        return in_memory
    latents = ShardSet(open_store(case.work / "latents"), "latents")
    if row in (REFERENCE, CAST):
        captions = [latents.read(i, ()).meta["caption"] for i in range(len(latents))]
        inputs = encoded_inputs(case.teacher, RESOLUTIONS[case.arch], captions, device, dtype)
    else:
        inputs = stored_inputs(latents, device)
    return OnlineBatches(case.teacher, case.level, len(latents), inputs, device, dtype, row == CAST)


def in_memory(settings: distill.DistillSettings, dataset, accelerator, position: int) -> Iterator[Batch]:
    """Up to four batches of the cache, read beforehand and on the device, over and over."""
    size, count = settings.train_batch_size, max(1, min(4, len(dataset) // settings.train_batch_size))
    ready = [
        dataset.collate([dataset[i % len(dataset)] for i in range(first, first + size)]).to(accelerator.device)
        for first in range(0, count * size, size)
    ]
    return itertools.cycle(ready)


def run(row: str, case: Case) -> Run:
    """A few steps of training; timed are those after the first ones, each from asking for its batch."""
    shutil.rmtree(case.work / "student", ignore_errors=True)
    device = torch.device("cpu") if use_cpu(case.device) else torch.device("cuda")
    source, times, decoding = source_of(row, case, device), [], []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def tick() -> None:
        times.append(now())

    def timed_decode(feature: Feature, calibration: tuple[Tensor, Tensor] | None) -> Tensor:
        started = now()
        values = decode(feature, calibration)
        decoding.append((started, now() - started))
        return values

    def timed(*arguments) -> Iterator[Batch]:
        tick()
        for batch in source(*arguments):
            yield batch
            tick()

    settings, decode = case.settings(), Feature.decode
    # A checkpoint is left at the last step, of any row alike: it is not what is measured.
    with mock.patch.object(loop, "save_state"), mock.patch.object(Feature, "decode", timed_decode):
        accelerator, dataset = make_accelerator(settings), distill.open_cache(settings)
        settings.out.mkdir(parents=True)
        training = distill.prepare(settings, dataset, accelerator)
        train(settings, accelerator, training, timed(settings, dataset, accelerator, 0))
        tick()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e6
    on_device = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    decoded = sum(seconds for started, seconds in decoding if started >= times[WARM_UP])
    return Run((times[-1] - times[WARM_UP]) / case.steps, decoded / case.steps, peak, on_device)


def table(runs: dict[str, list[Run]], batch_size: int) -> str:
    """The median of each row's repeats; ratios to online of the same turn, then their median."""
    lines = [
        "| source of the batches | samples a second | over online | peak memory: process, GB | device, GB |",
        "|---|---|---|---|---|",
    ]
    for row, each in runs.items():
        ratios = [online.seconds / run.seconds for online, run in zip(runs[REFERENCE], each, strict=True)]
        device = "" if each[0].device is None else f"{max(run.device for run in each):.2f}"
        lines.append(
            f"| {row} | {batch_size / statistics.median(run.seconds for run in each):.3g} "
            f"| {statistics.median(ratios):.2f} | {max(run.process for run in each):.2f} | {device} |"
        )
    bound = [memory.seconds / cache.seconds for memory, cache in zip(runs["in memory"], runs["cache"], strict=True)]
    share = statistics.median(run.decoding / run.seconds for run in runs["cache"])
    speed = f"From the cache at {statistics.median(bound):.3f} of the speed in memory."
    return "\n".join([*lines, "", f"{speed} There, decoding the taps takes {100 * share:.2f} % of a step."])


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for the teacher, shards and students; emptied first.")
@click.option("--arch", type=click.Choice(list(RESOLUTIONS)), default="demo", show_default=True)
@click.option("--levels", default="sd_small,sd_tiny", show_default=True, help="Students, of " + ", ".join(LEVELS) + ".")
@click.option("--batch-size", "batch_sizes", multiple=True, default=(16,), show_default=True)
@click.option("--steps", default=20, show_default=True, help=f"Steps that are timed, after {WARM_UP} that are not.")
@click.option("--repeats", default=3, show_default=True, help="Turns of all rows.")
@click.option("--images", default=256, show_default=True, help="Images, and so entries of the cache.")
@click.option("--device", default="auto", show_default=True, help="auto or cpu.")
@click.option("--mixed-precision", default="no", show_default=True, help="no, fp16 or bf16, of teacher and student.")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=False, show_default=True)
@click.option("--compile/--no-compile", "compiled", default=False, show_default=True, help="torch.compile the student.")
@click.option("--workers", type=int, help="Processes that read the cache; by default as `distill` has it.")
def main(
    work: Path,
    arch: str,
    levels: str,
    batch_sizes: tuple[int, ...],
    steps: int,
    repeats: int,
    images: int,
    device: str,
    mixed_precision: str,
    gradient_checkpointing: bool,
    compiled: bool,
    workers: int | None,
) -> None:
    shutil.rmtree(work, ignore_errors=True)
    common = (steps, device, mixed_precision, gradient_checkpointing, compiled, workers)
    in_process(prepare, Case(work, arch, "sd_small", batch_sizes[0], *common), images)
    print(f"{machine(device)}; {arch}, precision {mixed_precision}")
    for level, batch_size in itertools.product(levels.split(","), batch_sizes):
        case = Case(work, arch, level, batch_size, *common)
        runs: dict[str, list[Run]] = {row: [] for row in ROWS if row != CAST or mixed_precision != "no"}
        for turn in range(repeats):
            for row in list(runs) if turn % 2 == 0 else reversed(runs):
                runs[row].append(in_process(run, row, case))
        more = (", gradient checkpointing" if gradient_checkpointing else "") + (", compiled" if compiled else "")
        print(f"\n{level}, batches of {batch_size}{more}\n\n{table(runs, batch_size)}", flush=True)


if __name__ == "__main__":
    main()
