"""Training checkpoints: a directory each, written under another name and renamed, so an existing one is complete.

checkpoints/step-0001000/unet/     what is trained, as the transform saves it
checkpoints/step-0001000/state.pt  the rest: optimizer, lr_scheduler, EMA, scaler, position
"""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from pipeline.system.errors import UserError, first_line
from shards.files import atomic_directory, partial_name

NAME = re.compile(r"step-(\d{7,})")
Weights = TypeVar("Weights")


def save_checkpoint(
    checkpoints: Path, step: int, save_weights: Callable[[Path], None], state: dict[str, Any], total_limit: int
) -> Path:
    """Write a checkpoint, then delete the oldest ones beyond `total_limit`. `save_weights` fills its unet/."""
    path = checkpoints / f"step-{step:07d}"
    _remove(path)
    with atomic_directory(path) as folder:
        save_weights(folder / "unet")
        with open(folder / "state.pt", "wb") as stream:
            torch.save(state, stream)
    for _, old in list_checkpoints(checkpoints)[:-total_limit]:
        _remove(old)
    return path


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

    Raises UserError for a checkpoint that cannot be read.
    """
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return load_weights(path / "unet"), state
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({first_line(error)}). Delete it to resume from an older one."
        ) from error
