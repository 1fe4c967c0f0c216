"""How the demo's defaults were found: students of equal compute, held against their teacher.

Makes the caches with the Makefile's own commands, then trains each case with `distill-sd distill` and judges it on
scenes that no student was trained on:

    output MSE   of the student's prediction to the teacher's, at noise and timesteps of an exact cache
    guided MSE   the same of their guided predictions, in which errors without the caption count as well
    score        share of the captions' facts that the oracle finds in images, as a ratio to the teacher's

Finished cases are kept in WORK/results.json, so that it can be stopped and started again; the table is of all that are
there. Run it on a quiet machine:

    python tests/benchmarks/demo_sweep.py --work work/sweep
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import click
import diffusers
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from pipeline.core.diffusion import add_noise
from pipeline.core.losses import mse
from pipeline.demo.evaluate import captions_of, judge
from pipeline.models.bundled import teacher_folder
from pipeline.sampling.generate import Sampler, generate
from shards.dataset import CacheDataset
from shards.files import write_json
from shards.store import open_store

GUIDANCE = 5.0
HELD_OUT_SEED = 77
HELD_OUT_SCENES = 256
START = {
    "level": "sd_small",
    "train-batch-size": 32,
    "use-ema": True,
    "learning-rate": 1e-3,
    "lr-scheduler": "constant",
    "lr-warmup-steps": 0,
    "output-weight": 0.5,
    "feature-weight": 0.5,
    "feature-loss": "mse",
}
"""Options of `distill`, the losses' weights as in the seeds; a case replaces some. `cache` names one of CACHES;
`steps` multiplies the steps."""

CACHES = {
    "4 rounds": {"ROUNDS": "4", "UNCOND": "0"},
    "4 rounds, 1 in 10 without a caption": {"ROUNDS": "4", "UNCOND": "0.1"},
    "4 rounds, 1 in 5 without a caption": {"ROUNDS": "4", "UNCOND": "0.2"},
    "1 round, 1 in 10 without a caption": {"ROUNDS": "1", "UNCOND": "0.1"},
    "2 rounds, 1 in 10 without a caption": {"ROUNDS": "2", "UNCOND": "0.1"},
    "4 rounds, 1 in 10 without a caption, exact": {"ROUNDS": "4", "UNCOND": "0.1", "CODEC": "fp16", "TOKENS": "0"},
}
BALANCED = {"output-weight": 5.0, "feature-weight": 0.1}
UNCAPTIONED = {"cache": "4 rounds, 1 in 10 without a caption"}
SMALL_BATCH = {"train-batch-size": 16, "steps": 2}
FOUND = {**UNCAPTIONED, **BALANCED, **SMALL_BATCH}
COSINE = {"lr-scheduler": "cosine", "lr-warmup-steps": 20}
CASES = {
    "start": {},
    "relative features, output weight 20": {"feature-loss": "relative", "output-weight": 20.0},
    "output weight 5, feature weight 0.1": BALANCED,
    "batch 16, steps x 2": SMALL_BATCH,
    "1 in 10 without a caption": UNCAPTIONED,
    "1 in 10 without a caption, output weight 5, feature weight 0.1": {**UNCAPTIONED, **BALANCED},
    "1 in 5 without a caption, output weight 5, feature weight 0.1": {
        "cache": "4 rounds, 1 in 5 without a caption",
        **BALANCED,
    },
    "1 in 10 without a caption, output weight 5, feature weight 0.02": {
        **UNCAPTIONED,
        "output-weight": 5.0,
        "feature-weight": 0.02,
    },
    "found: 1 in 10 without a caption, output weight 5, feature weight 0.1, batch 16, steps x 2": FOUND,
    "found, relative features, output weight 20": {**FOUND, "feature-loss": "relative", "output-weight": 20.0},
    "found, relative features, feature weight 0.1": {**FOUND, "feature-loss": "relative"},
    "found, feature weight 0": {**FOUND, "feature-weight": 0.0},
    "found, learning rate 5e-4": {**FOUND, "learning-rate": 5e-4},
    "found, learning rate 2e-3": {**FOUND, "learning-rate": 2e-3},
    "found, cosine, learning rate 2e-3": {**FOUND, **COSINE, "learning-rate": 2e-3},
    "found, no average": {**FOUND, "use-ema": False},
    "found, average of decay 0.99": {**FOUND, "ema-decay": 0.99},
    "found, batch 8, steps x 4": {**FOUND, "train-batch-size": 8, "steps": 4},
    "found, 2 rounds": {**FOUND, "cache": "2 rounds, 1 in 10 without a caption"},
    "found, 1 round": {**FOUND, "cache": "1 round, 1 in 10 without a caption"},
    "found, exact features": {**FOUND, "cache": "4 rounds, 1 in 10 without a caption, exact"},
    "found, steps x 2": {**FOUND, "steps": 4},
}


def make(*variables: str) -> None:
    """The Makefile's target, quietly; ends the benchmark with its output if it fails."""
    run(["make", *variables])


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-4000:]}")


def cache_of(work: Path, name: str, scenes: int) -> Path:
    """The cache of that name, made if it is not there; all share their scenes and latents."""
    variables = {"WORK": work, "CACHE": work / f"cache, {name}", "SCENES": scenes, "SAMPLES": 0, **CACHES[name]}
    make("teacher-cache", *(f"{key}={value}" for key, value in variables.items()))
    return variables["CACHE"]


