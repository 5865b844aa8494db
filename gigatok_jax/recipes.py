"""Names of models and what they stand for: the paper's sizes and recipes (Tables 8 and 9)."""

from collections.abc import Mapping
import dataclasses
from typing import Any, TypeVar

from gigatok_jax.errors import UserError
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize

T = TypeVar("T")

SIZES = {
    "tiny": TransformerSize(depth=4, heads=4, width=256),  # not in the paper
    "s": TransformerSize(depth=6, heads=8, width=512),
    "b": TransformerSize(depth=12, heads=12, width=768),
    "l": TransformerSize(depth=24, heads=16, width=1024),
    "xl": TransformerSize(depth=36, heads=20, width=1280),
    "xxl": TransformerSize(depth=48, heads=24, width=1536),
}


@dataclasses.dataclass(frozen=True)
class TokenizerRecipe:
    """A row of Table 9: transformer sizes, layout, length of training; and how it is laid out.

    `remat` and `sharded` are what `gigatok plan` finds to fit from eight H100s or a v5p slice up.
    """

    encoder: str
    decoder: str
    epochs: int
    batch_size: int
    layout: str = "1d"
    remat: str = "dots"  # see `training.run.RunConfig`
    sharded: bool = False  # parameters are divided over all devices, not only the batch

    @property
    def model(self) -> TokenizerConfig:
        return TokenizerConfig(SIZES[self.encoder], SIZES[self.decoder], layout=self.layout)


TOKENIZERS = {
    "tiny_tiny": TokenizerRecipe("tiny", "tiny", epochs=100, batch_size=128),
    "s_s": TokenizerRecipe("s", "s", epochs=100, batch_size=128),
    "s_b": TokenizerRecipe("s", "b", epochs=200, batch_size=128),
    "s_l": TokenizerRecipe("s", "l", epochs=200, batch_size=256, sharded=True),
    "b_s": TokenizerRecipe("b", "s", epochs=200, batch_size=256),
    "b_l": TokenizerRecipe("b", "l", epochs=200, batch_size=256, sharded=True),
    "xl_xxl": TokenizerRecipe("xl", "xxl", epochs=300, batch_size=256, remat="full", sharded=True),
    "s_s_2d": TokenizerRecipe("s", "s", epochs=100, batch_size=128, layout="2d"),
    "s_b_2d": TokenizerRecipe("s", "b", epochs=200, batch_size=128, layout="2d"),
    "b_l_2d": TokenizerRecipe("b", "l", epochs=200, batch_size=256, layout="2d", sharded=True),
}


@dataclasses.dataclass(frozen=True)
class GeneratorRecipe:
    """Size of a generator, its batch (paper, appendix C), and how it is laid out."""

    size: str
    batch_size: int = 256
    sharded: bool = False

    @property
    def model(self) -> GeneratorConfig:
        return GeneratorConfig(**dataclasses.asdict(SIZES[self.size]))


GENERATORS = {
    "tiny": GeneratorRecipe("tiny"),
    "b": GeneratorRecipe("b"),
    "l": GeneratorRecipe("l"),
    "xl": GeneratorRecipe("xl", sharded=True),
    "xxl": GeneratorRecipe("xxl", batch_size=512, sharded=True),
}

GENERATOR_VARIANTS = {"2d": {"positions": "rotary_2d"}}


def generator_recipe(name: str) -> GeneratorRecipe:
    """The recipe called `name`, such as "b".

    Raises:
      UserError: there is none.
    """
    return _known(name, GENERATORS, "generator")


def generator_model(argument: str) -> GeneratorConfig:
    """The architecture of NAME or NAME,VARIANT,..., such as "b,2d".

    Raises:
      UserError: the name or a variant is unknown.
    """
    name, *variants = argument.split(",")
    return _vary(generator_recipe(name).model, variants, GENERATOR_VARIANTS)


def _vary(model: T, variants: list[str], table: Mapping[str, Any]) -> T:
    """The model with the changes that the table has for each variant."""
    for variant in variants:
        model = dataclasses.replace(model, **_known(variant, table, "variant"))
    return model


def _known(name: str, table: Mapping[str, Any], what: str) -> Any:
    if name not in table:
        raise UserError(f"{name!r}: no such {what}; known: {', '.join(table)}")
    return table[name]


def tokenizer_recipe(name: str) -> TokenizerRecipe:
    """The recipe called `name`, such as "b_l".

    Raises:
      UserError: there is none.
    """
    return _known(name, TOKENIZERS, "tokenizer")


# What a variant of a config's name changes in the model; configs/tokenizer.py has the rest.
MODEL_VARIANTS = {
    "released": {"gradient": "rotation"},
    "vanilla": {"semantic_dim": 0},
    "dino_disc": {},
}


def tokenizer_model(argument: str) -> TokenizerConfig:
    """The architecture of NAME or NAME,VARIANT,..., such as "b_l,vanilla".

    Raises:
      UserError: the name or a variant is unknown.
    """
    name, *variants = argument.split(",")
    return _vary(tokenizer_recipe(name).model, variants, MODEL_VARIANTS)
