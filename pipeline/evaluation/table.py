"""The results of an evaluation as one table: cost, fidelity and quality of a student and its teacher."""

from __future__ import annotations

import functools
import html
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.system.disk import format_bytes
from pipeline.system.echo import plural
from pipeline.system.tables import markdown_table

HEAD = ("", "teacher", "student", "student / teacher", "")
# The columns of HEAD that hold numbers.
NUMBERS = (1, 2, 3)
# Of a terminal, in characters.
WIDTH = 100
NOT_MEASURED = "not measured: "
# key in evaluation.json -> label, format, note.
COSTS: dict[str, tuple[str, Callable[[Any], str], str]] = {
    "unet_parameters": ("U-Net parameters", "{:,}".format, ""),
    "pipeline_parameters": ("pipeline parameters", "{:,}".format, "with VAE and text encoder"),
    "macs": ("MACs per U-Net forward pass", lambda macs: f"{macs / 1e9:,.4g} G", "one image"),
    "forward_seconds": ("seconds per U-Net forward pass", "{:.3g}".format, "one batch"),
    "picture_seconds": ("seconds per image", "{:.3g}".format, ""),
    "peak_memory": ("peak memory", format_bytes, "while generating images in a separate process"),
    "unet_bytes": ("U-Net files", format_bytes, ""),
    "pipeline_bytes": ("pipeline files", format_bytes, ""),
}
SCORES: dict[str, tuple[str, Callable[[Any], str], str]] = {
    "fid": ("FID", "{:.2f}".format, "lower is better"),
    "inception_score": ("Inception score", "{:.2f}".format, "higher is better"),
    "clip_score": ("CLIP score, 100 cos", "{:.2f}".format, "higher is better"),
    "facts": ("caption facts that hold", "{:.1%}".format, "judged by the scenes' oracle"),
}
# With fewer images a score depends too much on which images they are. For FID its authors advise 10,000 at least, and
# the mean of 100 values is uncertain by a tenth of their spread.
FEWEST = {"fid": 10_000, "inception_score": 10_000, "clip_score": 100, "facts": 100}


@dataclass(frozen=True)
class Row:
    """One line of the table; a row with a name alone is the heading of the rows below it."""

    name: str
    teacher: str = ""
    student: str = ""
    ratio: str = ""
    note: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        return self.name, self.teacher, self.student, self.ratio, self.note


def rows_of(evaluation: dict[str, Any]) -> list[Row]:
    """The table's rows for an evaluation.json."""
    return [
        *cost_rows(evaluation["cost"]),
        *fidelity_rows(evaluation["fidelity"], evaluation["student"]["level"]),
        *quality_rows(evaluation["quality"]),
    ]


def cost_rows(cost: dict[str, Any]) -> list[Row]:
    teacher, student = cost["teacher"], cost["student"]
    rows = [
        comparison_row(name, show, stored_as(cost) if key == "unet_bytes" else note, teacher[key], student[key])
        for key, (name, show, note) in COSTS.items()
    ]
    return [Row(f"Cost, {cost['device']}, batch of {cost['batch_size']}"), *rows]


def stored_as(cost: dict[str, Any]) -> str:
    """The precision of the weights in the U-Nets' files. Earlier versions did not record it."""
    teacher, student = (cost[name].get("precision", "") for name in ("teacher", "student"))
    return teacher if teacher == student else f"teacher in {teacher}, student in {student}"


def comparison_row(name: str, show: Callable[[Any], str], note: str, teacher: float, student: float) -> Row:
    ratio = f"{student / teacher:.3f}" if teacher else ""
    return Row(name, show(teacher), show(student), ratio, note)


def fidelity_rows(fidelity: dict[str, Any], level: str) -> list[Row]:
    heading = "Fidelity, mean square error against the teacher"
    if "missing" in fidelity:
        return [Row(heading), missing_row("output and taps", fidelity)]
    total = fidelity["all"]
    parts = [("all timesteps", total), *((f"timesteps {b['first']} to {b['last']}", b) for b in fidelity["bins"])]
    return [
        Row(f"{heading}, {fidelity['entries']} held-out images, student layers: {level}"),
        *(error_row(f"output, {name}", part["output"]) for name, part in parts),
        *(error_row(f"{tap}, all timesteps", error) for tap, error in total["taps"].items()),
    ]


def error_row(name: str, error: dict[str, float]) -> Row:
    return Row(name, student=f"{error['mse']:.4g}", note=f"{error['relative']:.2%} of the teacher's mean square")


def quality_rows(quality: dict[str, Any]) -> list[Row]:
    heading = "Quality"
    if "missing" in quality:
        return [Row(heading), missing_row("FID, IS, CLIP score", quality)]
    rows = [Row(f"{heading}, {plural(quality['pictures'], 'image')}, {quality['protocol']}")]
    for key, (name, show, note) in SCORES.items():
        score = quality["scores"].get(key)
        if score and "missing" in score:
            rows.append(missing_row(name, score))
        elif score:
            few = (
                f"; of {plural(quality['pictures'], 'image')}, but it takes {FEWEST[key]:,} to be reliable"
                if quality["pictures"] < FEWEST[key]
                else ""
            )
            rows.append(comparison_row(name, show, note + few, score["teacher"], score["student"]))
    return rows


def missing_row(name: str, result: dict[str, Any]) -> Row:
    return Row(name, note=NOT_MEASURED + result["missing"])


def markdown(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table, headings in bold."""
    lines = [(f"**{row.name}**", *row.cells[1:]) if is_heading(row) else row.cells for row in rows]
    return markdown_table(HEAD, lines, NUMBERS)


def plain_text(rows: Iterable[Row]) -> str:
    """The rows for a terminal: no line is longer than WIDTH, if its words allow it."""
    rows = list(rows)
    cells = [HEAD[:4], *(row.cells[:4] for row in rows if any(row.cells[1:4]))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    wrapped = functools.partial(textwrap.wrap, width=WIDTH, break_long_words=False, break_on_hyphens=False)

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]
        return "  ".join(padded)

    lines = [line(HEAD[:4])]
    for row in rows:
        if is_heading(row):
            lines += ["", *wrapped(row.name)]
        elif not any(row.cells[1:4]):
            lines += wrapped(f"{row.name}: {row.note}", subsequent_indent="    ")
        else:
            shown = line(row.cells[:4])
            beside = f"{shown}  {row.note}".rstrip()
            note = wrapped(row.note, initial_indent="    ", subsequent_indent="    ")
            lines += [beside] if len(beside) <= WIDTH else [shown.rstrip(), *note]
    return "\n".join(lines)


def is_heading(row: Row) -> bool:
    return not any(row.cells[1:])


def as_html(rows: Iterable[Row]) -> str:
    """The rows as an HTML table."""
    classes = [" class=number" if i in NUMBERS else "" for i in range(len(HEAD))]
    head = "".join(f"<th{kind}>{cell}</th>" for kind, cell in zip(classes, HEAD, strict=True))
    return f"<div class=wide><table><tr>{head}</tr>{''.join(map(_html_row, rows))}</table></div>"


def _html_row(row: Row) -> str:
    name, *numbers, note = map(html.escape, row.cells)
    note = re.sub(r"`([^`]+)`", r"<code>\1</code>", note)
    if is_heading(row):
        return f"<tr><th colspan=5>{name}</th></tr>"
    return f"<tr><td>{name}</td>{''.join(f'<td class=number>{n}</td>' for n in numbers)}<td>{note}</td></tr>"
