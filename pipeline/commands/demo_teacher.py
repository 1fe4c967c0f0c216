"""`distill-sd demo-teacher`: trains the bundled demo teacher again."""

from __future__ import annotations

import click
import diffusers

from pipeline.demo.evaluate import evaluate, table
from pipeline.demo.train import GUIDANCES, _claim, export, train_diffusion
from pipeline.demo.trainer import TeacherSettings
from pipeline.system.command import stage_command


def run(settings: TeacherSettings) -> None:
    """Train the bundled demo's teacher anew: hours on a CPU, and needed only to change it."""
    diffusers.utils.logging.set_verbosity_error()
    _claim(settings)
    teacher = train_diffusion(settings.work, settings)
    export(teacher, settings.out)
    click.echo(f"wrote {settings.out}")
    if settings.evaluate:
        click.echo(table(evaluate(teacher, settings.evaluate, GUIDANCES)))


def plan(settings: TeacherSettings) -> list[str]:
    """What `run` would do, in lines."""
    return [
        f"draw {settings.scenes} scenes and train in {settings.work}:",
        f"  autoencoder, {settings.autoencoder_steps} steps of {settings.autoencoder_batch} pictures",
        f"  text encoder and U-Net, {settings.steps} steps of {settings.batch} latents",
        f"write the pipeline to {settings.out}",
        f"judge {settings.evaluate} captions of each split at guidance {', '.join(f'{g:g}' for g in GUIDANCES)}",
    ]


command = stage_command("demo-teacher", TeacherSettings, plan, run)
