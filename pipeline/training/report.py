"""report.html: one self-contained page that shows what a student learned and what it costs."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from pipeline.sampling.generate import GeneratedImages, Scorer
from pipeline.system.device import device_name
from pipeline.system.echo import format_duration, plural
from pipeline.system.page import curves, facts, folded, folded_settings, grid, write_page

HELD_OUT = "held_out/"
# Rows of images during the training.
VALIDATIONS = 6
# What the words on the page mean: in the curves, and others, if they are there.
CURVES = {
    "task": "mean square error of the student's prediction against the noise that was added, or the velocity",
    "output": "mean square error against the teacher's prediction",
    "features": "mean square error of a block's output against that of the teacher's block",
    "loss": "task, output and features, each times its weight: what the training lowers",
}
WORDS = {
    "held-out error": "task and output on images that are not trained on; that of the output says most about a student",
    "epochs": "visits to each entry",
    "untrained student": "the student before its first step, with weights copied from the teacher",
    "peak memory": "the most that generating took, weights and activations together",
    "facts that hold": "the share of what the captions say that is seen in the images, for the demo's scenes",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a report shows.

    `about` names the teacher, the data and the circumstances. `metrics` are the lines of metrics.jsonl. `rows` maps
    each model's name to its images, the one to compare with first and all for the same prompts. `validation` maps
    steps to the images that were generated during the training. `passes` are seconds per forward pass of the U-Nets,
    measured in turns in one process, by name. Whatever is empty is left out. `scorer` judges images.
    """

    title: str
    about: dict[str, str]
    settings: dict[str, Any]
    metrics: list[dict[str, Any]]
    rows: dict[str, GeneratedImages]
    validation: dict[int, GeneratedImages]
    passes: dict[str, float]
    scorer: Scorer


def circumstances(device: torch.device, precision: str | None, metrics: list[dict[str, Any]]) -> dict[str, str]:
    """Where and when a training ran, as far as its metrics tell, for `Report.about`."""
    seconds = next((line["seconds"] for line in reversed(metrics) if "seconds" in line), None)
    return {
        "device": f"{device_name(device)}, mixed precision {precision}",
        **({"duration": format_duration(seconds)} if seconds is not None else {}),
        "finished": date.today().isoformat(),
    }


def write_report(out: Path, report: Report) -> None:
    """Write out/report.html. Lines of the metrics that are incomplete are left out."""
    metrics = [line for line in report.metrics if {"step", "epoch", "loss"} <= line.keys()]
    held_out = [line for line in report.metrics if any(name.startswith(HELD_OUT) for name in line)]
    sections = [
        f"<p class=lead>{html.escape(_lead(metrics, held_out))}</p>",
        facts(report.about),
        *_images_and_cost(report),
        *_validation(report.validation),
        "<h2>Loss</h2>",
        _losses(metrics, held_out),
    ]
    text = re.sub(r'src="[^"]*"', "", "".join(sections))
    words = CURVES | {word: meaning for word, meaning in WORDS.items() if word in text}
    sections += [folded("What the words mean", facts(words)), folded_settings(report.settings)]
    write_page(out, report.title, sections)


def _images_and_cost(report: Report) -> list[str]:
    if not report.rows:
        return []
    images = {name: samples.images for name, samples in report.rows.items()}
    prompts = next(iter(report.rows.values())).prompts
    return ["<h2>Images</h2>", grid(prompts, images), "<h2>Cost and score</h2>", _comparison(report)]


