"""A growing folder of images, one per prompt: a rerun keeps the existing images and generates the missing ones."""

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
    """The file of each prompt's image, whether or not it exists yet."""
    return [folder / f"{i:06d}.png" for i in range(count)]


def count_missing(folder: Path, count: int) -> int:
    return sum(not file.is_file() for file in image_files(folder, count))


def generate_missing(
    folder: Path, load: Callable[[], DiffusionPipeline], prompts: list[str], sampler: Sampler, description: str
) -> list[Path]:
    """Generate the images that `folder` lacks and return all the files. `load` is called only if some are missing.

    Batches start at the same prompts as in an uninterrupted run, so an image has the same bytes however often the run
    was stopped. Each image is saved atomically when its batch is finished.
    """
    files = image_files(folder, len(prompts))
    missing = [not file.is_file() for file in files]
    starts = range(0, len(prompts), sampler.batch_size)
    batches = [slice(first, first + sampler.batch_size) for first in starts]
    batches = [batch for batch in batches if any(missing[batch])]
    if batches:
        folder.mkdir(parents=True, exist_ok=True)
        pipe, existing = load(), len(prompts) - sum(missing)
        with tqdm(total=len(prompts), initial=existing, unit="image", desc=description) as progress:
            for batch in batches:
                batch_sampler = replace(sampler, seed=sampler.seed + batch.start)
                images = generate(pipe, prompts[batch], batch_sampler, None).images
                for file, image, is_missing in zip(files[batch], images, missing[batch], strict=True):
                    if is_missing:
                        save_image(image, file)
                        progress.update()
    return files


def save_image(image: Image.Image, file: Path) -> None:
    with atomic_file(file) as stream:
        image.save(stream, "PNG")
