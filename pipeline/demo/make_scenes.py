"""`distill-sd demo-scenes`: a folder of captioned scenes, to be encoded like anybody's pictures."""

from pathlib import Path

import click

from pipeline.demo.scenes import SPLITS, write_folder


@click.command()
@click.option("--out", type=Path, required=True, help="Folder to make.")
@click.option("--count", type=click.IntRange(1), default=2000, show_default=True, help="Pictures.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the scenes.")
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Combinations to draw.")
def command(out: Path, count: int, seed: int, split: str) -> None:
    """Captioned pictures of shapes, as an image folder with a metadata.jsonl."""
    if out.exists():
        raise click.UsageError(f"--out {out} exists already: choose another folder, or remove it")
    write_folder(out, count, seed, split)
    click.echo(f"{out} holds {count} scenes")
