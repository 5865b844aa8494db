"""A tiny tokenizer of the embedded drawings, every loss on, and a small generator of its codes.

`configs/demo.py:tokenizer` and `configs/demo.py:generator`; `gigatok demo` trains both, in minutes
on two cores.
"""

import dataclasses

from gigatok_jax.config import to_config_dict
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training.generator_run import OPTIMIZER, GeneratorRun
from gigatok_jax.training.loop import LoopConfig
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.tokenizer import ObjectiveConfig
from gigatok_jax.training.tokenizer_run import TokenizerRun


def get_config(argument="tokenizer"):
    runs = {"tokenizer": tokenizer, "generator": generator}
    if argument not in runs:
        raise UserError(f"{argument!r}: no such run; known: {', '.join(runs)}")
    return to_config_dict(runs[argument]())


def tokenizer() -> TokenizerRun:
    size = TransformerSize(depth=1, heads=4, width=64)
    return TokenizerRun(
        model=TokenizerConfig(
            encoder=size,
            decoder=size,
            layout="2d",  # learns in hundreds of steps what a Q-Former takes thousands for
            image_size=32,
            latents=64,
            base_channels=16,
            channel_multipliers=(1, 1, 2),
            residual_blocks=1,
            z_channels=32,
            codebook_size=1024,
            semantic_layer=1,
            semantic_dim=96,
            init="fan_in",
        ),
        objective=ObjectiveConfig(
            l2=8.0,
            perceptual=0.1,
            adversarial=0.02,
            semantic=0.1,
            entropy=0.02,
            perceptual_distance="teacher",
            teacher="embedded",
            disc_start=1_400,
            discriminator_channels=(16, 32),
        ),
        data=DataConfig(source="embedded", length=20_000, eval_length=256),
        optimizer=OptimizerConfig(rate=2e-3, final_rate=1e-4, warmup_steps=50, clip=1.0),
        loop=LoopConfig(log_every=100, evaluate_every=500, checkpoint_every=500),
        steps=1_500,
        batch_size=8,
        average_decay=0.98,
        evaluation_images=256,
    )


def generator() -> GeneratorRun:
    return GeneratorRun(
        model=GeneratorConfig(
            depth=4,
            heads=2,
            width=128,
            codes=64,
            codebook_size=1024,
            classes=10,
            positions="rotary_2d",
            adaln="block",  # tells the classes apart within minutes
            dropout=0.0,
        ),
        data=DataConfig(source="codes", path="runs/demo/codes"),
        tokenizer="runs/demo/tokenizer",
        optimizer=dataclasses.replace(OPTIMIZER, rate=2e-3, warmup_steps=50),
        loop=LoopConfig(log_every=100, evaluate_every=300, checkpoint_every=300),
        sampling=SamplingConfig(guidance=3.0, temperature=0.8),
        steps=900,
        batch_size=16,
        evaluation_images=256,
    )
