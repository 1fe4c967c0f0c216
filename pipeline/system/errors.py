"""The error for problems that a user can fix, and a short form of any error's text."""


class UserError(Exception):
    """Bad input: the message names the file or option, the value, and what to do. Exit status 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class if the text is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__
