"""A run of seconds: drawings of 8 pixels, a tiny tokenizer, a discriminator from step 11."""

from gigatok_jax.data.sources import DataConfig
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.task import LoopConfig
from gigatok_jax.training.tokenizer import ObjectiveConfig, TokenizerRun


def get_config(argument=""):
    del argument
    size = TransformerSize(depth=1, heads=2, width=16)
    return TokenizerRun(
        model=TokenizerConfig(
            size,
            size,
            image_size=8,
            latents=4,
            base_channels=4,
            channel_multipliers=(1,),
            residual_blocks=1,
            z_channels=8,
            codebook_size=64,
            semantic_dim=0,
        ),
        objective=ObjectiveConfig(
            perceptual=0.0, semantic=0.0, disc_start=11, discriminator_channels=(4, 8)
        ),
        data=DataConfig(source="embedded", length=64, eval_length=8),
        optimizer=OptimizerConfig(rate=1e-3, warmup_steps=4),
        loop=LoopConfig(log_every=5, evaluate_every=0, checkpoint_every=7),
        steps=23,
        batch_size=8,
        average_decay=0.9,
        evaluation_images=8,
    )
