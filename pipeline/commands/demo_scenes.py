"""`distill-sd demo-scenes`: write a folder of captioned scenes, to be encoded like any other images."""

from __future__ import annotations

from pathlib import Path

from pipeline.demo.scenes import caption_of, draw_facts, generator, write_folder
from pipeline.settings.demo_scenes import DemoScenesSettings
from pipeline.system.echo import plural, say
from pipeline.system.errors import UserError
from pipeline.system.jsonl import read_jsonl
from pipeline.system.output import check_output

LIST = "metadata.jsonl"


def run(settings: DemoScenesSettings) -> None:
    """Write the scenes, unless the folder holds them. Raises UserError if it holds anything else."""
    out, count, seed, split = settings.out, settings.count, settings.seed, settings.split
    found = captions_in(out)
    wanted = [caption_of(draw_facts(generator(seed, index, split), split)) for index in range(count)]
    if found is None:
        check_output(out, "demo-scenes", {})
        write_folder(out, count, seed, split)
    elif found != wanted:
        shorter = min(len(found), count)
        what = (
            f"holds {plural(len(found), 'scene')}, but --count is {count}. To use them, give --count {len(found)} "
            f"(SCENES={len(found)} with make)"
            if found and found[:shorter] == wanted[:shorter]
            else f"holds other images than the scenes of --seed {seed} and --split {split}. To use them, give the seed "
            "and the split that they were made with"
        )
        raise UserError(f"--out {out} {what}. To have others written, delete the folder or choose another one.")
    say(f"{out} holds {plural(count, 'scene')}")


def captions_in(folder: Path) -> list[str] | None:
    """The captions of a folder of scenes; None if it has no list of images."""
    path = folder / LIST
    return [str(line.get("text")) for line in read_jsonl(path)] if path.is_file() else None
