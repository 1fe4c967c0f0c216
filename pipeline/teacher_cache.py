"""Stage one, second half, from Python and as `python -m`. The work is in pipeline/commands."""

from pipeline.settings.teacher_cache import TeacherCacheSettings
from pipeline.system.command import stage_command, work_of

__all__ = ["TeacherCacheSettings", "run"]

command = stage_command(TeacherCacheSettings)


def run(settings: TeacherCacheSettings) -> None:
    work_of(TeacherCacheSettings).run(settings)


if __name__ == "__main__":
    command()
