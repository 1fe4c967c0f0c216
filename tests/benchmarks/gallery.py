"""The README's gallery: one row a model, one column a prompt, all columns with the same seeds.

python tests/benchmarks/gallery.py --out gallery.png --model demo --model work/demo/sd_small --model work/demo/sd_tiny

"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from PIL import Image

from pipeline.demo.evaluate import captions_of
from pipeline.models.load import find_pipeline, load_base, load_unet
from pipeline.sampling.generate import Sampler, generate

GAP = 4


def sheet(rows: list[list[Image.Image]], side: int) -> Image.Image:
    """Rows of images, each `side` pixels wide and high, on white."""
    columns = len(rows[0])
    page = Image.new("RGB", (columns * (side + GAP) - GAP, len(rows) * (side + GAP) - GAP), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            shown = image.resize((side, side), Image.Resampling.NEAREST)
            page.paste(shown, (column * (side + GAP), row * (side + GAP)))
    return page


@click.command()
@click.option("--model", "names", multiple=True, required=True, help="A pipeline, one row; may be repeated.")
@click.option("--prompts", default=8, show_default=True, help="Captions of scenes that no demo was trained on.")
@click.option("--guidance-scale", default=5.0, show_default=True)
@click.option("--side", default=96, show_default=True, help="Pixels of an image on the page.")
@click.option("--out", type=Path, required=True)
def main(names: tuple[str, ...], prompts: int, guidance_scale: float, side: int, out: Path) -> None:
    captions = captions_of("heldout", prompts)
    sampler = Sampler(guidance_scale=guidance_scale)
    rows = []
    for name in names:
        folder = find_pipeline(name, None, None, "--model")
        pipe = load_base(folder, unet=load_unet(folder, None).to(memory_format=torch.channels_last))
        rows.append(generate(pipe, captions, sampler, name).images)
    sheet(rows, side).save(out, optimize=True)
    for caption in captions:
        print(caption)


if __name__ == "__main__":
    main()
