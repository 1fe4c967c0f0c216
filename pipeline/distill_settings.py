"""The settings of `distill`, and what of them decides the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.losses import FEATURE_LOSSES
from pipeline.models.families.sd import LEVELS
from pipeline.system.settings import REQUIRED, option
from pipeline.training.initial_student import weights_sha256s
from pipeline.training.settings import TrainingSettings, what_decides
from shards.manifest import read_manifest


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainingSettings):
    cache: Path = option(REQUIRED, "Directory that `teacher-cache` wrote.")
    rounds: int | None = option(
        None, "Train on the cache's first N rounds alone; later ones may still be being written. By default on all.",
        low=1,
    )  # fmt: skip
    level: str = option(REQUIRED, "The student's architecture and tap pairs.", choices=tuple(LEVELS))
    init_from: Path | None = option(
        None, "Saved student, or its pipeline, to train on; by default the cache's, filled from the teacher."
    )
    output_weight: float = option(0.5, "Weight of the loss to the teacher's prediction.", low=0.0)
    feature_weight: float = option(0.5, "Weight of the sum of the taps' losses.", low=0.0)
    feature_loss: str = option(
        "mse", "A tap's loss: mean square error, or that as a share of the teacher's mean square.",
        choices=tuple(FEATURE_LOSSES),
    )  # fmt: skip
    report: bool = option(True, "End with report.html: loss curves, pictures beside the teacher's, cost.")

    command = "distill"


def pairs_of(settings: DistillSettings) -> tuple[tuple[str, str], ...]:
    """(student tap, teacher tap) that the loss needs: none when features have no weight."""
    return LEVELS[settings.level].taps if settings.feature_weight else ()


def training_spec(settings: DistillSettings, processes: int) -> dict[str, Any]:
    """What the training is, for whoever would go on with it."""
    spec = what_decides(settings, processes, free=("cache", "report"))
    if settings.init_from is not None:
        spec["init_from"] = weights_sha256s(settings.init_from)
    manifest = read_manifest(settings.cache, "cache")
    return {"cache": manifest.spec_sha256, **spec, "rounds": settings.rounds or manifest.rounds}
