"""A rolling cache beside online training and beside caches that keep their rounds: held-out error and disk over time.

Every student is trained by `distill`'s own loop for the same number of steps on the same images; only the source of
its batches differs. `online` asks the teacher at every step. `rolling` runs `teacher-cache --window` and `distill
--order rounds` at the same time, as processes on this machine. The other caches are complete before the training.

    output MSE   of the student's prediction to the teacher's on scenes that no student was trained on: during the
                 training on 64 of them, at the end on all
    disk         bytes of the rounds' files, looked at twice a second while the student trains

Finished cases are kept in WORK/results.json, so that it can be stopped and started again. Run it on a quiet machine:

    python tests/benchmarks/rolling.py --work work/rolling
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import click
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from demo_sweep import begin, make, output_errors, run
from diffusers import UNet2DConditionModel
from online import OnlineBatches, stored_inputs

from pipeline.commands import distill
from pipeline.models.bundled import teacher_folder
from pipeline.system.jsonl import read_jsonl
from pipeline.training.output import METRICS
from shards.files import write_json
from shards.reader import ShardSet
from shards.store import open_store

LEVEL, WINDOW, PARTS = "sd_small", 2, 4
STUDENT = {
    "level": LEVEL,
    "learning-rate": 1e-3,
    "use-ema": True,
    "output-weight": 5.0,
    "feature-weight": 0.1,
}
"""Options of `distill`, those of the Makefile's demo."""
ONLINE, ROLLING, SAME_DISK, ALL_ROUNDS = "online", "rolling", "fixed, as much disk", "fixed, all rounds"
CASES = (SAME_DISK, ALL_ROUNDS, ONLINE, ROLLING)


def teacher_command(
    work: Path, name: str, seed: int, scenes: int, rounds: int, flags: str = ""
) -> tuple[Path, list[str]]:
    """The folder of a cache, and the arguments of `make` that write it."""
    folder = work / f"{name}, seed {seed}"
    variables = {"WORK": work, "CACHE": folder, "SCENES": scenes, "SAMPLES": 0, "UNCOND": 0, "ROUNDS": rounds}
    given = [f"{key}={value}" for key, value in variables.items()]
    return folder, ["teacher-cache", *given, f"CACHE_FLAGS=--seed {seed} {flags}"]


