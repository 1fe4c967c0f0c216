"""`distill-sd demo-scenes`: write a folder of captioned scenes, to be encoded like any other images."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pipeline.demo.scenes import SPLITS, caption_of, draw_facts, generator, write_folder
from pipeline.system.echo import say
from pipeline.system.errors import UserError
from pipeline.system.output import check_output


@click.command()
@click.option("--out", type=Path, required=True, help="Folder to create.")
@click.option("--count", type=click.IntRange(1), default=2000, show_default=True, help="Number of images.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed for the scenes.")
@click.option(
    "--split",
    type=click.Choice(SPLITS),
    default="train",
    show_default=True,
    help="Which combinations of colour and shape to use.",
)
def command(out: Path, count: int, seed: int, split: str) -> None:
    """Write captioned images of shapes, as an image folder with a metadata.jsonl."""
    if not holds(out, count, seed, split):
        if (out / "metadata.jsonl").is_file():
            raise click.UsageError(
                f"--out {out} already exists and does not hold scenes 0 to {count - 1} of seed {seed}, split {split}. "
                "Choose another folder or remove this one."
            )
        try:
            check_output(out, "demo-scenes", {})
        except UserError as error:
            raise click.UsageError(str(error)) from None
        write_folder(out, count, seed, split)
    say(f"{out} holds {count} scenes")


def holds(folder: Path, count: int, seed: int, split: str) -> bool:
    """Whether the folder has the captions of the scenes that would be written to it."""
    try:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        captions = [json.loads(line).get("text") for line in lines]
    except (OSError, ValueError):
        return False
    return captions == [caption_of(draw_facts(generator(seed, index, split), split)) for index in range(count)]
