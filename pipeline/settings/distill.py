"""The options of `distill`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.models.levels import LEVELS
from pipeline.settings.training import TrainingSettings
from pipeline.system.errors import UserError
from pipeline.system.settings import REQUIRED, option
from shards.location import Location
from shards.readers import NAME

ORDERS = ("epochs", "rounds")
FEATURE_LOSSES = ("mse", "relative")


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainingSettings):
    """Train a student from a cache and save it as a complete diffusers pipeline."""

    command: ClassVar[str] = "distill"
    work_module: ClassVar[str] = "pipeline.commands.distill"
    has_plan: ClassVar[bool] = True

    cache: Location = option(REQUIRED, "Directory or address that `teacher-cache` wrote to.")
    rounds: int | None = option(
        None,
        "Train only on the first N rounds of the cache; later ones may still be unfinished. By default on all.",
        ge=1,
    )
    order: str = option(
        "epochs",
        "Order of the entries: epochs shuffles those of all rounds; rounds takes one round after another, each "
        "shuffled, as a cache of `teacher-cache --window` needs it.",
        choices=ORDERS,
    )
    reader: str | None = option(
        None,
        "Name of this training among the readers of a cache of `teacher-cache --window`; by default that of --out.",
    )
    level: str = option(REQUIRED, "The student's architecture and tap pairs.", choices=tuple(LEVELS))
    init_from: Path | None = option(
        None, "Saved student, or its pipeline, to start from; by default the cache's, filled from the teacher."
    )
    output_weight: float = option(0.5, "Weight of the loss against the teacher's prediction.", ge=0.0)
    feature_weight: float = option(0.5, "Weight of the sum of the taps' losses.", ge=0.0)
    feature_loss: str = option(
        "mse",
        "Loss per tap: mean square error, or its share of the teacher's mean square.",
        choices=FEATURE_LOSSES,
    )

    @property
    def entries(self) -> Location:
        return self.cache

    @property
    def by_rounds(self) -> bool:
        return self.order == "rounds"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reader is not None and not NAME.fullmatch(self.reader):
            raise UserError(
                f"--reader {self.reader!r:.80} is no name: use up to 64 letters, digits, dots, hyphens and "
                "underscores, with a letter or a digit first."
            )
