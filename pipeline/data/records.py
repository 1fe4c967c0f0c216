"""From pictures with their captions to records: one for each entry that `encode` shall write."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from pipeline.core import draws
from pipeline.data.settings import DataSettings


@dataclass(frozen=True, slots=True)
class ListedImage:
    """A picture as its source lists it.

    `name` is the same wherever the picture is found, where the source knows one: every random draw hangs on it.
    `location` is for the source alone. `captions` is what stands in the caption's place: text, several, or neither.
    `problem` says why the picture cannot be used, when the listing alone shows that.
    """

    name: str
    location: Any
    captions: Any
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One picture with one caption, in one view. `source_id` names it for good: its random draws hang on it."""

    source_id: str
    location: Any
    caption: str
    problem: str | None = None


class Source(Protocol):
    """A new kind of input is a class with these two."""

    def pictures(self) -> list[ListedImage]:
        """All pictures, in an order that stays. Raises UserError for an input that cannot be used."""

    def read(self, location: Any) -> bytes:
        """The encoded image. Raises OSError if it is not there."""


def records_of(pictures: list[ListedImage], settings: DataSettings) -> list[Record]:
    """The records of the pictures that are taken, in their order; captions and views of one picture side by side."""
    records = numbered(record for picture in taken(pictures, settings) for record in captioned(picture, settings))
    return [view for record in records for view in views(record, settings.views)]


def taken(pictures: list[ListedImage], settings: DataSettings) -> list[ListedImage]:
    """`--max-samples` of them, drawn by the seed, in their order."""
    count = settings.max_samples
    if count is None or count >= len(pictures):
        return pictures
    draw = draws.generator(settings.seed, "", 0, "max-samples")
    return [pictures[i] for i in np.sort(draw.choice(len(pictures), count, replace=False))]


def captioned(picture: ListedImage, settings: DataSettings) -> list[Record]:
    """A record for each caption that is taken; a picture that has none gives one with its problem."""
    captions, problem = _texts(picture.captions)
    problem = picture.problem or problem
    if problem:
        return [Record(picture.name, picture.location, "", problem)]
    if settings.captions == "random":
        draw = draws.generator(settings.seed, picture.name, 0, "caption")
        captions = [captions[draw.integers(len(captions))]]
    elif settings.captions == "first":
        captions = captions[:1]
    return [Record(picture.name, picture.location, caption) for caption in captions]


def numbered(records: Iterable[Record]) -> list[Record]:
    """The same records; the second and later ones of a name get a `#2`, `#3` behind it."""
    seen: Counter[str] = Counter()
    found = []
    for record in records:
        seen[record.source_id] += 1
        again = seen[record.source_id]
        found.append(record if again == 1 else replace(record, source_id=f"{record.source_id}#{again}"))
    return found


def views(record: Record, count: int) -> list[Record]:
    """The record, and `count` - 1 more of it with an `@2`, `@3` behind the name, whose draws are others."""
    return [record, *(replace(record, source_id=f"{record.source_id}@{view}") for view in range(2, count + 1))]


def inputs_sha256(records: list[Record]) -> str:
    """A hash of which pictures a run takes, and their captions; not of the pixels."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.source_id, record.caption], ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def is_unicode(text: str) -> bool:
    """False for halves of surrogate pairs, which JSON can carry and UTF-8 cannot."""
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)


def _texts(captions: Any) -> tuple[list[str], str | None]:
    """The captions, none of them blank, and why there is none."""
    several = list(captions) if isinstance(captions, (list, tuple, np.ndarray)) else [captions]
    for caption in several:
        if not isinstance(caption, str):
            return [], "there is no caption" if caption is None else f"the caption is {caption!r:.80}, not text"
        if not is_unicode(caption):
            return [], "the caption is not valid Unicode"
    texts = [caption for caption in several if caption.strip()]
    return texts, None if texts else "the caption is empty"
