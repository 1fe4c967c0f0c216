"""`distill-sd demo-teacher`: retrain the bundled demo teacher."""

from __future__ import annotations

from pathlib import Path

import diffusers

from pipeline.demo.evaluate import evaluate, table
from pipeline.demo.teachers import TEACHERS
from pipeline.demo.train import GUIDANCES, claim_work_folder, export, is_exported, train_diffusion
from pipeline.models.bundled import BUNDLED
from pipeline.settings.demo_teacher import DemoTeacherSettings
from pipeline.system.echo import say
from pipeline.system.lock import OutputLock
from pipeline.system.output import check_output


def run(settings: DemoTeacherSettings) -> None:
    """Retrain one of the demo's bundled teachers. This takes hours on a CPU and is needed only to change it."""
    diffusers.utils.logging.set_verbosity_error()
    out = out_of(settings)
    check_output(out, "demo-teacher", {"--init-from": settings.init_from}, own=is_exported(out))
    with OutputLock(settings.work) as lock:
        lock.take()
        claim_work_folder(settings)
        teacher = train_diffusion(settings.work, TEACHERS[settings.name], settings)
        export(teacher, out)
    say(f"wrote {out}")
    if settings.evaluate:
        say(table(evaluate(teacher, settings.evaluate, GUIDANCES)))


def out_of(settings: DemoTeacherSettings) -> Path:
    return settings.out or BUNDLED[settings.name]


def plan(settings: DemoTeacherSettings) -> list[str]:
    """The lines that describe what `run` would do."""
    return [
        f"render {settings.scenes} scenes and train in {settings.work}:",
        f"  autoencoder, {settings.autoencoder_steps} steps of {settings.autoencoder_batch} images",
        f"  text encoder, {settings.text_steps} steps of {settings.text_batch} captions",
        f"  U-Net, {settings.steps} steps of {settings.batch} latents",
        f"write the pipeline to {out_of(settings)}",
        f"judge images of {settings.evaluate} captions per split at guidance {', '.join(f'{g:g}' for g in GUIDANCES)}",
    ]
