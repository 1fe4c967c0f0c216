"""The pipelines that come with this package, by name."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.system.errors import UserError
from shards.files import file_sha256

TEACHER = Path(__file__).parent / "teacher"


CHECKSUMS = "checksums.json"


COMMAND = "distill-sd demo-teacher"


def teacher_folder(folder: Path = TEACHER) -> Path:
    """The folder of the bundled teacher, in diffusers layout, once each of its weights files is seen to be whole.

    `checksums.json` lists them: path within the folder -> sha256 in hexadecimal. Raises UserError, naming the
    file and the command that makes it again, if one is missing or is not what was written.
    """
    for name, expected in _checksums(folder).items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file} is missing; make it again with `{COMMAND}`, or restore it from the repository")
        if file_sha256(file) != expected:
            raise UserError(
                f"{file} is damaged: its sha256 is not the one in {CHECKSUMS}; "
                f"make it again with `{COMMAND}`, or restore it from the repository"
            )
    return folder


def _checksums(folder: Path) -> dict[str, str]:
    file = folder / CHECKSUMS
    try:
        checksums = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file} is missing: there is no demo teacher; make it with `{COMMAND}`") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); make it again with `{COMMAND}`") from None
    if not isinstance(checksums, dict) or not checksums:
        raise UserError(f"{file} lists no files; make it again with `{COMMAND}`")
    return checksums
