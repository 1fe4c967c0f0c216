"""From images with their captions to records: one for each entry that `encode` will write."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from pipeline.core import draws
from pipeline.data.files import MAX_TEXT_BYTES
from pipeline.settings.data import DataSettings
from pipeline.system.text_files import is_unicode

# With `--captions all`, each caption is an entry.
MAX_CAPTIONS = 1000


@dataclass(frozen=True, slots=True)
class ListedImage:
    """An image as its source lists it.

    `name` stays the same wherever the image is stored, if the source knows such a name: every random draw depends on
    it. `location` has a meaning only for the source. `captions` is whatever the source has as the caption: text,
    several texts, or something else. `problem` is the reason why the image cannot be used, if listing it shows one.
    `size` is the length of the encoded image in bytes, and `modified` when the file that holds it was last modified, in
    nanoseconds, if listing it shows them.
    """

    name: str
    location: Any
    captions: Any
    problem: str | None = None
    size: int | None = None
    modified: int | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One image with one caption, in one view. `source_id` is its permanent name, which its random draws depend on."""

    source_id: str
    location: Any
    caption: str
    problem: str | None = None
    size: int | None = None
    modified: int | None = None


class Source(Protocol):
    """A new kind of input is a class with these two methods."""

    def images(self) -> list[ListedImage]:
        """All images, always in the same order. Raises UserError for an input that cannot be used."""

    def read(self, location: Any) -> bytes:
        """The encoded image. Raises OSError if it does not exist."""


def records_of(images: list[ListedImage], settings: DataSettings) -> list[Record]:
    """The records of the selected images, in order. Captions and views of one image follow one another."""
    selected = select_images(images, settings)
    records = numbered(record for image in selected for record in captioned(image, settings))
    seen = [view for record in records for view in views(record, settings.views)]
    return [with_shuffled_tags(record, settings.seed) for record in seen] if settings.shuffle_tags else seen


def select_images(images: list[ListedImage], settings: DataSettings) -> list[ListedImage]:
    """`--max-samples` of the images, drawn by the seed and kept in order; all of them if it is not set."""
    count = settings.max_samples
    if count is None or count >= len(images):
        return images
    draw = draws.generator(settings.seed, "", 0, "max-samples")
    return [images[i] for i in np.sort(draw.choice(len(images), count, replace=False))]


def captioned(image: ListedImage, settings: DataSettings) -> list[Record]:
    """One record per caption that `--captions` chooses, or a single record with a problem if there is none."""
    captions, problem = _texts(image.captions)
    problem = image.problem or problem
    if settings.captions == "all" and len(captions) > MAX_CAPTIONS:
        problem = problem or f"there are {len(captions)} captions, more than {MAX_CAPTIONS}"
    if problem:
        return [Record(image.name, image.location, "", problem, image.size, image.modified)]
    if settings.captions == "random":
        draw = draws.generator(settings.seed, image.name, 0, "caption")
        captions = [captions[draw.integers(len(captions))]]
    elif settings.captions == "first":
        captions = captions[:1]
    return [
        Record(image.name, image.location, caption, size=image.size, modified=image.modified) for caption in captions
    ]


def numbered(records: Iterable[Record]) -> list[Record]:
    """The same records, with `#2`, `#3`, ... appended to a name from its second use on."""
    uses: Counter[str] = Counter()
    unique = []
    for record in records:
        uses[record.source_id] += 1
        number = uses[record.source_id]
        unique.append(record if number == 1 else replace(record, source_id=f"{record.source_id}#{number}"))
    return unique


def views(record: Record, count: int) -> list[Record]:
    """The record and `count` - 1 copies, named with `@2`, `@3`, ... so that they get random draws of their own."""
    return [record, *(replace(record, source_id=f"{record.source_id}@{view}") for view in range(2, count + 1))]


def with_shuffled_tags(record: Record, seed: int) -> Record:
    """The record with its caption's comma-separated tags in an order of its own. Each view has another."""
    tags = [tag.strip() for tag in record.caption.split(",") if tag.strip()]
    order = draws.generator(seed, record.source_id, 0, "tags").permutation(len(tags))
    return replace(record, caption=", ".join(tags[i] for i in order))


def inputs_sha256(records: list[Record]) -> str:
    """A hash of the records' names and captions, but not of the pixels."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps([record.source_id, record.caption], ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _texts(captions: Any) -> tuple[list[str], str | None]:
    """The captions that are not blank, and the reason if there are none."""
    several = list(captions) if isinstance(captions, (list, tuple, np.ndarray)) else [captions]
    for caption in several:
        if not isinstance(caption, str):
            return [], "there is no caption" if caption is None else f"the caption is {caption!r:.80}, not text"
        if not is_unicode(caption):
            return [], "the caption is not valid Unicode"
        if len(caption) > MAX_TEXT_BYTES or len(caption.encode()) > MAX_TEXT_BYTES:
            return [], f"the caption has more than {MAX_TEXT_BYTES} bytes"
    texts = [caption for caption in several if caption.strip()]
    return texts, None if texts else "the caption is empty"
