"""The options of `drop-reader`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.system.settings import REQUIRED, Settings, option
from shards.location import Location


@dataclass(frozen=True, kw_only=True)
class DropReaderSettings(Settings):
    """Drop a training that died for good from the readers of a rolling cache. `teacher-cache --window` waits for it no
    more and deletes what all others have passed."""

    command: ClassVar[str] = "drop-reader"
    work_module: ClassVar[str] = "pipeline.commands.drop_reader"

    cache: Location = option(REQUIRED, "Directory or address that `teacher-cache --window` writes to.")
    name: str = option(REQUIRED, "Name of the reader, as `inspect` shows it.")
