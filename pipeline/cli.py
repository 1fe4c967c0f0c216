"""`distill-sd`: all commands under one name."""

from __future__ import annotations

import difflib

import click

from pipeline.settings.demo_scenes import DemoScenesSettings
from pipeline.settings.demo_teacher import DemoTeacherSettings
from pipeline.settings.distill import DistillSettings
from pipeline.settings.download import DownloadSettings
from pipeline.settings.drop_reader import DropReaderSettings
from pipeline.settings.encode import EncodeSettings
from pipeline.settings.evaluate import EvaluateSettings
from pipeline.settings.export import ExportSettings
from pipeline.settings.finetune import FinetuneSettings
from pipeline.settings.inspect_shards import InspectSettings
from pipeline.settings.plan import PlanSettings
from pipeline.settings.sample import SampleSettings
from pipeline.settings.teacher_cache import TeacherCacheSettings
from pipeline.settings.verify import VerifySettings
from pipeline.system.command import stage_command
from pipeline.system.settings import Settings

# In the order of use.
COMMANDS: tuple[type[Settings], ...] = (
    PlanSettings,
    DownloadSettings,
    EncodeSettings,
    TeacherCacheSettings,
    DistillSettings,
    FinetuneSettings,
    SampleSettings,
    EvaluateSettings,
    ExportSettings,
    VerifySettings,
    InspectSettings,
    DropReaderSettings,
    DemoScenesSettings,
    DemoTeacherSettings,
)


class Commands(click.Group):
    """Lists the commands in the order in which they were added, and suggests the nearest to a mistyped one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        close = difflib.get_close_matches(args[0], self.commands, n=1)
        if args[0] not in self.commands and close:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {close[0]!r}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Each with the first sentence of its help, at full length."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, (command.help or "").split(". ")[0]) for name, command in self.commands.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="distill-sd")
def main() -> None:
    """Distil Stable Diffusion U-Nets into small, fast students, offline.

    The three stages, in order: encode, teacher-cache, distill. Rerun the same command to resume a stage
    where it stopped.
    """


for _settings in COMMANDS:
    main.add_command(stage_command(_settings))

if __name__ == "__main__":
    main()
