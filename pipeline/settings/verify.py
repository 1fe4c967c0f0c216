"""The options of `verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pipeline.system.errors import UserError
from pipeline.system.options import DeviceOptions, HubOptions
from pipeline.system.settings import REQUIRED, option
from shards.location import Location


@dataclass(frozen=True, kw_only=True)
class VerifySettings(DeviceOptions, HubOptions):
    """Check latents or a cache for damage. DIR is the directory or address that `encode` or `teacher-cache` wrote to.

    Prints every problem as one line with its remedy, then a summary. Exits with status 0 if there is none, else 2.
    """

    command: ClassVar[str] = "verify"
    work_module: ClassVar[str] = "pipeline.commands.verify"

    directory: Location = option(
        REQUIRED, "Directory or address that `encode` or `teacher-cache` wrote to.", argument=True
    )
    full: bool = option(False, "Read every byte: check all checksums and decode every member.")
    recompute: int | None = option(None, "Number of random entries to run the teacher on again.", ge=1)
    teacher: str | None = option(
        None, "The cache's teacher, for --recompute: a folder, a name on the hub, demo or demo-xl.", place=True
    )
    seed: int = option(0, "Seed for the entries of --recompute.", ge=0)
    remove_damaged: bool = option(False, "Delete damaged shards, so that the stage can write them again.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.recompute is None) != (self.teacher is None):
            raise UserError(
                "--recompute and --teacher go together. Pass the number of entries and the cache's teacher."
            )
