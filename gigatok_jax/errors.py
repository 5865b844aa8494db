"""The exceptions that the command line turns into a single line."""


class UserError(Exception):
    """Input that cannot work: the message names the culprit and what was expected."""

    exit_code = 2


class RunStopped(UserError):
    """A run that ended before its last step; the message says where and how to go on."""

    exit_code = 1
