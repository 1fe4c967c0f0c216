"""Uploading a finished student to a model hub. The login is huggingface_hub's own; no token passes through here."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from pipeline.models.load import MODEL_INDEX
from pipeline.models.save import write_fp16_variant
from pipeline.system.errors import FAILURES, UserError, first_line
from pipeline.system.names import public_name
from shards.files import write_json

# Files of the training rather than of the student. The settings name folders of this machine.
LEFT_OUT = ("checkpoints/*", "logs/*", "validation/*", ".*", "distill.json", "finetune.json")
# No network, no login, a name that is not one, an upload that broke off. HTTPError is of the library that
# huggingface_hub uses, which changes with its versions.
HUB_FAILURES = (HTTPError, *FAILURES)
# Where diffusers says in a config what it was loaded from.
ORIGIN_KEY = "_name_or_path"


def open_repository(name: str) -> None:
    """Make sure that the repository exists and is writable, before training starts. Raises UserError."""
    try:
        HfApi().create_repo(name, exist_ok=True, private=True)
    except HUB_FAILURES as error:
        raise UserError(
            f"--push-to-hub {name} cannot be written ({first_line(error)}). Give owner/name, log in with "
            "`hf auth login`, or leave the option out."
        ) from None


def upload(folder: Path, name: str) -> str:
    """Upload a student's folder, with its weights in fp16 too, and return the address of the commit.

    Raises UserError if that fails.
    """
    try:
        with TemporaryDirectory() as temporary:
            link_without_paths(folder, Path(temporary))
            if (folder / MODEL_INDEX).is_file():
                write_fp16_variant(folder, Path(temporary))
            commit = HfApi().upload_folder(
                repo_id=name,
                folder_path=Path(temporary),
                ignore_patterns=list(LEFT_OUT),
                commit_message="A distilled student",
            )
    except HUB_FAILURES as error:
        raise UserError(
            f"{folder} is finished but was not uploaded ({first_line(error)}). Rerun the same command to upload it."
        ) from None
    return str(commit)


def link_without_paths(folder: Path, out: Path) -> None:
    """Link the files of `folder` in `out`. Configs that name a folder of this machine become copies that do not.

    diffusers writes there where a part was loaded from.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        link = out / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        config = _read_config(file) if file.suffix == ".json" else None
        if config is None:
            link.symlink_to(file.resolve())
        else:
            write_json(link, config, indent=2)


def _read_config(file: Path) -> dict[str, Any] | None:
    """A config that names where it was loaded from, with the last part of that if it is a path; otherwise None."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    origin = config.get(ORIGIN_KEY) if isinstance(config, dict) else None
    if not isinstance(origin, str) or public_name(origin) == origin:
        return None
    return {**config, ORIGIN_KEY: public_name(origin)}
