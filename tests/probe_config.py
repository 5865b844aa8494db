"""A probe of seconds: drawings of 16 pixels, a generator and a linear probe of six steps."""

import dataclasses

from gigatok_jax.data.sources import DataConfig
from gigatok_jax.evaluation.probing import ProbeConfig
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training.generator import GeneratorRun
from gigatok_jax.training.linear_probe import LinearProbeRun
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.task import LoopConfig

LOOP = LoopConfig(log_every=2, evaluate_every=0, checkpoint_every=3)
CONFIG = ProbeConfig(
    data=DataConfig(source="embedded", length=48, eval_length=24),
    crop_factors=(),
    generator=GeneratorRun(
        model=GeneratorConfig(1, 2, 16, dropout=0.0),
        optimizer=OptimizerConfig(rate=1e-2),
        loop=LOOP,
        steps=6,
        batch_size=8,
        evaluation_images=24,
        sampling=SamplingConfig(),
    ),
    linear_probe=LinearProbeRun(
        optimizer=OptimizerConfig(rate=1e-2), loop=LOOP, steps=6, batch_size=8, evaluation_images=24
    ),
    features="embedded",
    samples=16,
    sampling=SamplingConfig(guidance=1.5),
    batch_size=8,
    shard_images=16,
    sample_batch_size=8,
)


def get_config(argument=""):
    """The probe, or one of its runs alone, on images and with 4 codes of 64."""
    if not argument:
        return CONFIG
    run = dataclasses.replace(getattr(CONFIG, argument), data=CONFIG.data)
    if argument == "generator":
        model = dataclasses.replace(run.model, codes=4, codebook_size=64, classes=0)
        run = dataclasses.replace(run, model=model)
    return run
