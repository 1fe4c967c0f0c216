"""Printing: text that may hold anything, such as captions and file names, and counts in words."""

from __future__ import annotations

import os
import sys
import unicodedata

import click

from pipeline.system.errors import UserError

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


def printable(text: str) -> str:
    """`text` with its control and format characters as escapes. Newlines and tabs stay.

    Format characters (Unicode's Cf) include those that reverse the direction of text. The zero-width joiner stays,
    since emoji need it.
    """
    return "".join(character if _is_harmless(character) else ascii(character)[1:-1] for character in text)


def plural(count: int, one: str, several: str | None = None) -> str:
    """A count with its noun: `1 shard`, `2 shards`; `several` is the plural of a noun that takes more than an s."""
    return f"{count} {one if count == 1 else several or one + 's'}"


def _is_harmless(character: str) -> bool:
    return character in "\n\t\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def format_duration(seconds: float) -> str:
    """45 -> '45 seconds'; 5000 -> '1.4 hours'."""
    name, length = next((n, s) for n, s in PERIODS if seconds >= 2 * s or s == 1)
    return f"{seconds / length:.3g} {name}"
