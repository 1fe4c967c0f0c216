"""Captioned images of shapes, determined by a seed and an index.

    facts    the content of the caption: objects, background, relation   `draw_facts`, `parse_caption`
    caption  the facts as a sentence                                     `caption_of`
    image    the facts as pixels, with all other details random          `render_image`

A scene depends only on (seed, split, index), so any number of scenes can be made in any order and by any
number of processes. The two splits never share a (colour, shape) combination: every caption of "heldout"
names at least one combination that never occurs in "train".

Images are uint8 arrays (height, width, RGB). Lengths are in pixels and angles in radians. The x axis points
right and the y axis points down.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.settings.demo_scenes import SPLITS
from shards.files import atomic_directory

SIDE = 64
SUPERSAMPLING = 4
MARGIN = 2.0
GAP = 4.0

COLOURS = {
    "red": (0.85, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.12, 0.62, 0.22),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.58, 0.18, 0.72),
    "white": (0.94, 0.94, 0.94),
    "black": (0.08, 0.08, 0.08),
    "gray": (0.52, 0.52, 0.52),
}
OBJECT_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
BACKGROUNDS = ("white", "gray", "black", "yellow", "green", "blue")
COUNT_WORDS = {2: "two", 3: "three"}

# Relation -> the unit step (x, y) from the first object to the second.
RELATIONS = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}
# Size word of a single object -> range of its radius.
SIZES = {"small": (8.0, 10.0), "large": (15.0, 20.0), None: (9.0, 17.0)}
# Number of objects in the image -> range of their radius.
GROUP_RADII = {2: (8.0, 10.5), 3: (8.0, 9.0)}


@dataclass(frozen=True)
class ObjectFacts:
    """One noun of a caption: `count` objects of the same colour and shape. `size` is None if the caption has none."""

    colour: str
    shape: str
    count: int = 1
    size: str | None = None


@dataclass(frozen=True)
class SceneFacts:
    """The content of a caption. `relation` holds from `objects[0]` to `objects[1]` and is None for a single noun."""

    objects: tuple[ObjectFacts, ...]
    background: str
    relation: str | None = None


@dataclass(frozen=True)
class Scene:
    facts: SceneFacts
    caption: str
    image: np.ndarray


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x**2 + y**2 <= 1


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) <= 0.86


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (y <= 0.6) & (math.sqrt(3) * abs(x) - y <= 1.2)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.minimum(abs(x), abs(y)) <= 0.34) & (np.maximum(abs(x), abs(y)) <= 1.05)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = x**2 + y**2
    return (squared <= 1.05**2) & (squared >= 0.5**2)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    outer, inner, sector = 1.2, 0.52, math.pi / 5
    radius = np.hypot(x, y)
    angle = abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)
    # The edge from the tip (outer, 0) to the notch at (inner, sector), as a half-plane in the folded sector.
    edge_x, edge_y = inner * math.cos(sector) - outer, inner * math.sin(sector)
    return (radius * np.cos(angle) - outer) * edge_y <= radius * np.sin(angle) * edge_x


@dataclass(frozen=True)
class Shape:
    """`contains(x, y)` is for radius 1, upright and centred. `reach` is the largest distance from the centre."""

    contains: Callable[[np.ndarray, np.ndarray], np.ndarray]
    reach: float
    plural: str


SHAPES = {
    "circle": Shape(_circle, 1.0, "circles"),
    "square": Shape(_square, 1.22, "squares"),
    "triangle": Shape(_triangle, 1.2, "triangles"),
    "cross": Shape(_cross, 1.11, "crosses"),
    "ring": Shape(_ring, 1.05, "rings"),
    "star": Shape(_star, 1.2, "stars"),
}
MAXIMUM_ROTATION = math.radians(20)

# The (colour, shape) combinations of "heldout": one per colour, and at least one per shape.
HELD_OUT = frozenset((colour, tuple(SHAPES)[(5 * i + 2) % len(SHAPES)]) for i, colour in enumerate(OBJECT_COLOURS))


def shape_mask(shape: str, x: float, y: float, radius: float, rotation: float = 0.0, side: int = SIDE) -> np.ndarray:
    """The shape's coverage of each pixel: float64 (side, side) in [0, 1]. Pixel (0, 0) has its centre at (0.5, 0.5)."""
    fine = (np.arange(side * SUPERSAMPLING) + 0.5) / SUPERSAMPLING
    right, down = (fine[None, :] - x) / radius, (fine[:, None] - y) / radius
    cosine, sine = math.cos(rotation), math.sin(rotation)
    inside = SHAPES[shape].contains(cosine * right + sine * down, cosine * down - sine * right)
    return inside.reshape(side, SUPERSAMPLING, side, SUPERSAMPLING).mean(axis=(1, 3))


