"""The exceptions that the command line prints as a single line."""


class UserError(Exception):
    """Input that cannot work. The message reads `WHERE: expected WHAT, got WHAT`.

    WHERE is a path, a `--flag` or a field such as `config.a.b`. A configuration's own checks name
    the field as their class knows it; `config.from_mapping` adds the path.
    """

    exit_code = 2


class RunStopped(UserError):
    """A run that ended before its last step. The message says where, and how to resume."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
