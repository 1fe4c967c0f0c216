"""Uploading a finished student to a model hub. The login is huggingface_hub's own; no token passes through here."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from pipeline.system.errors import FAILURES, UserError, first_line

try:
    from httpx import HTTPError
except ImportError:
    # huggingface_hub before 1.0 uses requests, whose errors are OSErrors.
    HTTPError = OSError  # type: ignore[misc, assignment]

# Files of the training rather than of the student. The settings name folders of this machine.
LEFT_OUT = ("checkpoints/*", "logs/*", "validation/*", ".*", "distill.json", "finetune.json")
# No network, no login, a name that is not one, an upload that broke off.
HUB_FAILURES = (HTTPError, *FAILURES)


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
    """Upload a student's folder and return the address of the commit. Raises UserError if that fails."""
    try:
        commit = HfApi().upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=list(LEFT_OUT), commit_message="A distilled student"
        )
    except HUB_FAILURES as error:
        raise UserError(
            f"{folder} is finished but was not uploaded ({first_line(error)}). Rerun the same command, "
            f"or run `hf upload {name} {folder}`."
        ) from None
    return str(commit)
