"""`distill-sd demo-scenes`: a folder of captioned scenes, to be encoded like anybody's pictures."""

import json
from pathlib import Path

import click

from pipeline.demo.scenes import SPLITS, caption_of, draw_facts, generator, write_folder


@click.command()
@click.option("--out", type=Path, required=True, help="Folder to make.")
@click.option("--count", type=click.IntRange(1), default=2000, show_default=True, help="Pictures.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the scenes.")
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Combinations to draw.")
def command(out: Path, count: int, seed: int, split: str) -> None:
    """Captioned pictures of shapes, as an image folder with a metadata.jsonl."""
    if not out.exists():
        write_folder(out, count, seed, split)
    elif not holds(out, count, seed, split):
        raise click.UsageError(
            f"--out {out} exists and holds other than scenes 0 to {count - 1} of seed {seed}, split {split}: "
            "choose another folder, or remove it"
        )
    click.echo(f"{out} holds {count} scenes")


def holds(folder: Path, count: int, seed: int, split: str) -> bool:
    """Whether the folder's captions are those of the scenes that would be written to it."""
    try:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        captions = [json.loads(line).get("text") for line in lines]
    except (OSError, ValueError):
        return False
    return captions == [caption_of(draw_facts(generator(seed, index, split), split)) for index in range(count)]