def caption_of(facts: SceneFacts) -> str:
    """The facts as a sentence. `parse_caption` is the inverse."""
    nouns = [_noun_phrase(item) for item in facts.objects]
    subject = nouns[0] if facts.relation is None else f"{nouns[0]} {facts.relation} {nouns[1]}"
    return f"{subject} on {_with_article(facts.background)} background"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _noun_phrase(item: ObjectFacts) -> str:
    if item.count > 1:
        return f"{COUNT_WORDS[item.count]} {item.colour} {SHAPES[item.shape].plural}"
    return _with_article(" ".join(filter(None, (item.size, item.colour, item.shape))))


def parse_caption(caption: str) -> SceneFacts:
    """Read the facts from a caption.

    Raises ValueError, quoting the caption and the wrong words, if `caption_of` would not write this caption.
    """
    body, _, background = caption.removesuffix(" background").rpartition(" on ")
    background = background.split(" ")[-1]
    relation = next((name for name in RELATIONS if f" {name} " in body), None)
    nouns = [body] if relation is None else body.split(f" {relation} ")
    facts = SceneFacts(tuple(_parse_noun(noun, caption) for noun in nouns), background, relation)
    if background not in BACKGROUNDS or caption_of(facts) != caption:
        raise ValueError(
            f"caption {caption!r} is not a demo scene's caption. Write one like {_EXAMPLE!r}, "
            f"with one of these backgrounds: {', '.join(BACKGROUNDS)}"
        )
    return facts


_EXAMPLE = "a red circle above a blue square on a yellow background"


def _parse_noun(noun: str, caption: str) -> ObjectFacts:
    singular = {shape.plural: name for name, shape in SHAPES.items()}
    first, *middle, last = noun.split(" ") if " " in noun else ("", noun)
    count = {word: number for number, word in COUNT_WORDS.items()}.get(first, 1)
    shape = singular.get(last, last)
    colour = middle[-1] if middle else ""
    if colour not in OBJECT_COLOURS or shape not in SHAPES:
        raise ValueError(f"caption {caption!r}: {noun!r} is not an object of a demo scene, such as 'a red circle'")
    return ObjectFacts(colour, shape, count, middle[0] if len(middle) > 1 else None)


