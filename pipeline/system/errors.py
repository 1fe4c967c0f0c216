"""The one error for what a user can mend."""


class UserError(Exception):
    """Bad input: the message names the file or option, the value, and what to do. Exit status 2."""
