"""The oracle: finds which facts of a caption hold in an image, by classical image analysis without learning.

    image -> background plane -> pixels that differ from it -> connected parts -> colour, shape, size, place

A part's shape is the one whose template overlaps it best, at any rotation that scenes have, after both are
scaled to the same area and moved to the same centre.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    MAXIMUM_ROTATION,
    OBJECT_COLOURS,
    RELATIONS,
    SHAPES,
    SIDE,
    ObjectFacts,
    parse_caption,
)

# How much a pixel must differ from the background, as a share of full intensity.
CONTRAST = 0.16
# The smallest area of a part, in pixels.
MINIMUM_AREA = 40
# Between the largest "small" and the smallest "large" radius of a scene.
SMALL_RADIUS = 12.5
# The frame in which shapes are compared: cells per side, and its side in square roots of the shape's area.
GRID = 40
GRID_REACH = 1.7


@dataclass(frozen=True)
class Part:
    """One connected object in an image. `area` is in pixels, and (`x`, `y`) is the centroid."""

    colour: str
    shape: str
    area: float
    x: float
    y: float


@dataclass(frozen=True)
class Verdict:
    """Name of a caption's fact -> whether it holds in the image."""

    facts: dict[str, bool]

    @property
    def score(self) -> float:
        """The share of the facts that hold."""
        return sum(self.facts.values()) / len(self.facts)

    @property
    def all(self) -> bool:
        return all(self.facts.values())


def score(image: Image.Image | np.ndarray, caption: str) -> Verdict:
    """Judge a 64 x 64 RGB image by a scene's caption. Raises ValueError for other sizes or captions."""
    facts = parse_caption(caption)
    background, parts = analyse(image)
    verdict = {
        "background": background == facts.background,
        "number": len(parts) == sum(o.count for o in facts.objects),
    }
    matches = [_parts_of(item, parts) for item in facts.objects]
    for number, (item, matching) in enumerate(zip(facts.objects, matches, strict=True), 1):
        verdict[f"colour {number}"] = len(matching) >= item.count
        verdict[f"shape {number}"] = len(matching) >= item.count and all(
            part.shape == item.shape for part in matching[: item.count]
        )
        if item.count > 1:
            verdict[f"count {number}"] = len(matching) == item.count
        if item.size:
            verdict[f"size {number}"] = bool(matching) and (_radius(matching[0], item.shape) < SMALL_RADIUS) == (
                item.size == "small"
            )
    if facts.relation:
        verdict["relation"] = all(matches) and _related(matches[0][0], matches[1][0], facts.relation)
    return Verdict(verdict)


def analyse(image: Image.Image | np.ndarray) -> tuple[str, list[Part]]:
    """The background's colour word and the parts in front of it, largest first."""
    pixels = np.asarray(image, np.float64) / 255
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(f"the image has shape {pixels.shape}. A scene's image has shape {(SIDE, SIDE, 3)}.")
    plane = _background_plane(pixels)
    distance = np.abs(pixels - plane).max(axis=2)
    labels, count = _connected(distance > CONTRAST)
    background = _nearest_colour(plane.mean(axis=(0, 1)), BACKGROUNDS)
    masks = [labels == label for label in range(1, count + 1)]
    parts = [_part(pixels, distance, mask) for mask in masks if mask.sum() >= MINIMUM_AREA]
    return background, sorted(parts, key=lambda part: -part.area)


def _background_plane(pixels: np.ndarray) -> np.ndarray:
    """The shaded background, (64, 64, 3): a plane fitted to the border, then to all pixels near that plane."""
    along = np.linspace(-1, 1, SIDE)
    basis = np.stack(np.broadcast_arrays(1.0, along[None, :], along[:, None]), axis=-1).reshape(-1, 3)
    flat = pixels.reshape(-1, 3)
    border = np.ones((SIDE, SIDE), bool)
    border[2:-2, 2:-2] = False
    middle = np.median(pixels[border], axis=0)
    near = (np.abs(flat - middle).max(axis=1) < 0.25) & border.reshape(-1)
    for _ in range(3):
        plane = basis @ np.linalg.lstsq(basis[near], flat[near], rcond=None)[0]
        near = np.abs(flat - plane).max(axis=1) < 0.1
        if near.sum() < 200:
            break
    return plane.reshape(pixels.shape)


