"""Reading text files that a user or a command wrote."""

from __future__ import annotations

import re
from pathlib import Path

from shards.regular import read_regular

# No config, card or list of prompts comes near.
MAX_TEXT_BYTES = 1 << 26


def read_text(path: Path) -> str:
    """The text of a regular file in UTF-8, without the mark that some editors put first.

    Raises OSError, which names the path, for anything else and for more than MAX_TEXT_BYTES; and UnicodeDecodeError.
    """
    return read_regular(path, MAX_TEXT_BYTES).decode("utf-8-sig")


def lines_in(text: str) -> list[str]:
    """The lines of a text, stripped, without the blank ones. Only carriage returns and line feeds end a line."""
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def is_unicode(text: str) -> bool:
    """False for text with unpaired surrogates, which JSON can express and UTF-8 cannot. Python also makes them of the
    bytes of a file name that are not UTF-8."""
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)
