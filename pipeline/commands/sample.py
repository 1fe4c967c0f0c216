"""`distill-sd sample`: generates images and a contact sheet with a pipeline, the teacher's or a student's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from pipeline.models.load import find_pipeline, load_scheduler, refuse_special_files
from pipeline.sampling.engines import load_graphs, refuse_no_graphs, refuse_size
from pipeline.sampling.generate import Sampler, check_sampler, generate, save_images
from pipeline.sampling.process import PipelineRef, load_pipeline
from pipeline.settings.sample import SampleSettings
from pipeline.system.device import DTYPES, process_state, resolve_dtype
from pipeline.system.echo import plural, say
from pipeline.system.output import check_new
from pipeline.system.prompts import gather_prompts

SHEET = "sheet.png"
# The most images that a contact sheet shows, and their longer side on it.
SHOWN, THUMBNAIL = 64, 256
# Of the prompts on it, in pixels: the font's size, and the least width. GAP is between the images.
CAPTION_SIZE, LINE_HEIGHT, CAPTION_LINES, CAPTION_WIDTH, GAP = 12, 14, 3, 128, 8


def run(settings: SampleSettings) -> None:
    """Generate an image for each prompt, and a contact sheet."""
    prompts = gather_prompts(settings.prompts)
    check_new(settings.out, "sample", {"--model": settings.model})
    folder = find_model(settings)
    sampler = Sampler(
        settings.num_inference_steps,
        settings.guidance_scale,
        settings.batch_size,
        settings.scheduler,
        settings.negative_prompt,
        size_of(settings),
        settings.seed,
    )
    check_sampler(load_scheduler(folder), sampler, f"--model {settings.model}")
    pipe = load(settings, folder)
    samples = generate(pipe, prompts, sampler, "sample")
    if settings.engine != "torch":
        device = f"{samples.device}, {settings.engine}"
        samples = replace(samples, device=device, parameters=pipe.unet.num_parameters())
    save_images(samples, sampler, settings.out)
    contact_sheet(samples.images, samples.prompts).save(settings.out / SHEET)
    written = f"{plural(len(prompts), 'image')} and {SHEET} to {settings.out}"
    say(f"Wrote {written}, {samples.seconds:.2f} seconds per image.")


def size_of(settings: SampleSettings) -> tuple[int, int] | None:
    return (settings.height, settings.width) if settings.height and settings.width else None


def find_model(settings: SampleSettings) -> Path:
    """The folder of the pipeline, or with another engine than torch that of its graphs."""
    if settings.engine == "torch":
        return find_pipeline(settings.model, settings.revision, settings.variant, "--model")
    folder = Path(settings.model)
    refuse_no_graphs(folder)
    refuse_special_files(folder, f"--model {settings.model}")
    return folder


def load(settings: SampleSettings, folder: Path) -> DiffusionPipeline:
    if settings.engine != "torch":
        pipe = load_graphs(folder, settings.engine)
        refuse_size(pipe, size_of(settings), f"--model {settings.model}")
        return pipe
    device = process_state(settings.device).device
    dtype = DTYPES[resolve_dtype(settings.dtype, device)]
    return load_pipeline(PipelineRef(folder, folder / "unet", device, dtype, settings.variant, settings.variant))


def contact_sheet(images: list[Image.Image], prompts: list[str]) -> Image.Image:
    """The first SHOWN images, all of the same size, each above its prompt, arranged in a rough square."""
    shown = images[:SHOWN]
    scale = min(1.0, THUMBNAIL / max(shown[0].size))
    width, height = (max(1, round(side * scale)) for side in shown[0].size)
    image_size = width, height
    # Small images still have room for some words.
    width = max(width, CAPTION_WIDTH)
    columns = math.ceil(math.sqrt(len(shown)))
    font = ImageFont.load_default(CAPTION_SIZE)
    row_height = height + CAPTION_LINES * LINE_HEIGHT + GAP
    sheet = Image.new("RGB", (columns * (width + GAP), math.ceil(len(shown) / columns) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, prompt) in enumerate(zip(shown, prompts, strict=False)):
        row, column = divmod(i, columns)
        left, top = column * (width + GAP), row * row_height
        sheet.paste(image.resize(image_size), (left, top))
        for number, line in enumerate(caption_lines(prompt, font, width)):
            draw.text((left, top + height + number * LINE_HEIGHT), line, "black", font)
    return sheet


def caption_lines(prompt: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The prompt in at most CAPTION_LINES lines that are no wider than `width` pixels; an ellipsis where it is cut."""
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], f"{lines[CAPTION_LINES - 1]} ..."]
    return [cut(line, font, width) for line in lines]


def cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The line, or as much of it as is no wider than `width` pixels, with an ellipsis."""
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" ...")
    while line and font.getlength(f"{line} ...") > width:
        line = line[:-1]
    return f"{line} ..."
