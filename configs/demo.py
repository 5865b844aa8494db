"""A tiny tokenizer of the embedded drawings, every loss on; minutes on a laptop's CPU."""

from gigatok_jax.config import to_config_dict
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize
from gigatok_jax.training.loop import LoopConfig
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.tokenizer import ObjectiveConfig
from gigatok_jax.training.tokenizer_run import TokenizerRun


def get_config(argument=""):
    del argument
    size = TransformerSize(depth=3, heads=4, width=128)
    return to_config_dict(
        TokenizerRun(
            model=TokenizerConfig(
                encoder=size,
                decoder=size,
                image_size=64,
                latents=64,
                base_channels=16,
                channel_multipliers=(1, 2, 4, 4),
                residual_blocks=1,
                z_channels=64,
                codebook_size=1024,
                semantic_layer=2,
                semantic_dim=96,
            ),
            objective=ObjectiveConfig(
                perceptual_distance="teacher",
                teacher="embedded",
                perceptual=0.1,
                disc_start=600,
                adversarial=0.1,
                entropy=0.005,
                discriminator_channels=(32, 64, 128),
            ),
            data=DataConfig(source="embedded", length=20_000, eval_length=256),
            optimizer=OptimizerConfig(rate=1e-3, final_rate=1e-4, warmup_steps=50),
            loop=LoopConfig(log_every=50, evaluate_every=300, checkpoint_every=300),
            steps=1_000,
            batch_size=32,
            average_decay=0.99,
            evaluation_images=256,
        )
    )
