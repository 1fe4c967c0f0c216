"""What was measured of a student and its teacher, as the rows of one table: cost, fidelity, quality."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.system.disk import format_bytes

HEAD = ("", "teacher", "student", "student / teacher", "")
NOT_MEASURED = "not measured: "


@dataclass(frozen=True)
class Row:
    """One line; without a teacher's and a student's figure it is the heading of those below."""

    name: str
    teacher: str = ""
    student: str = ""
    ratio: str = ""
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        return self.name, self.teacher, self.student, self.ratio, self.note


COSTS: dict[str, tuple[str, Callable[[Any], str], str]] = {
    "unet_parameters": ("U-Net parameters", "{:,}".format, ""),
    "pipeline_parameters": ("pipeline's parameters", "{:,}".format, "with VAE and text encoder"),
    "macs": ("MACs of a U-Net forward", lambda macs: f"{macs / 1e9:,.4g} G", "of one picture's latents"),
    "forward_seconds": ("seconds of a U-Net forward", "{:.3g}".format, ""),
    "picture_seconds": ("seconds of a picture", "{:.3g}".format, ""),
    "peak_memory": ("peak memory", format_bytes, "of drawing, in a process of its own"),
    "unet_bytes": ("U-Net's files", format_bytes, ""),
    "pipeline_bytes": ("pipeline's files", format_bytes, ""),
}
SCORES = {
    "fid": ("FID", "{:.2f}", "less is better"),
    "inception_score": ("Inception score", "{:.2f}", "more is better"),
    "clip_score": ("CLIP score, 100 cos", "{:.2f}", "more is better"),
    "facts": ("the captions' facts that hold", "{:.1%}", "by the scenes' oracle"),
}


def rows_of(evaluation: dict[str, Any]) -> list[Row]:
    """The table of an evaluation.json."""
    return [
        *cost_rows(evaluation["cost"]),
        *fidelity_rows(evaluation["fidelity"], evaluation["student"]["level"]),
        *quality_rows(evaluation["quality"]),
    ]


def cost_rows(cost: dict[str, Any]) -> list[Row]:
    teacher, student = cost["teacher"], cost["student"]
    rows = [pair(name, show, note, teacher[key], student[key]) for key, (name, show, note) in COSTS.items()]
    return [Row(f"Cost, {cost['device']}, batch of {cost['batch_size']}"), *rows]


def pair(name: str, show: Callable[[Any], str], note: str, teacher: float, student: float) -> Row:
    ratio = f"{student / teacher:.3f}" if teacher else ""
    return Row(name, show(teacher), show(student), ratio, note)


def fidelity_rows(fidelity: dict[str, Any], level: str) -> list[Row]:
    heading = "Fidelity, mean square error to the teacher"
    if "missing" in fidelity:
        return [Row(heading), missing_row("output and taps", fidelity)]
    total = fidelity["all"]
    parts = [("all timesteps", total), *((f"timesteps {b['first']} to {b['last']}", b) for b in fidelity["bins"])]
    return [
        Row(f"{heading}, {fidelity['entries']} held-out pictures, as {level}"),
        *(error_row(f"output, {name}", part["output"]) for name, part in parts),
        *(error_row(f"{tap}, all timesteps", error) for tap, error in total["taps"].items()),
    ]


def error_row(name: str, error: dict[str, float]) -> Row:
    return Row(name, student=f"{error['mse']:.4g}", note=f"{error['relative']:.2%} of the teacher's mean square")


def quality_rows(quality: dict[str, Any]) -> list[Row]:
    heading = "Quality"
    if "missing" in quality:
        return [Row(heading), missing_row("FID, IS, CLIP score", quality)]
    rows = [Row(f"{heading}, {quality['pictures']} pictures, {quality['protocol']}")]
    for key, (name, show, note) in SCORES.items():
        score = quality["scores"].get(key)
        if score and "missing" in score:
            rows.append(missing_row(name, score))
        elif score:
            rows.append(pair(name, show.format, note, score["teacher"], score["student"]))
    return rows


def missing_row(name: str, found: dict[str, Any]) -> Row:
    return Row(name, note=NOT_MEASURED + found["missing"])


def markdown(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table with its columns in line."""
    cells = [HEAD, *(_bold(row) if is_heading(row) else row.cells for row in rows)]
    cells = [tuple(cell.replace("|", "\\|") for cell in line) for line in cells]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = [("-" * (w - 1) + ":") if 0 < i < 4 else "-" * w for i, w in enumerate(widths)]
    lines = [
        [cell.rjust(w) if 0 < i < 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in cells
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))


def is_heading(row: Row) -> bool:
    return not any(row.cells[1:])


def _bold(row: Row) -> tuple[str, ...]:
    return f"**{row.name}**", *row.cells[1:]


def as_html(rows: Iterable[Row]) -> str:
    head = "".join(f"<th class=number>{cell}</th>" if 0 < i < 4 else f"<th>{cell}</th>" for i, cell in enumerate(HEAD))
    return f"<div class=wide><table><tr>{head}</tr>{''.join(map(_html_row, rows))}</table></div>"


def _html_row(row: Row) -> str:
    name, *figures, note = map(html.escape, row.cells)
    if is_heading(row):
        return f"<tr><th colspan=5>{name}</th></tr>"
    return f"<tr><td>{name}</td>{''.join(f'<td class=number>{f}</td>' for f in figures)}<td>{note}</td></tr>"
