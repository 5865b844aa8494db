"""AR probing of a tokenizer on ImageNet, as in the paper: `--config=probe[:SIZE]`.

Trains a generator (SIZE, by default b) on the tokenizer's codes for 50 epochs, and probes its
middle layer. `gigatok train --config=probe:linear` runs the linear probe alone.
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
