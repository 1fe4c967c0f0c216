"""Prompts from the command line and from text files."""

from __future__ import annotations

from pathlib import Path

from pipeline.system.errors import UserError


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises UserError if there are none or the file is not UTF-8."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}). Give a text file with one prompt per line."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8. Save it as a UTF-8 text file with one prompt per line.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{file} holds no prompts. Write one prompt per line.")
    return prompts


def gather_prompts(values: tuple[str, ...]) -> list[str]:
    """Expand the values of `--prompts`: the name of an existing file stands for the prompts in it.

    Raises UserError for a value that looks like the name of a text file and is none.
    """
    prompts: list[str] = []
    for value in values:
        # Longer values cannot be file names, and Path.is_file could raise an error for them.
        is_file = len(value) < 256 and Path(value).is_file()
        if not is_file and value.lower().endswith(".txt"):
            raise UserError(f"--prompts {value} is not a file. Correct the name, or end the prompt differently.")
        prompts += read_prompts(Path(value)) if is_file else [value]
    return prompts
