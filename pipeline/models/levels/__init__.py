"""The levels of all families, by their names, which are unique. They import no torch, for the commands' options."""

from pipeline.models.levels import sd, sdxl
from pipeline.models.levels.level import Level

__all__ = ["LEVELS", "Level"]

LEVELS: dict[str, Level] = {**sd.LEVELS, **sdxl.LEVELS}
