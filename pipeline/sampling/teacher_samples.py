"""The teacher's images in a cache, which students' reports show next to their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipeline.sampling.generate import INDEX, SAMPLES, GeneratedImages, Sampler, load_images
from pipeline.system.errors import UserError, first_line
from shards.files import atomic_directory
from shards.store import Store, at_once


def teacher_samples(cache: Path) -> tuple[GeneratedImages, Sampler] | None:
    """The images and how they were generated; None if the cache has none. Raises UserError if they are damaged."""
    folder = cache / SAMPLES
    if not folder.is_dir():
        return None
    try:
        return load_images(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} cannot be read ({first_line(error)}). Copy it from an intact cache, delete it and rerun the "
            "same `distill-sd teacher-cache`, or train with --no-report."
        ) from None


def take_samples(store: Store, folder: Path) -> None:
    """Copy the images of a cache in a store to `folder`/samples, unless they are there."""
    target = folder / SAMPLES
    try:
        index = store.read(f"{SAMPLES}/{INDEX}")
    except FileNotFoundError:
        index = b""
    if index and (target / INDEX).is_file() and (target / INDEX).read_bytes() == index:
        return
    shutil.rmtree(target, ignore_errors=True)
    if not index:
        return
    try:
        names = [f"{i:04d}.png" for i in range(len(json.loads(index)["prompts"]))]
    except (ValueError, KeyError, TypeError, RecursionError):
        # `teacher_samples` says what is wrong with it.
        names = []
    with atomic_directory(target, exist_ok=True) as temporary:
        for name, data in zip(names, at_once(store, lambda name: store.read(f"{SAMPLES}/{name}"), names), strict=True):
            (temporary / name).write_bytes(data)
        (temporary / INDEX).write_bytes(index)
