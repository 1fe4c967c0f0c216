"""The output directory of a training: claiming it, and how far the training in it has come.

out/spec.json        what the training is
out/checkpoints/     see `checkpoint`
out/finished.json    the step of the saved result, and the sha256 of its files
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from pipeline.models.checksums import hashed
from pipeline.models.hub import open_repository
from pipeline.models.load import MODEL_INDEX
from pipeline.settings.training import TrainingSettings
from pipeline.system.disk import require_space, size_of
from pipeline.system.echo import plural
from pipeline.system.errors import UserError
from pipeline.system.json_files import read_json
from pipeline.system.lock import OutputLock
from pipeline.system.output import check_output, made_by
from pipeline.system.page import REPORT
from pipeline.system.settings import write_settings
from pipeline.training.checkpoint import list_checkpoints
from shards.files import remove_leftovers, write_json
from shards.location import Location
from shards.manifest import refuse_other_spec

SPEC, FINISHED, METRICS, CHECKPOINTS = "spec.json", "finished.json", "metrics.jsonl", "checkpoints"
LOGS, VALIDATION = "logs", "validation"
SPEC_REMEDY = "Restore it from a backup, or choose another output directory."
FINISHED_REMEDY = "Delete it, and rerun the same command: the student is saved again from the last checkpoint."


def check_out(settings: TrainingSettings, inputs: dict[str, Location | str | None]) -> None:
    """Raise UserError unless --out is new, empty, or holds a training by the same command; `inputs` by flag."""
    check_output(settings.out, settings.command, inputs, own=made_by(settings.out, settings.command, SPEC))


def claim(settings: TrainingSettings, spec: dict[str, Any], lock: OutputLock) -> None:
    """Take the output directory, in which no other process writes from now on, for the training that `spec` describes.

    Raises ShardError, with the difference, if it holds a checkpoint or a student of another training, and UserError if
    another process writes there.
    """
    path = settings.out / SPEC
    lock.take()
    if list_checkpoints(settings.out / CHECKPOINTS) or finished_step(settings.out):
        if not path.is_file():
            raise UserError(f"{settings.out} holds a training without its {SPEC}. Choose another output directory.")
        refuse_other_spec(settings.out, read_json(path, SPEC_REMEDY), spec)
    else:
        write_json(path, spec)
    remove_leftovers(settings.out, settings.out / CHECKPOINTS)
    # Those of the result stay with it where there is nothing to train.
    if finished_step(settings.out) < (settings.max_train_steps or 0):
        write_settings(settings.out, settings.command, settings)


def existing_spec(out: Path) -> dict[str, Any]:
    """What the training in `out` is; empty if there is none yet. Raises UserError for a file that was damaged."""
    path = out / SPEC
    held = path.is_file() and (list_checkpoints(out / CHECKPOINTS) or finished_step(out))
    return read_json(path, SPEC_REMEDY) if held else {}


def nothing_left(settings: TrainingSettings, accelerator: Accelerator, what: str, complete: bool = True) -> bool:
    """Whether there is nothing to do: `out` holds a finished and `complete` `what`, and nothing is to be uploaded.

    If so, it prints that. Otherwise it makes sure that the hub's repository can be written, before anything is trained.
    """
    done = finished_step(settings.out)
    if done >= (settings.max_train_steps or 0) and complete and not settings.push_to_hub:
        accelerator.print(
            f"already finished, nothing to do: {settings.out} holds a {what} of {plural(done, 'step')}. "
            "Raise --max-train-steps to train it further."
        )
        return True
    if settings.push_to_hub and accelerator.is_main_process:
        open_repository(settings.push_to_hub)
    accelerator.wait_for_everyone()
    return False


def require_room(settings: TrainingSettings, student: nn.Module, base: Path, averaged: bool) -> None:
    """Raise UserError, before the first step, if the checkpoints and the result do not fit on the disk.

    A checkpoint has the trained weights, their two moments, and their average if it is `averaged`, in float32. One more
    is there than is kept, until the oldest is deleted. The result is the `base` pipeline with the student, or adapters.
    """
    if list_checkpoints(settings.out / CHECKPOINTS):
        return
    total = sum(parameter.numel() for parameter in student.parameters())
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    written = math.ceil((settings.max_train_steps or 0) / settings.checkpointing_steps)
    checkpoints = min(settings.checkpoints_total_limit + 1, written) * trained * (4 if averaged else 3)
    others = size_of(file for part in base.iterdir() if part.name != "unet" for file in part.rglob("*"))
    result = 4 * total + others if trained == total else 4 * trained
    require_space(settings.out, 4 * checkpoints + result, "use a lower --checkpoints-total-limit")


def has_extras(settings: TrainingSettings) -> bool:
    """Whether what is asked for besides the finished weights is there."""
    has_variant = any((settings.out / "unet").glob("*.fp16.safetensors"))
    return (not settings.report or (settings.out / REPORT).is_file()) and (not settings.fp16_variant or has_variant)


def finished_step(out: Path) -> int:
    """The step of the student that `out` holds as a pipeline; 0 if it holds none.

    Raises UserError for a file that was damaged.
    """
    path = out / FINISHED
    if not path.is_file():
        return 0
    step = read_json(path, FINISHED_REMEDY).get("step")
    if type(step) is not int or step < 0:
        raise UserError(f"{path} states the step {step!r}. {FINISHED_REMEDY}")
    return step


def checkpointed_step(out: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max([step for step, _ in list_checkpoints(out / CHECKPOINTS)], default=0)


def hashes_of_result(out: Path) -> dict[str, str]:
    """The sha256 of each file of the result, by its path in `out`: a pipeline's parts and their list, or LoRA's."""
    index = out / MODEL_INDEX
    parts = [out / name for name in read_json(index, FINISHED_REMEDY)] if index.is_file() else []
    files = [index, *out.glob("*.safetensors"), *(file for part in parts for file in part.glob("*"))]
    return {file.relative_to(out).as_posix(): hashed(file) for file in sorted(files) if file.is_file()}


def refuse_damaged_result(out: Path) -> None:
    """Raise UserError if files of a finished result are not what was saved. Earlier versions kept the checksums of the
    weights alone, or none."""
    path = out / FINISHED
    if not path.is_file():
        return
    saved = read_json(path, FINISHED_REMEDY).get("sha256", {})
    for name, sha256 in saved.items():
        is_there = (out / name).is_file()
        if not is_there or hashed(out / name) != sha256:
            raise UserError(
                f"{out / name} {'was changed' if is_there else 'is missing'}, though the training is finished. "
                f"Delete {path} and rerun the same command: the last checkpoint is saved again."
            )
