"""Trains a generator on a tokenizer's codes: `--config=configs/generator.py:NAME[,VARIANT...]`.

NAME: b l xl xxl (the paper's sizes), or tiny. VARIANT: `2d`, for 2d tokenizers.
Images are encoded as they are read, by `--config.tokenizer=DIR`; or stored codes are read, what
`gigatok encode` wrote: `--config.data.source=codes --config.data.path=DIR`.
"""

from gigatok_jax import recipes
from gigatok_jax.config import to_config_dict
from gigatok_jax.training.generator_run import GeneratorRun


def get_config(argument="b"):
    recipe = recipes.generator_recipe(argument.split(",")[0])
    model = recipes.generator_model(argument)
    config = to_config_dict(GeneratorRun(model=model, batch_size=recipe.batch_size))
    if recipe.sharded:
        config.mesh.data, config.mesh.fsdp = 1, -1
    config.optimizer.warmup_steps = config.epoch_images // config.batch_size  # one epoch
    return config
