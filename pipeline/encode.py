"""Stage one, first half, from Python and as `python -m`. The work is in pipeline/commands."""

from pipeline.settings.encode import EncodeSettings
from pipeline.system.command import stage_command, work_of

__all__ = ["EncodeSettings", "run"]

command = stage_command(EncodeSettings)


def run(settings: EncodeSettings) -> None:
    work_of(EncodeSettings).run(settings)


if __name__ == "__main__":
    command()
