"""A folder of pictures, one a prompt, that grows: what a stopped run has drawn is kept, and only the rest drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from pipeline.sampling.generate import Sampler, generate
from shards.files import atomic_file


def image_files(folder: Path, count: int) -> list[Path]:
    """Where the picture of each prompt is or will be."""
    return [folder / f"{i:06d}.png" for i in range(count)]


def count_missing(folder: Path, count: int) -> int:
    return sum(not file.is_file() for file in image_files(folder, count))


def generate_missing(
    folder: Path, load: Callable[[], DiffusionPipeline], prompts: list[str], sampler: Sampler, description: str
) -> list[Path]:
    """Draw the pictures that `folder` lacks, with the pipeline that `load` gives if any does; returns all the files.

    Batches begin where they would in a run from the start, so a picture is the same to the byte after any number of
    stops. Each is saved when its batch is drawn, whole or not at all.
    """
    files = image_files(folder, len(prompts))
    missing = [not file.is_file() for file in files]
    starts = range(0, len(prompts), sampler.batch_size)
    batches = [slice(first, first + sampler.batch_size) for first in starts]
    batches = [batch for batch in batches if any(missing[batch])]
    if batches:
        folder.mkdir(parents=True, exist_ok=True)
        pipe, drawn = load(), len(prompts) - sum(missing)
        with tqdm(total=len(prompts), initial=drawn, unit="picture", desc=description) as progress:
            for batch in batches:
                own = replace(sampler, seed=sampler.seed + batch.start)
                images = generate(pipe, prompts[batch], own, None).images
                for file, image, lacks in zip(files[batch], images, missing[batch], strict=True):
                    if lacks:
                        save_image(image, file)
                        progress.update()
    return files


def save_image(image: Image.Image, file: Path) -> None:
    with atomic_file(file) as stream:
        image.save(stream, "PNG")