def _validation(images: dict[int, GeneratedImages]) -> list[str]:
    """A row for each of up to VALIDATIONS steps, evenly spread, the last among them."""
    if not images:
        return []
    steps = sorted(images)
    count = min(VALIDATIONS, len(steps))
    shown = [steps[len(steps) - 1 - (len(steps) - 1) * i // max(1, count - 1)] for i in range(count)][::-1]
    rows = {f"step {step:,}": images[step].images for step in shown}
    return ["<h2>Images during the training</h2>", grid(images[steps[-1]].prompts, rows)]


def _lead(metrics: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> str:
    """The length of the training, and the one figure that says most about it."""
    if not metrics:
        return "The metrics of this training are lost."
    last = metrics[-1]
    length = f"{plural(last['step'], 'step')}, {last['epoch']:.1f} epochs; last loss {last['loss']:.4g}."
    if not held_out:
        return length
    name = f"{HELD_OUT}output" if f"{HELD_OUT}output" in held_out[-1] else f"{HELD_OUT}task"
    against = "the teacher's prediction" if name.endswith("output") else "the added noise"
    first, final = held_out[0], held_out[-1]
    begun = f", {first[name]:.4g} before the training" if first["step"] == 0 else ""
    return f"{length} Error against {against} on images that were held out: {final[name]:.4g}{begun}."


def _comparison(report: Report) -> str:
    """Parameters, size, time, memory and, for scenes, the oracle's score, compared with the first row's."""
    rows, passes = report.rows, report.passes
    first = next(iter(rows.values()))
    scores = {name: report.scorer(samples.images, samples.prompts) for name, samples in rows.items()}
    scored = all(score is not None for score in scores.values())
    head = ["", "U-Net parameters", "fp16 size, MB"]
    head += ["seconds per U-Net pass"] if passes else []
    head += ["seconds per image", "peak memory, MB", "generated on"]
    head += ["facts that hold"] if scored else []
    lines = []
    for name, samples in rows.items():
        cells = [
            f"{samples.parameters:,} ({samples.parameters / first.parameters:.0%})",
            f"{2 * samples.parameters / 1e6:,.1f}",
            *([_pass(passes.get(name), next(iter(passes.values())))] if passes else []),
            f"{samples.seconds:.3g}",
            _memory(samples, first),
            html.escape(samples.device),
        ]
        if scored:
            cells.append(f"{scores[name]:.1%} over {plural(len(samples.prompts), 'image')}")
        lines.append(f"<tr><th>{html.escape(name)}</th>{''.join(f'<td class=number>{c}</td>' for c in cells)}</tr>")
    header = "".join(f"<th class=number>{cell}</th>" for cell in head)
    note = (
        "Seconds per image and memory cover the complete pipeline, run in a process of its own. Percentages are "
        "relative to the first row."
    )
    if "teacher" in rows:
        note += (
            " The teacher's images were generated when the cache was made, maybe on another machine."
            + (" The seconds per U-Net pass were measured here, in turns in one process." if passes else "")
            + " For a complete comparison run distill-sd evaluate."
        )
    return f"<div class=wide><table><tr>{header}</tr>{''.join(lines)}</table></div><p class=lead>{note}</p>"


def _pass(seconds: float | None, first: float) -> str:
    return "" if seconds is None else f"{seconds:.3g} ({seconds / first:.0%})"


def _memory(samples: GeneratedImages, first: GeneratedImages) -> str:
    if samples.peak_memory is None or not first.peak_memory:
        return "not measured"
    return f"{samples.peak_memory / 1e6:,.0f} ({samples.peak_memory / first.peak_memory:.0%})"


def _losses(metrics: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> str:
    """Plots over steps: the loss with its terms, the features' losses, and the errors on held-out images."""
    if not metrics:
        return ""
    last = metrics[-1]
    groups: dict[str, list[str]] = {
        "loss and its terms": [name for name in ("loss", "task", "output") if name in last],
        "features, by the student's block": [name for name in last if name.startswith("feature/")],
    }
    plots = {
        title: {name.removeprefix("feature/"): _curve(metrics, name) for name in names}
        for title, names in groups.items()
        if names
    }
    if held_out:
        names = [name for name in held_out[-1] if name.startswith(HELD_OUT)]
        plots["held-out error"] = {name.removeprefix(HELD_OUT): _curve(held_out, name) for name in names}
    return curves(plots, "step", "loss curves")


def _curve(metrics: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that have the value."""
    lines = [line for line in metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]