def _connected(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels (H, W) int of the 4-connected parts of a mask, counted from 1, and the number of parts."""
    labels, count = np.zeros(mask.shape, int), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        count += 1
        labels[start] = count
        waiting = [start]
        while waiting:
            y, x = waiting.pop()
            for neighbour in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= neighbour[0] < SIDE and 0 <= neighbour[1] < SIDE
                if inside and mask[neighbour] and not labels[neighbour]:
                    labels[neighbour] = count
                    waiting.append(neighbour)
    return labels, count


def _part(pixels: np.ndarray, distance: np.ndarray, mask: np.ndarray) -> Part:
    """One part, with its colour from the pixels of highest contrast and its shape from the coverage.

    A pixel's coverage is its contrast relative to theirs.
    """
    strength = distance[mask]
    core = mask & (distance >= np.median(strength))
    coverage = np.where(_grown(mask), np.clip(distance / np.median(distance[core]), 0, 1), 0)
    coverage = np.where(coverage > 0.5, 1.0, 0.0) if coverage.sum() else mask.astype(float)
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    area = coverage.sum()
    x, y = (columns * coverage).sum() / area, (rows * coverage).sum() / area
    colour = _nearest_colour(np.median(pixels[core], axis=0), OBJECT_COLOURS)
    return Part(colour, _shape(coverage, x, y, area), float(area), float(x), float(y))


def _grown(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _nearest_colour(rgb: np.ndarray, names: tuple[str, ...]) -> str:
    """The colour word whose colour is nearest, under the best-fitting light that scenes have."""
    lights = np.linspace(0.84, 1.1, 7)[:, None]
    return min(names, key=lambda name: np.square(np.clip(lights * COLOURS[name], 0, 1) - rgb).sum(axis=1).min())


def _shape(coverage: np.ndarray, x: float, y: float, area: float) -> str:
    """The shape whose template overlaps best, with both scaled to unit area around their centroids."""
    scale = math.sqrt(area)
    grid = _grid() * scale
    columns, rows = np.floor(grid[0] + x).astype(int), np.floor(grid[1] + y).astype(int)
    inside = (columns >= 0) & (columns < SIDE) & (rows >= 0) & (rows < SIDE)
    sampled = np.where(inside, coverage[rows.clip(0, SIDE - 1), columns.clip(0, SIDE - 1)], 0)
    overlaps: dict[str, float] = {
        name: max(np.minimum(sampled, t).sum() / np.maximum(sampled, t).sum() for t in templates)
        for name, templates in _templates().items()
    }
    return max(overlaps, key=overlaps.__getitem__)


def _grid() -> np.ndarray:
    """(2, GRID, GRID): x and y of the cells of the frame in which shapes are compared, in square roots of the area."""
    along = np.linspace(-GRID_REACH / 2, GRID_REACH / 2, GRID)
    return np.stack(np.meshgrid(along, along))


@functools.cache
def _templates() -> dict[str, np.ndarray]:
    """Per shape, (rotations, GRID, GRID) float masks of unit area around the centroid."""
    return {name: np.stack([_template(name, r) for r in np.linspace(-1, 1, 9) * MAXIMUM_ROTATION]) for name in SHAPES}


def _template(name: str, rotation: float) -> np.ndarray:
    area, centre_y = _unit(name)
    x, y = _grid() * math.sqrt(area)
    cosine, sine = math.cos(rotation), math.sin(rotation)
    return SHAPES[name].contains(cosine * x + sine * y, cosine * y - sine * x + centre_y).astype(float)


@functools.cache
def _unit(name: str) -> tuple[float, float]:
    """Area and y of the centroid, for a shape of radius 1."""
    fine = (np.arange(600) + 0.5) / 200 - 1.5
    inside = SHAPES[name].contains(fine[None, :], fine[:, None])
    return float(inside.sum() / 200**2), float((inside * fine[:, None]).sum() / inside.sum())


def _radius(part: Part, shape: str) -> float:
    return math.sqrt(part.area / _unit(shape)[0])


def _parts_of(item: ObjectFacts, parts: list[Part]) -> list[Part]:
    """The parts of the noun's colour, with those of its shape first."""
    matching = [part for part in parts if part.colour == item.colour]
    return sorted(matching, key=lambda part: part.shape != item.shape)


def _related(first: Part, second: Part, relation: str) -> bool:
    """Whether the direction from the first to the second part is mainly the relation's direction."""
    right, down = RELATIONS[relation]
    along = (second.x - first.x) * right + (second.y - first.y) * down
    across = (second.x - first.x) * down + (second.y - first.y) * right
    return along > abs(across)


def score_scenes(images: Iterable[Image.Image], prompts: list[str]) -> float | None:
    """The mean share of the prompts' facts that hold in the images, or None if a prompt is not a scene's caption.

    A `Scorer` for reports (see `sampling.generate`). The images are read one at a time.
    """
    try:
        verdicts = [score(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    except ValueError:
        return None
    return sum(verdict.score for verdict in verdicts) / len(verdicts)