def held_out_cache(work: Path) -> Path:
    """Scenes of another seed, one timestep each, with exact predictions."""
    variables = {"WORK": work / "held-out", "SEED": HELD_OUT_SEED, "SCENES": HELD_OUT_SCENES, "ROUNDS": 1, "SAMPLES": 0}
    make("teacher-cache", *(f"{key}={value}" for key, value in variables.items()))
    return work / "held-out" / "cache"


def train(work: Path, name: str, settings: dict, cache: Path) -> tuple[Path, float]:
    """The student's pipeline, and the seconds that training took with all that comes before and after."""
    out = work / "student"
    shutil.rmtree(out, ignore_errors=True)
    flags = ["--no-report", "--cache", str(cache), "--out", str(out)]
    for option, value in settings.items():
        flags += [f"--{option}"] if value is True else [] if value is False else [f"--{option}", str(value)]
    started = time.monotonic()
    run([sys.executable, "-m", "pipeline.distill", *flags])
    return out, time.monotonic() - started


@torch.inference_mode()
def output_errors(unet: UNet2DConditionModel, teacher: DiffusionPipeline, held_out: Path) -> tuple[float, float]:
    """Mean square errors of the U-Net's prediction to the teacher's over the whole held-out cache: plain and guided."""
    dataset = CacheDataset(open_store(held_out), [])
    spec = dataset.spec["noise_scheduler"]
    alphas_cumprod = diffusers.DDPMScheduler.from_config(spec).alphas_cumprod
    empty = teacher.encode_prompt("", "cpu", 1, False)[0]
    plain, guided = [], []
    for start in range(0, len(dataset), 64):
        batch = dataset.collate([dataset[i] for i in range(start, min(start + 64, len(dataset)))])
        noisy = add_noise(batch.latents, batch.noise, batch.timesteps, alphas_cumprod)
        prompts = (batch.conditioning["prompt_embeds"].float(), empty.expand_as(batch.conditioning["prompt_embeds"]))
        with_caption, without = (predict(unet, noisy, batch.timesteps, p) for p in prompts)
        teacher_without = predict(teacher.unet, noisy, batch.timesteps, prompts[1])
        plain.append(mse(with_caption, batch.teacher_pred).item() * len(batch.keys))
        student, aim = guide(with_caption, without), guide(batch.teacher_pred.float(), teacher_without)
        guided.append(mse(student, aim).item() * len(batch.keys))
    return sum(plain) / len(dataset), sum(guided) / len(dataset)


def predict(unet: UNet2DConditionModel, noisy: Tensor, timesteps: Tensor, prompt_embeds: Tensor) -> Tensor:
    return unet(noisy, timesteps, encoder_hidden_states=prompt_embeds).sample


def guide(with_caption: Tensor, without: Tensor) -> Tensor:
    return without + GUIDANCE * (with_caption - without)


def score(folder: Path, captions: int) -> float:
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    prompts = captions_of("train", captions)
    return judge(
        generate(pipeline, prompts, Sampler(guidance_scale=GUIDANCE, batch_size=32), "score").images, prompts
    ).score


def begin(work: Path) -> tuple[Path, dict, Path, DiffusionPipeline]:
    """The file of results, what it holds so far, the held-out cache, and the teacher to hold students against."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    held_out = held_out_cache(work)
    teacher = DiffusionPipeline.from_pretrained(teacher_folder(), torch_dtype=torch.float32, local_files_only=True)
    return file, results, held_out, teacher


def settings_of(case: dict, steps: int) -> dict:
    settings = {**START, **case, "max-train-steps": steps * case.get("steps", 1)}
    return {option: value for option, value in settings.items() if option not in ("cache", "steps")}


def table(results: dict[str, dict], teacher_score: float) -> str:
    lines = [
        "| changed from the start | steps | output MSE | guided MSE | score | of the teacher's | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        lines.append(
            f"| {name} | {result['steps']} | {result['mse']:.5f} | {result['guided']:.4f} | {result['score']:.3f} | "
            f"{result['score'] / teacher_score:.3f} | {result['seconds']:.0f} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--work", type=Path, required=True, help="Directory for caches, students and results.")
@click.option("--steps", default=400, show_default=True, help="Optimiser steps of a case.")
@click.option("--scenes", default=2000, show_default=True, help="Scenes to train on.")
@click.option("--captions", default=128, show_default=True, help="Captions to draw and judge.")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="Only these; all by default.")
def main(work: Path, steps: int, scenes: int, captions: int, cases: tuple[str, ...]) -> None:
    file, results, held_out, teacher = begin(work)
    if "teacher" not in results:
        results["teacher"] = score(teacher_folder(), captions)
    for name in cases or CASES:
        if name in results:
            continue
        case = CASES[name]
        settings = settings_of(case, steps)
        student, seconds = train(work, name, settings, cache_of(work, case.get("cache", "4 rounds"), scenes))
        plain, guided = output_errors(UNet2DConditionModel.from_pretrained(student / "unet"), teacher, held_out)
        results[name] = {
            "steps": settings["max-train-steps"],
            "seconds": seconds,
            "mse": plain,
            "guided": guided,
            "score": score(student, captions),
        }
        write_json(file, results)
        click.echo(f"{name}: {results[name]}", err=True)

    done = {name: results[name] for name in CASES if name in results}
    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}; {scenes} scenes, {captions} captions\n"
    )
    print(f"Teacher's score: {results['teacher']:.3f}\n")
    print(table(done, results["teacher"]))


if __name__ == "__main__":
    main()
