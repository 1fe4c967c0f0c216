"""What the cache costs the student: codecs, tokens and rounds, against training with the teacher in memory.

Every student is trained by `distill`'s own loop for the same number of steps on the same images; only the source of
its batches differs. `online` draws fresh noise and timesteps at every visit and asks the teacher there and then; it is
the bound, and the spread of its seeds the yardstick. Held-out means scenes that no student was trained on:

    output MSE   of the student's prediction to the teacher's, each seed and their mean; in per cent over online's mean
    guided MSE   the same of guided predictions, mean of the seeds
    score        share of the captions' facts that the oracle finds in images, of the first seed's student

Finished cases are kept in WORK/results.json, so that it can be stopped and started again; the table is of all that are
there. Run it on a quiet machine:

    python tests/benchmarks/cache_study.py --work work/cache-study
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
from pathlib import Path
from unittest import mock

import click
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from demo_sweep import begin, make, output_errors, score, train
from diffusers import UNet2DConditionModel
from online import OnlineBatches, stored_inputs

from pipeline.commands import distill
from pipeline.models.bundled import teacher_folder
from shards.files import write_json
from shards.reader import ShardSet
from shards.schema import COLUMNS, TAP_PREFIX
from shards.sidecar import read_sidecar
from shards.store import open_store

LEVEL = "sd_small"
STUDENT = {
    "level": LEVEL,
    "train-batch-size": 16,
    "learning-rate": 1e-3,
    "use-ema": True,
    "output-weight": 5.0,
    "feature-weight": 0.1,
}
"""Options of `distill`, those of the Makefile's demo."""
ONLINE, ALL = "online", 0


def exact(rounds: int) -> dict[str, str | int]:
    return {"ROUNDS": rounds, "CODEC": "fp16", "TOKENS": ALL}


def dithered(snr_db: float, tokens: int, rounds: int = 8) -> dict[str, str | int]:
    return {"ROUNDS": rounds, "SNR_DB": snr_db, "TOKENS": tokens}


CASES: dict[str, dict[str, str | int]] = {
    ONLINE: {},
    **{f"exact, {rounds} rounds": exact(rounds) for rounds in (16, 8, 4, 2)},
    "exact, 1 round": exact(1),
    **{f"{db} dB, 8 rounds": dithered(db, ALL) for db in (20, 10, 5, 0)},
    **{f"exact, {tokens} tokens, 8 rounds": exact(8) | {"TOKENS": tokens} for tokens in (64, 16, 4)},
    **{
        f"{db} dB, {tokens} tokens, 8 rounds": dithered(db, tokens)
        for db, tokens in ((20, 64), (10, 64), (5, 64), (0, 64), (10, 16), (10, 4))
    },
    "5 dB, 64 tokens, 16 rounds": dithered(5, 64, rounds=16),
}
"""Variables of `make teacher-cache`."""


def cache_of(work: Path, name: str, seed: int, scenes: int) -> Path:
    """The cache of that case, whose noise, timesteps and dither are drawn from `seed`."""
    folder = work / f"{name}, seed {seed}"
    variables = {
        "WORK": work,
        "CACHE": folder,
        "SCENES": scenes,
        "SAMPLES": 0,
        "UNCOND": 0,
        "CACHE_FLAGS": f"--seed {seed}",
    }
    make("teacher-cache", *(f"{key}={value}" for key, value in {**variables, **CASES[name]}.items()))
    return folder


def bytes_of_taps(cache: Path) -> float:
    """An entry's bytes in its taps' members, mean of all entries."""
    shards = ShardSet(open_store(cache), "cache")
    total = 0
    for head in shards.heads:
        sidecar = read_sidecar(open_store(cache), head.shard, shards.manifest)
        taps = [place for place, name in enumerate(head.members) if name.startswith(TAP_PREFIX)]
        total += int(sidecar.places[:, taps, COLUMNS.index("length")].sum())
    return total / len(shards)


def train_online(work: Path, latents: Path, cache: Path, steps: int, seed: int) -> Path:
    """A student whose every batch comes from the teacher itself; `cache` lends base/ and students/."""
    out = work / "student"
    shutil.rmtree(out, ignore_errors=True)
    settings = {option.replace("-", "_"): value for option, value in STUDENT.items()}
    chosen = distill.DistillSettings(cache=cache, out=out, max_train_steps=steps, seed=seed, report=False, **settings)
    cpu, stored = torch.device("cpu"), ShardSet(open_store(latents), "latents")
    source = OnlineBatches(teacher_folder(), LEVEL, len(stored), stored_inputs(stored, cpu), cpu, torch.float32)
    with mock.patch.object(distill, "batches", source):
        distill.run(chosen)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    return out


def table(results: dict[str, dict[str, dict]], fp16_bytes: float) -> str:
    online = results.get(ONLINE, {})
    bound = statistics.mean(run["mse"] for run in online.values()) if online else None
    lines = [
        "| source of the batches | bytes of taps | fp16 over it | output MSE, each seed | mean | over online "
        "| guided MSE | score |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        runs = [results[name][seed] for seed in sorted(results.get(name, {}))]
        if not runs:
            continue
        errors = [run["mse"] for run in runs]
        mean, guided = (statistics.mean(run[key] for run in runs) for key in ("mse", "guided"))
        facts = [run["score"] for run in runs if run["score"] is not None]
        size = runs[0]["bytes"]
        cells = [
            name,
            f"{size:,.0f}" if size else "",
            f"{fp16_bytes / size:.1f}" if size else "",
            " ".join(f"{error:.5f}" for error in errors),
            f"{mean:.5f}",
            f"{100 * (mean / bound - 1):+.1f} %" if bound else "",
            f"{guided:.4f}",
            " ".join(f"{fact:.3f}" for fact in facts),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for caches, students and results.")
@click.option("--steps", default=150, show_default=True, help="Optimiser steps of every student.")
@click.option("--scenes", default=125, show_default=True, help="Scenes to train on.")
@click.option("--captions", default=64, show_default=True, help="Captions to draw and judge.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1), show_default=True)
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Only these; all by default.")
def main(work: Path, steps: int, scenes: int, captions: int, seeds: tuple[int, ...], cases: tuple[str, ...]) -> None:
    file, results, held_out, teacher = begin(work)
    reference = cache_of(work, "exact, 8 rounds", seeds[0], scenes)
    for seed in seeds:
        for name in cases or CASES:
            if str(seed) in results.get(name, {}):
                continue
            if name == ONLINE:
                cache, student = None, train_online(work, work / "latents", reference, steps, seed)
            else:
                cache = cache_of(work, name, seed, scenes)
                student, _ = train(work, name, {**STUDENT, "max-train-steps": steps, "seed": seed}, cache)
            plain, guided = output_errors(UNet2DConditionModel.from_pretrained(student / "unet"), teacher, held_out)
            results.setdefault(name, {})[str(seed)] = {
                "mse": plain,
                "guided": guided,
                "score": score(student, captions) if seed == seeds[0] else None,
                "bytes": bytes_of_taps(cache) if cache else None,
            }
            write_json(file, results)
            click.echo(f"{name}, seed {seed}: {results[name][str(seed)]}", err=True)

    machine = f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    print(
        f"{machine}; Python {platform.python_version()}, torch {torch.__version__}; {scenes} scenes, "
        f"{steps} steps of {STUDENT['train-batch-size']}, {captions} captions\n"
    )
    print(table(results, bytes_of_taps(reference)))


if __name__ == "__main__":
    main()
