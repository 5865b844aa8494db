"""AR probing of a tokenizer on ImageNet, as in the paper: `--config=configs/probe.py`.

A generator B is trained for 50 epochs on the tokenizer's codes, and its middle layer is probed.
`configs/probe.py:SIZE` takes another generator. `gigatok train --config=configs/probe.py:linear`
is the linear probe alone.
"""

from gigatok_jax import recipes
from gigatok_jax.config import to_config_dict
from gigatok_jax.evaluation.probing import ProbeConfig
from gigatok_jax.training import linear_probe_run
from gigatok_jax.training.generator_run import GeneratorRun
from gigatok_jax.training.linear_probe_run import LinearProbeRun


def get_config(argument="b"):
    if argument == "linear":
        return _scaled(to_config_dict(LinearProbeRun()))
    model = recipes.generator_model(argument)
    config = to_config_dict(
        ProbeConfig(
            generator=GeneratorRun(model=model, epochs=50.0),
            linear_probe=LinearProbeRun(),
        )
    )
    _scaled(config.linear_probe)
    return config


def _scaled(probe):
    """Rate and warm-up follow `--config.batch_size`, as long as they are not given themselves."""
    batch_size = probe.get_ref("batch_size")
    probe.optimizer.rate = linear_probe_run.RATE * batch_size.to_float()
    probe.optimizer.warmup_steps = (
        linear_probe_run.WARMUP_EPOCHS * probe.get_ref("epoch_images") // batch_size
    )
    return probe