def generator(seed: int, index: int, split: str = "train") -> np.random.Generator:
    """The random generator of one scene: Philox keyed by seed and index, with a separate counter range per split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    key = np.array([seed, index], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, SPLITS.index(split)]))


def draw_facts(rng: np.random.Generator, split: str = "train") -> SceneFacts:
    """Draw the facts of a scene: 35 % one object, 20 % two or three equal objects, 45 % two objects in a relation."""
    kind = rng.choice(3, p=(0.35, 0.2, 0.45))
    objects = _draw_objects(rng, count=2 if kind == 2 else 1)
    combinations = {(item.colour, item.shape) for item in objects}
    if bool(combinations & HELD_OUT) != (split == "heldout"):
        return draw_facts(rng, split)
    taken = {item.colour for item in objects}
    background = str(rng.choice([name for name in BACKGROUNDS if name not in taken]))
    if kind == 2:
        return SceneFacts(objects, background, str(rng.choice(list(RELATIONS))))
    count = int(rng.integers(2, 4)) if kind == 1 else 1
    size = (None, "small", "large")[rng.integers(3)] if kind == 0 else None
    return SceneFacts((ObjectFacts(objects[0].colour, objects[0].shape, count, size),), background)


def _draw_objects(rng: np.random.Generator, count: int) -> tuple[ObjectFacts, ...]:
    # Objects of the same colour could not be told apart, so no relation between them could be checked.
    colours = rng.choice(OBJECT_COLOURS, size=count, replace=False)
    return tuple(ObjectFacts(str(colour), str(rng.choice(list(SHAPES)))) for colour in colours)


def render_image(facts: SceneFacts, rng: np.random.Generator) -> np.ndarray:
    """Facts -> uint8 (64, 64, 3). Position, radius, rotation, shading and exact colour are drawn from `rng`."""
    items = [item for item in facts.objects for _ in range(item.count)]
    canvas = _shaded(COLOURS[facts.background], rng)
    for item, (x, y, radius) in zip(items, _place(facts, items, rng), strict=True):
        rotation = rng.uniform(-MAXIMUM_ROTATION, MAXIMUM_ROTATION)
        mask = shape_mask(item.shape, x, y, radius, rotation)[..., None]
        canvas = canvas * (1 - mask) + _shaded(COLOURS[item.colour], rng) * mask
    return np.round(canvas * 255).astype(np.uint8)


def _shaded(colour: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """An area of the colour whose brightness changes along one direction: float64 (64, 64, 3) in [0, 1]."""
    tint = np.clip(np.array(colour) + rng.uniform(-0.035, 0.035, size=3), 0, 1)
    direction = rng.uniform(0, 2 * math.pi)
    along = np.linspace(-1, 1, SIDE)
    slope = math.cos(direction) * along[None, :] + math.sin(direction) * along[:, None]
    light = rng.uniform(0.92, 1.04) + rng.uniform(0, 0.1) * slope
    return np.clip(tint * light[..., None], 0, 1)


Place = tuple[float, float, float]


def _place(facts: SceneFacts, items: list[ObjectFacts], rng: np.random.Generator) -> list[Place]:
    """Centre x, centre y and radius of each object. The objects touch neither each other nor the border."""
    if len(items) == 1:
        radius = rng.uniform(*SIZES[items[0].size])
        return [(*_anywhere(SHAPES[items[0].shape].reach * radius, rng), radius)]
    if facts.relation is not None:
        return _place_related(facts.objects, facts.relation, rng)
    return _place_apart(items, rng)


def _anywhere(reach: float, rng: np.random.Generator) -> tuple[float, float]:
    low = MARGIN + reach
    x, y = rng.uniform(low, max(low, SIDE - low), size=2)
    return float(x), float(y)


def _place_related(objects: tuple[ObjectFacts, ...], relation: str, rng: np.random.Generator) -> list[Place]:
    radii = rng.uniform(*GROUP_RADII[2], size=2)
    reaches = [SHAPES[item.shape].reach * r for item, r in zip(objects, radii, strict=True)]
    step = RELATIONS[relation]
    order = (0, 1) if sum(step) > 0 else (1, 0)
    apart = sum(reaches) + GAP
    slack = max(0.0, SIDE - 2 * MARGIN - sum(reaches) - apart)
    near, far = np.sort(rng.uniform(0, slack, size=2))
    start = MARGIN + reaches[order[0]] + near
    along = {order[0]: start, order[1]: start + apart + far - near}
    # Along the other axis the objects differ by at most half as much, so that no other relation could be meant.
    limit = abs(along[0] - along[1]) / 2
    low, high = MARGIN + max(reaches), SIDE - MARGIN - max(reaches)
    first = rng.uniform(low, high)
    across = {0: first, 1: rng.uniform(max(low, first - limit), min(high, first + limit))}
    xs, ys = (along, across) if step[0] else (across, along)
    return [(float(xs[i]), float(ys[i]), float(radii[i])) for i in range(2)]


def _place_apart(items: list[ObjectFacts], rng: np.random.Generator) -> list[Place]:
    radius = rng.uniform(*GROUP_RADII[len(items)])
    reach = SHAPES[items[0].shape].reach * radius
    while True:
        centres = [_anywhere(reach, rng) for _ in items]
        pairs = [(a, b) for i, a in enumerate(centres) for b in centres[:i]]
        if all(math.dist(a, b) >= 2 * reach + GAP for a, b in pairs):
            return [(*centre, radius) for centre in centres]


def make_scene(seed: int, index: int, split: str = "train") -> Scene:
    """The scene of this seed, index and split. Raises ValueError for an unknown split."""
    rng = generator(seed, index, split)
    facts = draw_facts(rng, split)
    return Scene(facts, caption_of(facts), render_image(facts, rng))


def write_folder(out: str | Path, count: int, seed: int = 0, split: str = "train") -> Path:
    """Write scenes 0..count-1 as an image folder: PNG files and `metadata.jsonl` with one line per image.

    Each line is `{"file_name": ..., "text": ...}`. The folder gets its name only when it is complete. Returns the
    folder.
    """
    with atomic_directory(Path(out)) as folder:
        lines = []
        for index in tqdm(range(count), desc="scenes", unit="image"):
            scene = make_scene(seed, index, split)
            name = f"{index:06d}.png"
            Image.fromarray(scene.image).save(folder / name)
            lines.append(json.dumps({"file_name": name, "text": scene.caption}))
        (folder / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return Path(out)
