"""Training: one loop for all tasks, and one file for each task."""

from gigatok_jax.training.generator import GeneratorRun
from gigatok_jax.training.linear_probe import LinearProbeRun
from gigatok_jax.training.tokenizer import TokenizerRun

TASKS = {"tokenizer": TokenizerRun, "generator": GeneratorRun, "linear_probe": LinearProbeRun}
