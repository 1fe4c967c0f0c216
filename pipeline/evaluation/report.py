"""report.html of an evaluation: the table, the errors over timesteps, and images side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.evaluation.table import as_html, rows_of
from pipeline.sampling.folder import image_files
from pipeline.system.page import GRID_PICTURES, curves, folded_settings, grid, write_page


def write_evaluation(out: Path, evaluation: dict[str, Any], prompts: list[str], folders: dict[str, Path]) -> None:
    """Write out/report.html for an evaluation.json. `folders` hold the images of `prompts`, if there are any."""
    sections = ["<h2>Results</h2>", as_html(rows_of(evaluation))]
    if "bins" in evaluation["fidelity"]:
        sections += ["<h2>Error against the teacher over timesteps</h2>", _errors(evaluation["fidelity"]["bins"])]
    if prompts:
        shown: dict[str, list[Image.Image]] = {
            name: [Image.open(file) for file in image_files(folder, len(prompts))[:GRID_PICTURES]]
            for name, folder in folders.items()
        }
        sections += ["<h2>Images</h2>", grid(prompts, shown)]
    student, teacher = (evaluation[name]["model"].rstrip("/") for name in ("student", "teacher"))
    title = f"{student} compared with {teacher}"
    write_page(out, title, [*sections, folded_settings(evaluation["settings"])])


def _errors(bins: list[dict[str, Any]]) -> str:
    """Plots of the output's and the taps' errors, each part of the schedule at its middle timestep."""
    middles = [(part["first"] + part["last"]) / 2 for part in bins]
    taps = {tap: (middles, [part["taps"][tap]["relative"] for part in bins]) for tap in bins[0]["taps"]}
    output = {
        "mean square": (middles, [part["output"]["mse"] for part in bins]),
        "relative to the teacher's": (middles, [part["output"]["relative"] for part in bins]),
    }
    return curves({"output": output, "taps, relative to the teacher's": taps}, "timestep", "errors over timesteps")
