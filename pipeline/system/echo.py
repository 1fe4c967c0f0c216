"""Printing: text that may hold anything, such as captions and file names, counts in words, and what is waited for."""

from __future__ import annotations

import os
import sys
import unicodedata

import click

from pipeline.system.disk import format_bytes
from pipeline.system.errors import UserError

# Reading, hashing or writing this many bytes may take more than two seconds.
LONG_WAIT = 200_000_000

PERIODS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


def say(text: str, err: bool = False) -> None:
    """Print text. Characters that would control the terminal are shown as escapes, such as `\\x1b`.

    The work goes on when nobody reads what it prints, as after `| head`. Raises UserError if printing fails otherwise.
    """
    stream = sys.stderr if err else sys.stdout
    try:
        click.echo(printable(text), err=err)
    except BrokenPipeError:
        # Whatever is printed from now on, also at the end of the process, goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except OSError as error:
        raise UserError(f"what is printed cannot be written ({error.strerror}). Send it elsewhere.") from None


def say_wait(doing: str, size: int) -> None:
    """Say on stderr what is done with so many bytes that it takes long, as in `loading model/unet, 3.44 GB`.

    Of several processes on a machine, the first one says it.
    """
    if size >= LONG_WAIT and is_first_process():
        say(f"{doing}, {format_bytes(size)}", err=True)


def is_first_process() -> bool:
    """Whether this is the first process of a launch on this machine, or the only one."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def printable(text: str) -> str:
    """`text` with its control and format characters as escapes. Newlines and tabs stay.

    Format characters (Unicode's Cf) include those that reverse the direction of text. The zero-width joiner stays,
    since emoji need it.
    """
    return "".join(character if _is_harmless(character) else ascii(character)[1:-1] for character in text)


def one_line(text: str) -> str:
    """`text`, such as a file's name, as it can stand within a line: newlines and tabs are escapes too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def plural(count: int, one: str, several: str | None = None) -> str:
    """A count with its noun: `1 shard`, `2 shards`; `several` is the plural of a noun that takes more than an s."""
    return f"{count} {one if count == 1 else several or one + 's'}"


def _is_harmless(character: str) -> bool:
    return character in "\n\t\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def format_duration(seconds: float) -> str:
    """45 -> '45 seconds'; 5000 -> '1.4 hours'."""
    name, length = next((n, s) for n, s in PERIODS if seconds >= 2 * s or s == 1)
    return f"{seconds / length:.3g} {name}"
