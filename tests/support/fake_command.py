"""A command whose work is a function of a test."""

import sys
from types import ModuleType

import click

from pipeline.system.command import stage_command
from pipeline.system.settings import Settings


def command_doing(run, plan=None, settings: type[Settings] = Settings) -> click.Command:
    """The command of these settings, with `run` and `plan` in place of its work."""
    work = ModuleType("support.work")
    work.run, work.plan = run, plan
    sys.modules[work.__name__] = work
    name = getattr(settings, "command", "fail")
    own = {"command": name, "work_module": work.__name__, "has_plan": plan is not None, "__doc__": settings.__doc__}
    return stage_command(type(settings.__name__, (settings,), own))
