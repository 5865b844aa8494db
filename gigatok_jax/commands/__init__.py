"""The verbs of the command line: their flags, and the library functions that they call.

A verb is a function of its flags' values, and its docstring is the help text. Functions import what
they need when they run, so that `gigatok --help` answers at once.
"""

# These register their verbs, in the order of the help text.
# isort: off
from gigatok_jax.commands import training, images, evaluation, models, program

# isort: on
from gigatok_jax.commands.verbs import OPTIONAL, REQUIRED, VERBS

__all__ = [
    "OPTIONAL",
    "REQUIRED",
    "VERBS",
    "evaluation",
    "images",
    "models",
    "program",
    "training",
]
