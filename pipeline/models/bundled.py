"""The pipelines that ship with this package, by name."""

from __future__ import annotations

from pathlib import Path

from pipeline.models.checksums import CHECKSUMS, changed_files, has_checksums
from pipeline.system.errors import UserError
from pipeline.system.output import DEMOS

DEMO = Path(__file__).parents[1] / "demo"
TEACHER, TEACHER_XL = DEMO / "teacher", DEMO / "teacher_xl"
BUNDLED = dict(zip(DEMOS, (TEACHER, TEACHER_XL), strict=True))
COMMAND = "distill-sd demo-teacher"


def teacher_folder(folder: Path = TEACHER) -> Path:
    """The folder of a bundled teacher, in diffusers layout, after checking its weights against their checksums.

    Raises UserError if a file is missing or differs from what was written. It names the file and the command that
    regenerates it.
    """
    command = f"{COMMAND} --name demo-xl" if folder == TEACHER_XL else COMMAND
    if not has_checksums(folder):
        raise UserError(f"{folder / CHECKSUMS} is missing, so there is no demo teacher. Make one with `{command}`.")
    problems = changed_files(folder)
    if problems:
        raise UserError(
            f"the demo teacher in {folder} is damaged: {problems[0]}. "
            f"Restore it from the repository or regenerate it with `{command}`."
        )
    return folder
