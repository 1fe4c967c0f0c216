"""The error for problems that a user can fix, and pieces of messages."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

# What a step after the main work may fail with: disk, network, memory, a process that was killed, a damaged file.
FAILURES = (OSError, RuntimeError, MemoryError, ValueError, KeyError, TypeError, SyntaxError)


class UserError(Exception):
    """Bad input: the message names the file or option, the value, and what to do. Exit status 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class if the text is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question, as a further sentence of a message, for the known name that is most like `name`; may be empty."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


@contextmanager
def failing_with(what: str, remedy: str) -> Iterator[None]:
    """Turn a failure within the block into a UserError: `what` failed, the error's first line, the remedy."""
    try:
        yield
    except FAILURES as error:
        raise UserError(f"{what} ({first_line(error)}). {remedy}") from error


def attempt_all(*parts: Callable[[], None]) -> None:
    """Call every part, whether or not one before it failed. Then raise a UserError with the messages of those that did.

    Errors other than UserError are raised at once.
    """
    problems = []
    for part in parts:
        try:
            part()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
