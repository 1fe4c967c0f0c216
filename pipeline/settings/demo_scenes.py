"""The options of `demo-scenes`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.system.settings import REQUIRED, Settings, option

SPLITS = ("train", "heldout")


@dataclass(frozen=True, kw_only=True)
class DemoScenesSettings(Settings):
    """Write captioned images of shapes, as an image folder with a metadata.jsonl."""

    command: ClassVar[str] = "demo-scenes"
    work_module: ClassVar[str] = "pipeline.commands.demo_scenes"

    out: Path = option(REQUIRED, "Folder to create.")
    count: int = option(2000, "Number of images.", ge=1)
    seed: int = option(0, "Seed for the scenes.", ge=0)
    split: str = option("train", "Which combinations of colour and shape to use.", choices=SPLITS)
