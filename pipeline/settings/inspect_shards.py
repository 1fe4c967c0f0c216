"""The options of `inspect`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.system.settings import REQUIRED, Settings, option


@dataclass(frozen=True, kw_only=True)
class InspectSettings(Settings):
    """Show the contents of latents or a cache. DIR is a directory that `encode` or `teacher-cache` wrote."""

    command: ClassVar[str] = "inspect"
    work_module: ClassVar[str] = "pipeline.commands.inspect_shards"

    directory: Path = option(REQUIRED, "Directory that `encode` or `teacher-cache` wrote.", argument=True)
    images: Path | None = option(None, "New folder for some images, decoded from the latents with the cache's VAE.")
