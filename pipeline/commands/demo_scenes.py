"""`distill-sd demo-scenes`: write a folder of captioned scenes, to be encoded like any other images."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.demo.scenes import caption_of, draw_facts, generator, write_folder
from pipeline.settings.demo_scenes import DemoScenesSettings
from pipeline.system.echo import say
from pipeline.system.errors import UserError
from pipeline.system.output import check_output

LIST = "metadata.jsonl"


def run(settings: DemoScenesSettings) -> None:
    """Write the scenes, unless the folder holds them."""
    out = settings.out
    if not holds(out, settings):
        if (out / LIST).is_file():
            raise UserError(
                f"--out {out} already exists and does not hold scenes 0 to {settings.count - 1} of seed "
                f"{settings.seed}, split {settings.split}. Choose another folder or remove this one."
            )
        check_output(out, "demo-scenes", {})
        write_folder(out, settings.count, settings.seed, settings.split)
    say(f"{out} holds {settings.count} scenes")


def holds(folder: Path, settings: DemoScenesSettings) -> bool:
    """Whether the folder has the captions of the scenes that would be written to it."""
    try:
        lines = (folder / LIST).read_text(encoding="utf-8").splitlines()
        captions = [json.loads(line).get("text") for line in lines]
    except (OSError, ValueError):
        return False
    split, seed = settings.split, settings.seed
    wanted = (caption_of(draw_facts(generator(seed, i, split), split)) for i in range(settings.count))
    return captions == list(wanted)