def options(steps: int, batch_size: int, seed: int, held_out: Path) -> dict[str, object]:
    every = max(1, steps // PARTS)
    more = {
        "max-train-steps": steps,
        "train-batch-size": batch_size,
        "seed": seed,
        "validation-latents": held_out,
        "validation-steps": every,
    }
    return {**STUDENT, **more, "logging-steps": every}


def train(cache: Path, out: Path, chosen: dict[str, object], *flags: str) -> None:
    shutil.rmtree(out, ignore_errors=True)
    arguments = [
        sys.executable,
        "-m",
        "pipeline.distill",
        "--no-report",
        "--cache",
        str(cache),
        "--out",
        str(out),
        *flags,
    ]
    for option, value in chosen.items():
        arguments += [f"--{option}"] if value is True else [f"--{option}", str(value)]
    run(arguments)


def train_online(latents: Path, cache: Path, out: Path, chosen: dict[str, object]) -> None:
    """A student whose every batch comes from the teacher itself; `cache` lends base/ and students/."""
    shutil.rmtree(out, ignore_errors=True)
    settings = {option.replace("-", "_"): value for option, value in chosen.items()}
    cpu, stored = torch.device("cpu"), ShardSet(open_store(latents), "latents")
    source = OnlineBatches(teacher_folder(), LEVEL, len(stored), stored_inputs(stored, cpu), cpu, torch.float32)
    with mock.patch.object(distill, "batches", source):
        distill.run(distill.DistillSettings(cache=cache, out=out, report=False, **settings))
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def bytes_of_rounds(cache: Path) -> int:
    total = 0
    for path in cache.glob("r*-s*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@contextmanager
def watched(cache: Path | None):
    """The bytes of a cache's rounds, twice a second while the block runs."""
    sizes: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while cache is not None and not ended.wait(0.5):
            sizes.append(bytes_of_rounds(cache))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield sizes
    finally:
        ended.set()
        thread.join()


def curve(out: Path) -> dict[str, float]:
    """The held-out output MSE by step."""
    lines = [line for line in read_jsonl(out / METRICS) if "held_out/output" in line]
    return {str(line["step"]): line["held_out/output"] for line in lines}


def run_case(work: Path, name: str, seed: int, scenes: int, steps: int, batch_size: int, held_out: Path) -> dict:
    """Everything that is measured of a case but the error at the end."""
    out, chosen = work / "student", options(steps, batch_size, seed, held_out)
    rounds = -(-steps * batch_size // scenes)
    before = 0.0
    if name == ROLLING:
        cache, command = teacher_command(work, name, seed, scenes, rounds, f"--window {WINDOW}")
        shutil.rmtree(cache, ignore_errors=True)
        writer = subprocess.Popen(["make", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began = time.monotonic()
        while not (cache / "manifest.json").is_file():
            time.sleep(0.1)
        with watched(cache) as sizes:
            train(cache, out, chosen, "--order", "rounds")
        if writer.wait():
            sys.exit("the teacher failed")
        seconds = time.monotonic() - began
    else:
        kept = WINDOW if name == SAME_DISK else rounds
        cache, command = teacher_command(work, f"{kept} rounds", seed, scenes, kept)
        began = time.monotonic()
        if name != ONLINE or not cache.exists():
            make(*command)
        before = time.monotonic() - began
        began = time.monotonic()
        with watched(None if name == ONLINE else cache) as sizes:
            if name == ONLINE:
                train_online(work / "latents", cache, out, chosen)
            else:
                train(cache, out, chosen)
        seconds = time.monotonic() - began
    student = UNet2DConditionModel.from_pretrained(out / "unet")
    return {
        "curve": curve(out),
        "student": student,
        "before": before if name in (SAME_DISK, ALL_ROUNDS) else 0.0,
        "seconds": seconds,
        "most": max(sizes, default=0),
        "mean": statistics.mean(sizes) if sizes else 0,
        "rounds": 0 if name == ONLINE else rounds if name in (ROLLING, ALL_ROUNDS) else WINDOW,
    }


def table(results: dict[str, dict[str, dict]]) -> str:
    bound = statistics.mean(run["mse"] for run in results[ONLINE].values()) if results.get(ONLINE) else None
    lines = [
        "| source of the batches | rounds | largest disk | mean disk | seconds: cache + training "
        "| output MSE, each seed | mean | over online |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        runs = list(results.get(name, {}).values())
        if not runs:
            continue
        errors = [run["mse"] for run in runs]
        mean = statistics.mean(errors)
        before, seconds = (statistics.mean(run[key] for run in runs) for key in ("before", "seconds"))
        cells = [
            name,
            str(runs[0]["rounds"] or ""),
            *(f"{max(run[key] for run in runs) / 1e6:.2f} MB" for key in ("most", "mean")),
            f"{before:.0f} + {seconds:.0f}",
            " ".join(f"{error:.5f}" for error in errors),
            f"{mean:.5f}",
            f"{100 * (mean / bound - 1):+.1f} %" if bound else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(results: dict[str, dict[str, dict]]) -> str:
    """The error on 64 held-out entries during the training, mean of the seeds."""
    names = [name for name in CASES if results.get(name)]
    steps = list(next(iter(results[names[0]].values()))["curve"])
    lines = [f"| step | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for step in steps:
        means = [statistics.mean(run["curve"][step] for run in results[name].values()) for name in names]
        lines.append(f"| {step} | {' | '.join(f'{mean:.5f}' for mean in means)} |")
    return "\n".join(lines)


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for caches, students and results.")
@click.option("--steps", default=150, show_default=True, help="Optimiser steps of every student.")
@click.option("--batch-size", default=16, show_default=True, help="Entries per step.")
@click.option("--scenes", default=125, show_default=True, help="Scenes to train on.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1), show_default=True)
@click.option("--case", "cases", multiple=True, type=click.Choice(CASES), help="Only these; all by default.")
def main(work: Path, steps: int, batch_size: int, scenes: int, seeds: tuple[int, ...], cases: tuple[str, ...]) -> None:
    file, results, held_out, teacher = begin(work)
    make("encode", f"WORK={work}", f"SCENES={scenes}")
    for seed in seeds:
        for name in cases or CASES:
            if str(seed) in results.get(name, {}):
                continue
            measured = run_case(work, name, seed, scenes, steps, batch_size, held_out)
            measured["mse"], _ = output_errors(measured.pop("student"), teacher, held_out)
            results.setdefault(name, {})[str(seed)] = measured
            write_json(file, results)
            click.echo(f"{name}, seed {seed}: {json.dumps(measured)}", err=True)
    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads; Python {platform.python_version()}, torch "
        f"{torch.__version__}; {scenes} scenes, {steps} steps of {batch_size}, window {WINDOW}\n"
    )
    print(table(results), curves(results), sep="\n\n")


if __name__ == "__main__":
    main()
