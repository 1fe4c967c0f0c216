"""Handing a finished student to a model hub. The login is the one that huggingface_hub has; no token passes here."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from pipeline.system.errors import UserError

# What belongs to the training and not to the student.
LEFT_OUT = ("checkpoints/*", "logs/*", "validation/*", ".*")


def open_repository(name: str) -> None:
    """Make sure that the repository is there and may be written, before anything is trained. Raises UserError."""
    try:
        HfApi().create_repo(name, exist_ok=True, private=True)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"--push-to-hub {name} cannot be written ({reason}): give owner/name, log in with `hf auth login`, "
            "or leave the option out"
        ) from None


def upload(folder: Path, name: str) -> str:
    """Upload a student's folder; returns the address of the commit. Raises UserError if that fails."""
    try:
        done = HfApi().upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=list(LEFT_OUT), commit_message="A distilled student"
        )
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{folder} is finished, but was not uploaded ({reason}): run the same command again, "
            f"or `hf upload {name} {folder}`"
        ) from None
    return str(done)
