"""AR probing of a tokenizer on ImageNet, as in the paper: `--config=configs/probe.py[:SIZE]`.

A generator (B unless SIZE says otherwise) is trained on the tokenizer's codes for 50 epochs, and
its middle layer is probed. `gigatok train --config=configs/probe.py:linear` runs the linear probe
alone.
"""

from gigatok_jax import recipes
from gigatok_jax.evaluation.probing import ProbeConfig
from gigatok_jax.training.generator import GeneratorRun
from gigatok_jax.training.linear_probe import LinearProbeRun


def get_config(argument="b"):
    if argument == "linear":
        return LinearProbeRun()
    return ProbeConfig(
        generator=GeneratorRun(model=recipes.generator_model(argument), epochs=50.0),
        linear_probe=LinearProbeRun(),
    )
