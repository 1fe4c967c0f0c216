"""The rule for every --out: a new directory, an empty one, or one that the same command made."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from pipeline.system.errors import UserError
from pipeline.system.text_files import read_text
from shards.location import WEB, Location, Url
from shards.manifest import STAGE_COMMANDS
from shards.schema import MANIFEST
from shards.store import open_store

MODEL_INDEX = "model_index.json"
# The bundled teachers, by which --teacher and the like mean no folder.
DEMOS = ("demo", "demo-xl")
MODEL_FLAGS = ("--teacher", "--student", "--model", "--init-from")
# A folder with one of these is a pipeline or a U-Net.
MODEL_MARKS = (MODEL_INDEX, "config.json", "unet")
# What a new disk and the systems that share one put into a directory.
LITTER = {"lost+found", "Thumbs.db", "desktop.ini"}
SHOWN = 3


def check_output(
    out: Path,
    command: str,
    inputs: Mapping[str, Location | str | None],
    *,
    own: bool = False,
    first: Collection[str] = (),
    flag: str = "--out",
) -> None:
    """Raise UserError unless `command` may write to `out`, which is the value of `flag`.

    `inputs` are the values of the options that it reads, by flag; none may lie in `out`, nor `out` in one of them.
    `own` says that `out` holds what the command made; `first` names the files that it writes before that can be told.
    """
    place = out.resolve()
    problem = path_problem(out, place) or overlaps(place, inputs)
    if not own:
        problem = problem or content_problem(place, command, first) or surroundings_problem(place)
    if problem:
        raise UserError(f"{flag} {out} {problem}")


def check_address(
    out: Url, command: str, inputs: Mapping[str, Location | str | None], *, first: Sequence[str] = ()
) -> None:
    """As `check_output`, for a set of shards that `command` is to write to an address. Only what lies directly there is
    looked at; `first` are patterns of names that `command` writes before its manifest."""
    if out.scheme in WEB:
        raise UserError(f"--out {out} is on a web server, which can only be read. Choose a bucket or a directory.")
    for flag, value in inputs.items():
        if isinstance(value, Url) and f"{out}/".startswith(f"{value}/"):
            raise UserError(f"--out {out} is {flag} {value}, or lies in it. Choose another one.")
        if isinstance(value, Url) and f"{value}/".startswith(f"{out}/"):
            raise UserError(f"--out {out} contains {flag} {value}. Choose another one.")
    store = open_store(out)
    found = sorted(name for name in store.list() if not name.startswith("."))
    if MANIFEST in found:
        try:
            content = json.loads(store.read(MANIFEST))
            writer = STAGE_COMMANDS[content["spec"]["stage"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            # The command says what is wrong with it.
            return
        if writer != command:
            what = f"holds the output of `{writer}`, which `{command}` did not write"
            raise UserError(f"--out {out} {what}. Choose a new or empty place.")
        return
    own = (f"{command}.json", *first)
    if others := [name for name in found if not any(fnmatch(name, pattern) for pattern in own)]:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        held = f"holds {', '.join(others[:SHOWN])}{more}, which `{command}` did not write"
        raise UserError(f"--out {out} {held}. Choose a new or empty place.")


def check_new(
    out: Path, command: str, inputs: Mapping[str, Location | str | None], *, file: bool = False, flag: str = "--out"
) -> None:
    """Raise UserError unless `command` may write `out`, which becomes a new or empty directory or a new `file`."""
    if out.exists() and (file or not out.is_dir() or names_in(out)):
        remedy = "another name or delete it" if file else "another folder or delete this one"
        raise UserError(f"{flag} {out} already exists. Choose {remedy}.")
    if not file:
        check_output(out, command, inputs, flag=flag)
    # Next to a file there may be anything, but nobody's output is a place for it.
    elif problem := overlaps(out.resolve(), inputs) or surroundings_problem(out.resolve()):
        raise UserError(f"{flag} {out} {problem}")


def path_problem(out: Path, place: Path) -> str | None:
    """Why `out`, which resolves to `place`, is no directory and cannot become one; None if it can."""
    if out.is_symlink() and not place.exists():
        return f"is a link to {place}, which does not exist. Create that directory, or choose another one."
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if nearest.is_dir():
        return None
    where = "is" if nearest == place else f"lies in {nearest}, which is"
    return f"{where} not a directory. Choose another one."


def overlaps(place: Path, inputs: Mapping[str, Location | str | None]) -> str | None:
    """The first `overlap` with an input; None if there is none."""
    return next((problem for flag, value in inputs.items() if (problem := overlap(place, flag, value))), None)


def overlap(place: Path, flag: str, value: Location | str | None) -> str | None:
    """How an input is the output, lies in it, or around it; None if it does not.

    Only directories count, and of those that are named as a model only those that hold one.
    """
    if value is None or isinstance(value, Url) or not Path(value).is_dir():
        return None
    is_model = value not in DEMOS and any((Path(value) / name).exists() for name in MODEL_MARKS)
    if flag in MODEL_FLAGS and not is_model:
        return None
    source = Path(value).resolve()
    if source == place:
        return f"is the same directory as {flag}. Choose another one."
    if place.is_relative_to(source):
        return f"lies in {flag} {value}. Choose a place outside of it."
    return f"contains {flag} {value}. Choose another one." if source.is_relative_to(place) else None


def content_problem(place: Path, command: str, first: Collection[str]) -> str | None:
    """What a directory holds besides the files named `first`; None if that is nothing."""
    found = sorted(names_in(place) - set(first))
    if not found:
        return None
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    held = description(place) or ", ".join(found[:SHOWN]) + more
    return f"holds {held}, which `{command}` did not write. Choose a new or empty directory."


def surroundings_problem(place: Path) -> str | None:
    """Inside of what a directory lies; None if nothing is known of the directories above it."""
    for parent in place.parents:
        if what := description(parent):
            return f"lies in {parent}, which holds {what}. Choose a place outside of it."
    return None


def names_in(directory: Path) -> set[str]:
    """The names in a directory that somebody put there; empty if there is no such directory. Hidden names, such as
    locks and partial files, do not count."""
    if not directory.is_dir():
        return set()
    return {path.name for path in directory.iterdir() if not path.name.startswith(".")} - LITTER


def description(directory: Path) -> str | None:
    """What a directory holds, if it is something that a command reads or writes: `a pipeline (model_index.json)`."""
    command = writer_of(directory)
    if command:
        return f"the output of `{command}`"
    known = {MODEL_INDEX: "a pipeline", "metadata.jsonl": "images with captions"}
    return next((f"{what} ({name})" for name, what in known.items() if (directory / name).is_file()), None)


def writer_of(directory: Path) -> str | None:
    """The command that made a directory, by the file that it writes first; None if that cannot be told."""
    spec = _json(directory / MANIFEST).get("spec")
    if isinstance(spec, dict) and spec.get("stage") in STAGE_COMMANDS:
        return STAGE_COMMANDS[spec["stage"]]
    training = _json(directory / "spec.json")
    if {"seed", "learning_rate"} <= training.keys():
        return "distill" if "cache" in training else "finetune"
    if "student" in _json(directory / "evaluate.json"):
        return "evaluate"
    if "urls_sha256" in _json(directory / "list" / "spec.json"):
        return "download"
    return None


def made_by(directory: Path, command: str, mark: str) -> bool:
    """Whether a directory is the `command`'s own: it has its `mark` or its settings, and no other command's.

    A mark that cannot be read counts, since the command tells what is wrong with it when it reads it.
    """
    marked = any((directory / name).is_file() for name in (mark, f"{command}.json"))
    return marked and writer_of(directory) in (command, None)


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
