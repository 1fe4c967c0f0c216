"""Prompts from the command line and from text files."""

from __future__ import annotations

from pathlib import Path

from pipeline.system.errors import UserError


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file, without the empty ones. Raises UserError if there are none, or it is no UTF-8."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a text file with one prompt a line") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8: save it as a UTF-8 text file with one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{file} holds no prompts: write one a line")
    return prompts


def gather_prompts(given: tuple[str, ...]) -> list[str]:
    """Each of `given` is a prompt, or a text file of prompts when there is a file of that name."""
    prompts: list[str] = []
    for each in given:
        # A name that is too long for a file is a prompt.
        is_file = len(each) < 256 and Path(each).is_file()
        prompts += read_prompts(Path(each)) if is_file else [each]
    return prompts
