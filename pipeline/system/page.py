"""A report as one self-contained HTML page: images and curves are inlined."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from shards.files import write_bytes

REPORT = "report.html"
# Images per row of a grid, and the side in pixels above which an image is shrunk.
GRID_PICTURES = 8
GRID_SIDE = 192
# Points that a curve marks one by one. A line alone would not show a single one.
FEW_POINTS = 20
# Legible on white and on black.
INK = "#808890"
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60656c; --line: #d9dde2; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #eceef0; --soft: #a6adb4; --line: #363b41; --paper: #16181b; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: var(--soft); }
table { border-collapse: collapse; } td, th { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top;
       border-bottom: 1px solid var(--line); } td.number, th.number { text-align: right;
       font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } .grid td { border: 0; padding: .2rem .3rem .2rem 0; max-width: 7.2rem; font-size: .8rem;
       color: var(--soft); } .grid th { border: 0; font-weight: 600; font-size: .85rem; white-space: nowrap; }
h1 { overflow-wrap: anywhere; } .plots { display: flex; flex-wrap: wrap; gap: 1rem; }
.plots img { flex: 1 1 20rem; min-width: 0; } img { max-width: 100%; }
.grid img { width: 7rem; height: auto; aspect-ratio: 1; border-radius: 4px; display: block; }
details { margin-top: 1rem; } code { font-size: .85rem; overflow-wrap: anywhere; }
"""


def write_page(out: Path, title: str, sections: list[str]) -> None:
    """Write out/report.html: a title followed by sections of HTML."""
    page = (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'><link rel=icon href='data:,'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"{''.join(sections)}</body></html>\n"
    )
    write_bytes(out / REPORT, page.encode())


def grid(prompts: list[str], rows: dict[str, list[Image.Image]]) -> str:
    """An HTML table of images with one row per model and one column per prompt, for the first GRID_PICTURES prompts."""
    prompts = prompts[:GRID_PICTURES]
    head = "".join(f"<td>{html.escape(prompt)}</td>" for prompt in prompts)
    lines = [
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(
            f'<td><img alt="{html.escape(name)}: {html.escape(prompt)}" src="{_data_uri(image)}"></td>'
            for image, prompt in zip(images, prompts, strict=False)
        )
        + "</tr>"
        for name, images in rows.items()
    ]
    return f"<div class=wide><table class=grid>{''.join(lines)}<tr><th></th>{head}</tr></table></div>"


def curves(plots: dict[str, dict[str, tuple[list[float], list[float]]]], xlabel: str, alt: str) -> str:
    """Plots, each an inlined SVG: next to each other, or below on a narrow screen. `plots` is {title: {label: (x, y)}}.

    The x axis counts something. The y axis of a plot is logarithmic if all its values are positive.
    """
    # Imported where it is used: most commands draw nothing.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    images = []
    for title, lines in plots.items():
        figure, axis = pyplot.subplots(figsize=(6, 4.4), layout="constrained")
        for label, (x, y) in lines.items():
            axis.plot(x, y, label=label, linewidth=1.3, marker="o" if len(x) <= FEW_POINTS else "", markersize=3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        positive = all(value > 0 for _, y in lines.values() for value in y)
        axis.set(title=title, xlabel=xlabel, yscale="log" if positive else "linear")
        axis.legend(fontsize=7, frameon=False, labelcolor=INK, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        axis.tick_params(colors=INK, which="both")
        axis.title.set_color(INK)
        axis.xaxis.label.set_color(INK)
        axis.set_facecolor("none")
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        stream = io.BytesIO()
        figure.savefig(stream, format="svg", transparent=True)
        pyplot.close(figure)
        encoded = base64.b64encode(stream.getvalue()).decode()
        images.append(f'<img alt="{html.escape(f"{alt}: {title}")}" src="data:image/svg+xml;base64,{encoded}">')
    return f"<div class=plots>{''.join(images)}</div>"


def facts(rows: dict[str, str]) -> str:
    """A table of names and texts."""
    lines = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>" for name, text in rows.items())
    return f"<table>{''.join(lines)}</table>"


def folded(title: str, content: str) -> str:
    """A section that opens at a click."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def folded_settings(settings: dict[str, Any]) -> str:
    lines = (
        f"<tr><td>{html.escape(str(name))}</td><td><code>{html.escape(json.dumps(value))}</code></td></tr>"
        for name, value in settings.items()
    )
    return folded("Settings", f"<table>{''.join(lines)}</table>")


def _data_uri(image: Image.Image) -> str:
    """The image as a data URI: PNG if it is small, else shrunk and as JPEG."""
    stream = io.BytesIO()
    if max(image.size) > GRID_SIDE:
        shrunk = image.copy()
        shrunk.thumbnail((2 * GRID_SIDE, 2 * GRID_SIDE))
        shrunk.save(stream, "JPEG", quality=88)
        kind = "jpeg"
    else:
        image.save(stream, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
