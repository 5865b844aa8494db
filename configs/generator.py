"""A generator on a tokenizer's codes: `--config=generator:NAME[,VARIANT...]`.

NAME: b l xl xxl (the paper's sizes), 3b (LlamaGen's largest), or tiny. VARIANT: `2d`, for 2D
tokenizers; `384`, 24x24 codes, of images of 384 pixels. The run encodes images as it reads them
(`--config.tokenizer=DIR`), or reads codes that `gigatok encode` stored
(`--config.data.source=codes --config.data.path=DIR`).
"""

import dataclasses

from gigatok_jax import recipes
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training.generator import GeneratorRun


def get_config(argument="b"):
    recipe = recipes.generator(argument)
    return GeneratorRun(
        model=dataclasses.replace(recipe.model, classes=0),  # the data have the classes
        epochs=float(recipe.epochs),
        batch_size=recipe.batch_size,
        mesh=MeshConfig(data=1, fsdp=-1) if recipe.sharded else MeshConfig(),
    )
