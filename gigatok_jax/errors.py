"""The one exception that the command line turns into a single line."""


class UserError(Exception):
    """Input that cannot work: the message names the culprit and what was expected."""
