"""The output directory of a training: claiming it, and how far the training in it has come.

out/spec.json        what the training is
out/checkpoints/     see `checkpoint`
out/finished.json    the step of the saved result
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipeline.models.hub import open_repository
from pipeline.system.errors import UserError
from pipeline.system.settings import write_settings
from pipeline.training.checkpoint import list_checkpoints
from pipeline.training.settings import TrainingSettings
from shards.files import remove_leftovers, write_json
from shards.manifest import refuse_other_spec

SPEC, FINISHED, METRICS, CHECKPOINTS = "spec.json", "finished.json", "metrics.jsonl", "checkpoints"
LOGS, VALIDATION = "logs", "validation"


def claim(settings: TrainingSettings, spec: dict[str, Any]) -> None:
    """Take the output directory for the training that `spec` describes.

    Raises ShardError, with the difference, if it holds a checkpoint or a student of another training.
    """
    path = settings.out / SPEC
    if list_checkpoints(settings.out / CHECKPOINTS) or finished_step(settings.out):
        if not path.is_file():
            raise UserError(f"{settings.out} holds a training without its {SPEC}. Choose another output directory.")
        refuse_other_spec(settings.out, json.loads(path.read_text(encoding="utf-8")), spec)
        remove_leftovers(settings.out, settings.out / CHECKPOINTS)
        return
    settings.out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(settings.out, settings.out / CHECKPOINTS)
    write_json(path, spec)
    write_settings(settings.out, settings.command, settings)


def nothing_left(settings: TrainingSettings, accelerator: Accelerator, what: str, complete: bool = True) -> bool:
    """Whether there is nothing to do: `out` holds a finished and `complete` `what`, and nothing is to be uploaded.

    If so, it prints that. Otherwise it makes sure that the hub's repository can be written, before anything is trained.
    """
    done = finished_step(settings.out)
    if done >= (settings.max_train_steps or 0) and complete and not settings.push_to_hub:
        accelerator.print(
            f"already finished, nothing to do: {settings.out} holds a {what} of {done} steps. "
            "Raise --max-train-steps to train it further."
        )
        return True
    if settings.push_to_hub and accelerator.is_main_process:
        open_repository(settings.push_to_hub)
    accelerator.wait_for_everyone()
    return False


def finished_step(out: Path) -> int:
    """The step of the student that `out` holds as a pipeline; 0 if it holds none."""
    path = out / FINISHED
    return json.loads(path.read_text(encoding="utf-8"))["step"] if path.is_file() else 0


def checkpointed_step(out: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max([step for step, _ in list_checkpoints(out / CHECKPOINTS)], default=0)
