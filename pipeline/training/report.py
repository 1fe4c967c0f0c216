"""report.html: one self-contained page that shows what a student learned and what it costs."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from pipeline.sampling.generate import GeneratedImages, Scorer
from pipeline.system.echo import plural
from pipeline.system.page import curves, folded_settings, grid, write_page


def write_report(
    out: Path,
    title: str,
    settings: dict[str, Any],
    metrics: list[dict[str, Any]],
    rows: dict[str, GeneratedImages],
    scorer: Scorer,
) -> None:
    """Write out/report.html.

    `metrics` are the lines of metrics.jsonl; incomplete ones are left out. `rows` maps each model's name to its images,
    the teacher's first and all for the same prompts; if it is empty, the report has no images. `scorer` judges the
    images.
    """
    metrics = [line for line in metrics if {"step", "epoch", "loss"} <= line.keys()]
    sections = [
        f"<p class=lead>{html.escape(_lead(metrics))}</p>",
        *_images_and_cost(rows, scorer),
        "<h2>Loss</h2>",
        _losses(metrics),
        folded_settings(settings),
    ]
    write_page(out, title, sections)


def _images_and_cost(rows: dict[str, GeneratedImages], scorer: Scorer) -> list[str]:
    if not rows:
        return []
    images = {name: samples.images for name, samples in rows.items()}
    prompts = next(iter(rows.values())).prompts
    return ["<h2>Images</h2>", grid(prompts, images), "<h2>Cost and score</h2>", _comparison(rows, scorer)]


def _lead(metrics: list[dict[str, Any]]) -> str:
    if not metrics:
        return "The metrics of this training are lost."
    last = metrics[-1]
    return f"{plural(last['step'], 'step')}, {last['epoch']:.1f} epochs over the cache; last loss {last['loss']:.4g}."


def _comparison(rows: dict[str, GeneratedImages], scorer: Scorer) -> str:
    """Parameters, size, time, memory and, for scenes, the oracle's score, compared with the first row's."""
    first = next(iter(rows.values()))
    scores = {name: scorer(samples.images, samples.prompts) for name, samples in rows.items()}
    scored = all(score is not None for score in scores.values())
    head = ["", "U-Net parameters", "fp16 size, MB", "seconds per image", "peak memory, MB", "generated on"]
    head += ["facts that hold"] if scored else []
    lines = []
    for name, samples in rows.items():
        cells = [
            f"{samples.parameters:,} ({samples.parameters / first.parameters:.0%})",
            f"{2 * samples.parameters / 1e6:,.1f}",
            f"{samples.seconds:.3g}",
            _memory(samples, first),
            html.escape(samples.device),
        ]
        if scored:
            cells.append(f"{scores[name]:.1%} over {plural(len(samples.prompts), 'image')}")
        lines.append(f"<tr><th>{html.escape(name)}</th>{''.join(f'<td class=number>{c}</td>' for c in cells)}</tr>")
    header = "".join(f"<th class=number>{cell}</th>" for cell in head)
    note = (
        "Seconds and memory cover the complete pipeline, run in a separate process. Percentages are relative to the "
        "first row. The teacher's seconds were measured when the cache was made, maybe on another machine: for a "
        "comparison run distill-sd evaluate."
    )
    return f"<div class=wide><table><tr>{header}</tr>{''.join(lines)}</table></div><p class=lead>{note}</p>"


def _memory(samples: GeneratedImages, first: GeneratedImages) -> str:
    if samples.peak_memory is None or not first.peak_memory:
        return "not measured"
    return f"{samples.peak_memory / 1e6:,.0f} ({samples.peak_memory / first.peak_memory:.0%})"


def _losses(metrics: list[dict[str, Any]]) -> str:
    """Two plots over steps: the loss with its terms, and the features' losses."""
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
    return curves(plots, "step", "loss curves")


def _curve(metrics: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the lines that have the value."""
    lines = [line for line in metrics if name in line]
    return [line["step"] for line in lines], [line[name] for line in lines]
