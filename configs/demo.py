"""A tiny tokenizer of 64-pixel embedded drawings, and AR probing of it.

`demo:tokenizer` and `demo:probe`; `gigatok demo` runs both, in minutes on two cores.
"""

from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import lookup
from gigatok_jax.evaluation.probing import ProbeConfig
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training.generator import GeneratorRun
from gigatok_jax.training.linear_probe import LinearProbeRun
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.task import LoopConfig
from gigatok_jax.training.tokenizer import ObjectiveConfig, TokenizerRun


def get_config(argument="tokenizer"):
    return lookup(argument, {"tokenizer": tokenizer, "probe": probe}, "run")()


def tokenizer() -> TokenizerRun:
    size = TransformerSize(depth=1, heads=4, width=64)
    return TokenizerRun(
        model=TokenizerConfig(
            encoder=size,
            decoder=size,
            layout="2d",  # learns in hundreds of steps; a Q-Former takes thousands
            image_size=64,
            latents=64,  # few, because a generator of 256 codes would train four times as long
            # Most of a step's time goes to the largest grids, so these have few channels.
            base_channels=8,
            channel_multipliers=(1, 2, 4, 8),
            residual_blocks=1,
            z_channels=32,
            codebook_size=1024,  # more codes are used more rarely, and learn more slowly
            semantic_layer=1,
            semantic_dim=96,
            init="fan_in",
        ),
        objective=ObjectiveConfig(
            l2=8.0,
            perceptual=0.1,
            semantic=0.1,
            entropy=0.02,
            perceptual_distance="teacher",
            teacher="embedded",
            adversarial=0.0,  # in so few steps it adds a pattern, but no detail
        ),
        # These are drawn once, for the tokenizer and the probe: a drawing takes milliseconds.
        data=DataConfig(source="embedded", length=8_000, eval_length=256),
        optimizer=OptimizerConfig(rate=1e-3, final_rate=1e-4, warmup_steps=50, clip=1.0),
        loop=LoopConfig(log_every=100, evaluate_every=400, checkpoint_every=400),
        steps=850,
        batch_size=8,
        average_decay=0.98,
        remat="none",  # so small a model has no need to save memory
        evaluation_images=256,
    )


def probe() -> ProbeConfig:
    return ProbeConfig(
        data=DataConfig(source="embedded", length=8_000, eval_length=500),
        crop_factors=(),
        generator=generator(),
        linear_probe=LinearProbeRun(
            # LARS hardly moves the layer in so few steps.
            optimizer=OptimizerConfig(rate=1e-2, final_rate=0.0, weight_decay=0.0),
            loop=LoopConfig(log_every=20, evaluate_every=100, checkpoint_every=0),
            steps=200,
            batch_size=100,
            evaluation_images=500,
        ),
        features="embedded",
        samples=400,
        sampling=SamplingConfig(guidance=3.0, temperature=0.6),
        batch_size=100,
        shard_images=4_000,
        sample_batch_size=100,
    )


def generator() -> GeneratorRun:
    return GeneratorRun(
        model=GeneratorConfig(
            depth=6,
            heads=3,
            width=96,
            codes=64,
            codebook_size=1024,
            classes=10,
            positions="rotary_2d",
            adaln="block",  # separates the classes within minutes
            dropout=0.0,
        ),
        optimizer=OptimizerConfig(
            rate=2e-3,
            schedule="warmup_stable_decay",
            warmup_steps=50,
            weight_decay=0.05,
            decayed="matrices",
            clip=1.0,
        ),
        loop=LoopConfig(log_every=100, evaluate_every=300, checkpoint_every=300),
        sampling=SamplingConfig(guidance=3.0, temperature=0.6),
        steps=800,
        batch_size=16,
        evaluation_images=256,
    )
