"""What integers cost a student: quantisers put on after training, against training with them.

A student is trained as usual first. Then, with each seed, it goes on in three ways, for the same number of steps and at
a lower learning rate: in floats, with `--qat int8` and with `--qat w4a8`. Quantisers are also put on the one that went
on in floats, with ranges measured on the same entries as in training. So all that is compared has had the same number
of steps:

    output MSE   of the student's prediction to the teacher's, on scenes that no student was trained on, each seed
    score        share of the captions' facts that the oracle finds in images

Students and finished measurements are kept in WORK, so that it can be stopped and started again; errors come first,
then scores, which take longer. Run it on a quiet machine:

    python tests/benchmarks/qat.py --work work/qat
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from demo_sweep import GUIDANCE, begin, make, output_errors
from diffusers import UNet2DConditionModel

from pipeline.commands import distill
from pipeline.demo.evaluate import captions_of, judge
from pipeline.models.load import load_base, load_deployed_unet
from pipeline.sampling.generate import Sampler, generate
from pipeline.system.options import QAT_BITS
from shards.files import write_json

STUDENT: dict[str, Any] = {
    "level": "sd_small",
    "train_batch_size": 16,
    "output_weight": 5.0,
    "feature_weight": 0.1,
    "use_ema": True,
    "report": False,
    "dataloader_num_workers": 0,
}
"""Settings of `distill`, those of the Makefile's demo."""
FIRST_RATE, LAST_RATE = 1e-3, 2e-4
FLOAT = "floats"


def after(qat: str) -> str:
    return f"{qat}, put on after training"


def during(qat: str) -> str:
    return f"{qat}, trained with"


CASES = [FLOAT, *(name for qat in QAT_BITS for name in (after(qat), during(qat)))]


def settings_of(cache: Path, out: Path, **changes: Any) -> distill.DistillSettings:
    return distill.DistillSettings(cache=cache, out=out, **STUDENT, **changes)


def trained(cache: Path, out: Path, **changes: Any) -> Path:
    """A student of `distill`, in `out`, if it is not there."""
    distill.run(settings_of(cache, out, **changes))
    reset()
    return out


def reset() -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def quantised(cache: Path, student: Path, qat: str, seed: int) -> UNet2DConditionModel:
    """A finished student with quantisers, as a training with them would start from it."""
    settings = settings_of(cache, student.parent / "none", init_from=student, qat=qat, seed=seed)
    unet = distill.prepare(settings, distill.open_cache(settings), Accelerator(cpu=True)).student
    reset()
    return unet.eval()


def score(base: Path, unet: UNet2DConditionModel, captions: int) -> float:
    """The oracle's score of the images that a U-Net generates with the other parts of the pipeline in `base`."""
    pipeline, prompts = load_base(base, unet=unet), captions_of("train", captions)
    sampler = Sampler(guidance_scale=GUIDANCE, batch_size=32)
    return judge(generate(pipeline, prompts, sampler, "score").images, prompts).score


def students(
    work: Path, cache: Path, start: Path, seed: int, steps: int
) -> dict[str, Callable[[], tuple[Path, UNet2DConditionModel]]]:
    """For each case of students that begin as `start`, what gives the pipeline with its other parts, and the U-Net."""

    def last(name: str, **changes: Any) -> Path:
        out = work / f"{name}, seed {seed}"
        common = {"init_from": start, "max_train_steps": steps, "learning_rate": LAST_RATE, "seed": seed}
        return trained(cache, out, **common, **changes)

    def saved(folder: Path) -> tuple[Path, UNet2DConditionModel]:
        return folder, load_deployed_unet(folder / "unet", None, torch.float32).eval()

    def rounded(qat: str) -> tuple[Path, UNet2DConditionModel]:
        folder = last(FLOAT)
        return folder, quantised(cache, folder, qat, seed)

    found = {FLOAT: lambda: saved(last(FLOAT))}
    for qat in QAT_BITS:
        found[after(qat)] = partial(rounded, qat)
        found[during(qat)] = lambda qat=qat: saved(last(qat, qat=qat))
    return found


def table(results: dict[str, dict[str, dict]]) -> str:
    bound = statistics.mean(run["mse"] for run in results[FLOAT].values()) if FLOAT in results else None
    lines = [
        "| student | output MSE, each seed | mean | over floats | score, each seed | mean |",
        "|---|---|---|---|---|---|",
    ]
    for name in CASES:
        runs = [results[name][seed] for seed in sorted(results.get(name, {}))]
        if not runs:
            continue
        errors, scores = ([run[key] for run in runs if key in run] for key in ("mse", "score"))
        mean = statistics.mean(errors)
        cells = [
            name,
            " ".join(f"{error:.5f}" for error in errors),
            f"{mean:.5f}",
            f"{100 * (mean / bound - 1):+.1f} %" if bound else "",
            " ".join(f"{one:.3f}" for one in scores),
            f"{statistics.mean(scores):.3f}" if scores else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for the cache, students and results.")
@click.option("--steps", default=150, show_default=True, help="Optimiser steps in floats that all begin with.")
@click.option("--last-steps", default=40, show_default=True, help="Optimiser steps after that.")
@click.option("--scenes", default=125, show_default=True, help="Scenes to train on.")
@click.option("--captions", default=32, show_default=True, help="Captions to draw and judge.")
@click.option("--seed", "seeds", multiple=True, type=int, default=(0, 1, 2), show_default=True)
def main(work: Path, steps: int, last_steps: int, scenes: int, captions: int, seeds: tuple[int, ...]) -> None:
    file, results, held_out, teacher = begin(work)
    cache = work / "cache"
    make("teacher-cache", f"WORK={work}", f"SCENES={scenes}", "SAMPLES=0", "UNCOND=0", "ROUNDS=4")

    start = trained(
        cache, work / f"start, seed {seeds[0]}", max_train_steps=steps, learning_rate=FIRST_RATE, seed=seeds[0]
    )

    def measure(key: str, of: Callable[[Path, UNet2DConditionModel], float]) -> None:
        """Measure what is missing of one of a result's values, for all students."""
        for seed in seeds:
            for name, load in students(work, cache, start, seed, last_steps).items():
                result = results.setdefault(name, {}).setdefault(str(seed), {})
                if key not in result:
                    result[key] = of(*load())
                    write_json(file, results)
                    click.echo(f"{name}, seed {seed}: {result}", err=True)

    measure("mse", lambda base, unet: output_errors(unet, teacher, held_out)[0])
    measure("score", lambda base, unet: score(base, unet, captions))
    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, modelopt {version('nvidia-modelopt')}; {scenes} scenes, {steps} + {last_steps} "
        f"steps of {STUDENT['train_batch_size']}, {captions} captions\n"
    )
    print(table(results))


if __name__ == "__main__":
    main()
