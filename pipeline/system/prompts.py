"""Prompts from the command line and from text files."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.system.errors import UserError
from pipeline.system.text_files import lines_in, read_text


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises UserError if there are none or the file is not UTF-8."""
    try:
        prompts = lines_in(read_text(file))
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}). Give a text file with one prompt per line."
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8. Save it as a UTF-8 text file with one prompt per line.") from None
    if not prompts:
        raise UserError(f"{file} holds no prompts. Write one prompt per line.")
    return prompts


def gather_prompts(values: tuple[str, ...]) -> list[str]:
    """Expand the values of `--prompts`: the name of an existing file stands for the prompts in it.

    Raises UserError for a value that looks like the name of a text file and is none, and for the name of something else
    than a file.
    """
    prompts: list[str] = []
    for value in values:
        # os.path takes a text that is too long for a name, which Path does not.
        is_file = os.path.isfile(value)
        if not is_file and os.path.exists(value):
            raise UserError(
                f"--prompts {value} is the name of something that is not a text file. Give a text file, or write the "
                "prompt differently."
            )
        if not is_file and value.lower().endswith(".txt"):
            raise UserError(f"--prompts {value} is not a file. Correct the name, or end the prompt differently.")
        prompts += read_prompts(Path(value)) if is_file else [value]
    return prompts
