"""Training checkpoints: a directory each, written under another name and renamed, so an existing one is complete.

checkpoints/step-0001000/unet/     what is trained, as the transform saves it
checkpoints/step-0001000/state.pt  the rest: optimizer, lr_scheduler, EMA, scaler, position, sums of the metrics

Damage shows when a checkpoint is read: unet/ has checksums, and state.pt, a zip file, has its own.
"""

from __future__ import annotations

import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.models.checksums import changed_files, write_checksums
from pipeline.system.disk import size_of
from pipeline.system.echo import say_wait
from pipeline.system.errors import UserError, first_line
from shards.files import atomic_directory, partial_name

NAME = re.compile(r"step-(\d{7,})")
WEIGHTS, STATE = "unet", "state.pt"
# The parts of a state and their types. Those of a training without EMA or a scaler are None.
PARTS: dict[str, tuple[type, ...]] = {
    "optimizer": (dict,),
    "lr_scheduler": (dict,),
    "ema": (dict, type(None)),
    "scaler": (dict, type(None)),
}
UNREADABLE = (
    *(OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, NotImplementedError),
)
Weights = TypeVar("Weights")


def save_checkpoint(
    checkpoints: Path, step: int, save_weights: Callable[[Path], None], state: dict[str, Any], total_limit: int
) -> Path:
    """Write a checkpoint, then delete the oldest ones beyond `total_limit`. `save_weights` fills its unet/."""
    path = checkpoints / f"step-{step:07d}"
    _remove(path)
    with atomic_directory(path) as folder:
        save_weights(folder / WEIGHTS)
        write_checksums(folder / WEIGHTS)
        with open(folder / STATE, "wb") as stream:
            torch.save(state, stream)
    keep_newest(checkpoints, total_limit)
    return path


def keep_newest(checkpoints: Path, total_limit: int) -> None:
    """Delete all checkpoints but the newest `total_limit`."""
    for _, old in list_checkpoints(checkpoints)[:-total_limit]:
        _remove(old)


def _remove(path: Path) -> None:
    """Delete a checkpoint, after renaming it, so that a crash leaves no partial one under its name."""
    if path.is_dir():
        doomed = partial_name(path)
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def list_checkpoints(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, path) of every complete checkpoint, oldest first."""
    found = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return sorted((int(match[1]), path) for path in found if (match := NAME.fullmatch(path.name)))


def load_checkpoint(path: Path, load_weights: Callable[[Path], Weights]) -> tuple[Weights, dict[str, Any]]:
    """What `load_weights` makes of unet/, and the rest of the state, on the CPU.

    Raises UserError for a checkpoint that cannot be read or is damaged.
    """
    with reading_checkpoint(path):
        say_wait(f"loading {path}", size_of(path.rglob("*")))
        changed = changed_files(path / WEIGHTS)
        if changed:
            raise ValueError(f"{WEIGHTS}/{changed[0]}")
        state = read_state(path / STATE)
        check_state(state, int(path.name.removeprefix("step-")))
        return load_weights(path / WEIGHTS), state


def read_state(path: Path) -> dict[str, Any]:
    """A state.pt, on the CPU. Raises ValueError if one of its parts does not match its checksum."""
    # torch does not look at them.
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"{path.name} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def check_state(state: Any, step: int) -> None:
    """Raise ValueError if a state is not one of a training after `step` steps."""
    if not isinstance(state, dict):
        raise ValueError(f"{STATE} holds a {type(state).__name__}")
    for name, kinds in PARTS.items():
        if not isinstance(state.get(name, "missing"), kinds):
            raise ValueError(f"{STATE} has no valid {name}")
    if type(state.get("step")) is not int or state["step"] != step:
        raise ValueError(f"{STATE} is of step {state.get('step')!r}")
    if type(state.get("position")) is not int or state["position"] < 0:
        raise ValueError(f"{STATE} has position {state.get('position')!r}")


@contextmanager
def reading_checkpoint(path: Path) -> Iterator[None]:
    """Raise UserError, with the remedy, for what goes wrong while a checkpoint is read and taken up."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        saved = [other for _, other in list_checkpoints(path.parent)]
        older = saved[: saved.index(path)] if path in saved else []
        remedy = f"resume from {older[-1].name}" if older else "start from the beginning; there is no older one"
        raise UserError(f"checkpoint {path} cannot be read ({first_line(error)}). Delete it to {remedy}.") from error
