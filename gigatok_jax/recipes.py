"""Named models: the sizes and training recipes of the paper (Tables 8 and 9)."""

from collections.abc import Mapping
import dataclasses

from gigatok_jax.errors import lookup
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize

SIZES = {
    "tiny": TransformerSize(depth=4, heads=4, width=256),  # not in the paper
    "s": TransformerSize(depth=6, heads=8, width=512),
    "b": TransformerSize(depth=12, heads=12, width=768),
    "l": TransformerSize(depth=24, heads=16, width=1024),
    "xl": TransformerSize(depth=36, heads=20, width=1280),
    "xxl": TransformerSize(depth=48, heads=24, width=1536),
    "3b": TransformerSize(depth=24, heads=32, width=3200),  # LlamaGen's largest generator
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and its training: a row of Table 9, or a generator of appendix C.

    With these values of `remat` and `sharded`, training fits eight H100s or a small v5p slice,
    according to `gigatok plan`.
    """

    model: TokenizerConfig | GeneratorConfig
    epochs: int
    batch_size: int
    remat: str = "dots"  # see `layers.remat`
    sharded: bool = False  # divide the parameters over all devices, not only the batch


def _tokenizer(encoder: str, decoder: str, layout: str = "1d") -> TokenizerConfig:
    return TokenizerConfig(SIZES[encoder], SIZES[decoder], layout=layout)


def _generator(size: str) -> GeneratorConfig:
    return GeneratorConfig(**dataclasses.asdict(SIZES[size]))


TOKENIZERS = {
    "tiny_tiny": Recipe(_tokenizer("tiny", "tiny"), epochs=100, batch_size=128),
    "s_s": Recipe(_tokenizer("s", "s"), epochs=100, batch_size=128),
    "s_b": Recipe(_tokenizer("s", "b"), epochs=200, batch_size=128),
    "s_l": Recipe(_tokenizer("s", "l"), epochs=200, batch_size=256, sharded=True),
    "b_s": Recipe(_tokenizer("b", "s"), epochs=200, batch_size=256),
    "b_l": Recipe(_tokenizer("b", "l"), epochs=200, batch_size=256, sharded=True),
    "xl_xxl": Recipe(
        _tokenizer("xl", "xxl"), epochs=300, batch_size=256, remat="full", sharded=True
    ),
    "s_s_2d": Recipe(_tokenizer("s", "s", "2d"), epochs=100, batch_size=128),
    "s_b_2d": Recipe(_tokenizer("s", "b", "2d"), epochs=200, batch_size=128),
    "b_l_2d": Recipe(_tokenizer("b", "l", "2d"), epochs=200, batch_size=256, sharded=True),
}
GENERATORS = {
    "tiny": Recipe(_generator("tiny"), epochs=300, batch_size=256),
    "b": Recipe(_generator("b"), epochs=300, batch_size=256),
    "l": Recipe(_generator("l"), epochs=300, batch_size=256),
    "xl": Recipe(_generator("xl"), epochs=300, batch_size=256, sharded=True),
    "xxl": Recipe(_generator("xxl"), epochs=300, batch_size=512, sharded=True),
    "3b": Recipe(_generator("3b"), epochs=300, batch_size=256, sharded=True),
}

# Changes to the model only; configs/tokenizer.py holds what a variant changes in training.
TOKENIZER_VARIANTS = {
    "released": {"gradient": "rotation"},
    "vanilla": {"semantic_dim": 0},
    "dino_disc": {},
}
GENERATOR_VARIANTS = {
    "2d": {"positions": "rotary_2d"},  # LlamaGen's architecture
    "384": {"codes": 24**2},  # of 384 pixels, where one code stands for 16x16
}


def tokenizer_model(argument: str) -> TokenizerConfig:
    """The architecture that NAME or NAME,VARIANT,... names, such as "b_l,vanilla".

    Raises:
      UserError: the name or a variant is unknown.
    """
    return tokenizer(argument).model


def generator_model(argument: str) -> GeneratorConfig:
    """The architecture that NAME or NAME,VARIANT,... names, such as "b,2d"."""
    return generator(argument).model


def tokenizer(argument: str) -> Recipe:
    """The recipe of `tokenizer_model(argument)`."""
    return _recipe(argument, TOKENIZERS, TOKENIZER_VARIANTS, "tokenizer")


def generator(argument: str) -> Recipe:
    """The recipe of `generator_model(argument)`."""
    return _recipe(argument, GENERATORS, GENERATOR_VARIANTS, "generator")


def _recipe(argument: str, recipes: Mapping, variants: Mapping, what: str) -> Recipe:
    name, *changes = argument.split(",")
    recipe = lookup(name, recipes, what)
    for change in changes:
        model = dataclasses.replace(recipe.model, **lookup(change, variants, "variant"))
        recipe = dataclasses.replace(recipe, model=model)
    return recipe
