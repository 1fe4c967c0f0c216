"""The options of `inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.system.settings import REQUIRED, Settings, option
from shards.location import Location


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    """Show the contents of latents or a cache. DIR is the directory or address that `encode` or `teacher-cache` wrote
    to."""

    command: ClassVar[str] = "inspect"
    work_module: ClassVar[str] = "pipeline.commands.inspect_shards"

    directory: Location = option(
        REQUIRED, "Directory or address that `encode` or `teacher-cache` wrote to.", argument=True
    )
    images: Path | None = option(None, "New folder for some images, decoded from the latents with the cache's VAE.")
