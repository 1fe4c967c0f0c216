"""Stage two, from Python and as `python -m`. The work is in pipeline/commands."""

from pipeline.settings.distill import DistillSettings
from pipeline.system.command import stage_command, work_of

__all__ = ["DistillSettings", "run"]

command = stage_command(DistillSettings)


def run(settings: DistillSettings) -> None:
    work_of(DistillSettings).run(settings)


if __name__ == "__main__":
    command()
