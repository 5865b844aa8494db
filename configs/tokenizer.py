"""A GigaTok tokenizer on ImageNet (Table 9): `--config=tokenizer:NAME[,VARIANT...]`.

NAME (encoder and decoder size): s_s s_b s_l b_s b_l xl_xxl s_s_2d s_b_2d b_l_2d, or tiny_tiny.
VARIANT: `released`, the older recipe of the released weights; `vanilla`, no semantic loss;
`dino_disc`, a discriminator on frozen DINO features (the paper's double-dagger rows).
"""

from gigatok_jax import recipes
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.tokenizer import RECIPE_ENTROPY, ObjectiveConfig, TokenizerRun


def get_config(argument="s_s"):
    recipe = recipes.tokenizer(argument)
    name, *variants = argument.split(",")
    # The paper recommends warm-up and entropy loss for every size (appendix C). The released
    # weights up to B-L were trained with 15,000 steps of auxiliary losses instead.
    older = "released" in variants and name != "xl_xxl"
    objective = dict(auxiliary_steps=15_000) if older else dict(entropy=RECIPE_ENTROPY)
    if "vanilla" in variants:
        objective["semantic"] = 0.0
    if "dino_disc" in variants:
        objective |= dict(discriminator="dino", disc_start=80_000)
    return TokenizerRun(
        model=recipe.model,
        objective=ObjectiveConfig(**objective),
        optimizer=OptimizerConfig(warmup_steps=0 if older else 5_000),
        mesh=MeshConfig(data=1, fsdp=-1) if recipe.sharded else MeshConfig(),
        epochs=float(recipe.epochs),
        batch_size=recipe.batch_size,
        remat=recipe.remat,
    )
