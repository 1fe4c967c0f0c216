"""The teacher's images in a cache, which students' reports show next to their own."""

from __future__ import annotations

from pathlib import Path

from pipeline.sampling.generate import SAMPLES, GeneratedImages, Sampler, load_images
from pipeline.system.errors import UserError, first_line


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
