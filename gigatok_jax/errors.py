"""The exceptions that the command line turns into a single line."""


class UserError(Exception):
    """Input that cannot work: the message names the culprit and what was expected."""

    exit_code = 2


class RunStopped(UserError):
    """A run that ended before its last step; the message says where and how to go on."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
