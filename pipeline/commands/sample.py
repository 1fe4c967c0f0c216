"""`distill-sd sample`: generates images and a contact sheet with a pipeline, the teacher's or a student's."""

from __future__ import annotations

import math

from PIL import Image

from pipeline.models.load import find_pipeline
from pipeline.sampling.generate import Sampler, check_sampler, generate, save_images
from pipeline.sampling.process import PipelineRef, load_pipeline
from pipeline.settings.sample import SampleSettings
from pipeline.system.device import DTYPES, process_state, resolve_dtype
from pipeline.system.echo import say
from pipeline.system.output import check_new
from pipeline.system.prompts import gather_prompts

SHEET = "sheet.png"
# The most images that a contact sheet shows, and their longer side on it.
SHOWN, THUMBNAIL = 64, 256


def run(settings: SampleSettings) -> None:
    """Generate an image for each prompt, and a contact sheet."""
    prompts = gather_prompts(settings.prompts)
    check_new(settings.out, "sample", {"--model": settings.model})
    folder = find_pipeline(settings.model, settings.revision, settings.variant, "--model")
    device = process_state(settings.device).device
    dtype = DTYPES[resolve_dtype(settings.dtype, device)]
    pipe = load_pipeline(PipelineRef(folder, folder / "unet", device, dtype, settings.variant, settings.variant))
    sampler = Sampler(
        settings.num_inference_steps,
        settings.guidance_scale,
        settings.batch_size,
        settings.scheduler,
        settings.negative_prompt,
        (settings.height, settings.width) if settings.height and settings.width else None,
        settings.seed,
    )
    check_sampler(pipe.scheduler, sampler, f"--model {settings.model}")
    samples = generate(pipe, prompts, sampler, "sample")
    save_images(samples, sampler, settings.out)
    contact_sheet(samples.images).save(settings.out / SHEET)
    say(f"Wrote {len(prompts)} images and {SHEET} to {settings.out}, {samples.seconds:.2f} seconds per image.")


def contact_sheet(images: list[Image.Image]) -> Image.Image:
    """The first SHOWN images, all of the same size, arranged in a rough square."""
    shown = images[:SHOWN]
    scale = min(1.0, THUMBNAIL / max(shown[0].size))
    width, height = (max(1, round(side * scale)) for side in shown[0].size)
    columns = math.ceil(math.sqrt(len(shown)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(shown) / columns) * height), "white")
    for i, image in enumerate(shown):
        row, column = divmod(i, columns)
        sheet.paste(image.resize((width, height)), (column * width, row * height))
    return sheet
