"""Exceptions that the command line prints as one line, without a traceback."""

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """Invalid input. The message reads `WHERE: expected WHAT, got WHAT`.

    WHERE is a path, a `--flag` or a field such as `config.a.b`. The checks of a configuration name
    only their own field; `config.from_mapping` adds the path to it.
    """

    exit_code = 2


class RunStopped(UserError):
    """A run that ended before its last step. The message says where, and how to resume."""

    exit_code = 1


def lookup(name: str, table: Mapping[str, Any], what: str) -> Any:
    """`table[name]`, or a UserError that lists the known names."""
    if name not in table:
        raise UserError(f"{name!r}: no such {what}; known: {', '.join(table)}")
    return table[name]


LONGEST = 300  # characters that are shown of another library's message


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if the message is empty."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) < LONGEST else line[:LONGEST] + " ..."
