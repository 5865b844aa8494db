"""Trains a GigaTok tokenizer on ImageNet: `--config=configs/tokenizer.py:NAME[,VARIANT...]`.

NAME: s_s s_b s_l b_s b_l xl_xxl s_s_2d s_b_2d b_l_2d (encoder and decoder size), or tiny_tiny.
VARIANT: `released`, the older recipe of the released weights; `vanilla`, no semantic loss.
"""

from gigatok_jax import recipes
from gigatok_jax.config import to_config_dict
from gigatok_jax.errors import UserError
from gigatok_jax.training.tokenizer_run import TokenizerRun


def released(config, name):
    """The rotation trick; up to B-L, 15,000 shortcut iterations in place of warm-up and entropy."""
    config.model.gradient = "rotation"
    if name != "xl_xxl":
        config.objective.auxiliary_steps = 15_000
        config.objective.entropy = 0.0
        config.optimizer.warmup_steps = 0


def vanilla(config, name):
    """No semantic regularization (paper, 3.2)."""
    config.objective.semantic = 0.0
    config.model.semantic_dim = 0


VARIANTS = {"released": released, "vanilla": vanilla}


def get_config(argument="s_s"):
    name, *variants = argument.split(",")
    recipe = recipes.tokenizer_recipe(name)
    config = to_config_dict(TokenizerRun(recipe.model))
    config.epochs = float(recipe.epochs)
    config.batch_size = recipe.batch_size

    # The recommended recipe, for every size (paper, appendix C): warm-up and entropy loss.
    config.optimizer.warmup_steps = 5_000
    config.objective.entropy = 0.005

    for variant in variants:
        if variant not in VARIANTS:
            raise UserError(f"{variant!r}: no such variant; known: {', '.join(VARIANTS)}")
        VARIANTS[variant](config, name)
    return config
