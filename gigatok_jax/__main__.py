"""`python -m gigatok_jax VERB`."""

from gigatok_jax.cli import entry

entry()
