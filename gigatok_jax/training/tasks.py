"""The kinds of training runs, by the `task` of their configuration."""

from gigatok_jax.training.generator_run import GeneratorRun
from gigatok_jax.training.linear_probe_run import LinearProbeRun
from gigatok_jax.training.tokenizer_run import TokenizerRun

TASKS = {"tokenizer": TokenizerRun, "generator": GeneratorRun, "linear_probe": LinearProbeRun}
