"""Trains a GigaTok tokenizer on ImageNet: `--config=configs/tokenizer.py:NAME[,VARIANT...]`.

NAME: s_s s_b s_l b_s b_l xl_xxl s_s_2d s_b_2d b_l_2d (encoder and decoder size), or tiny_tiny.
VARIANT: `released`, the older recipe of the released weights; `vanilla`, no semantic loss;
`dino_disc`, a discriminator on frozen DINO features (the paper's double-dagger rows).
"""

from gigatok_jax import recipes
from gigatok_jax.config import to_config_dict
from gigatok_jax.training.tokenizer import ObjectiveConfig
from gigatok_jax.training.tokenizer_run import TokenizerRun


def get_config(argument="s_s"):
    name, *variants = argument.split(",")
    recipe = recipes.tokenizer_recipe(name)
    objective = ObjectiveConfig(semantic=0.0) if "vanilla" in variants else ObjectiveConfig()
    model = recipes.tokenizer_model(argument)
    config = to_config_dict(TokenizerRun(model=model, objective=objective))
    config.epochs = float(recipe.epochs)
    config.batch_size = recipe.batch_size
    config.remat = recipe.remat
    if recipe.sharded:
        config.mesh.data, config.mesh.fsdp = 1, -1

    # What the paper recommends for every size (appendix C): warm-up and entropy loss, ...
    config.optimizer.warmup_steps = 5_000
    config.objective.entropy = 0.005
    if "released" in variants and name != "xl_xxl":
        # ... where the weights released up to B-L had 15,000 iterations of shortcut losses.
        config.optimizer.warmup_steps = 0
        config.objective.entropy = 0.0
        config.objective.auxiliary_steps = 15_000
    if "dino_disc" in variants:
        config.objective.discriminator = "dino"
        config.objective.disc_start = 80_000
    return config
