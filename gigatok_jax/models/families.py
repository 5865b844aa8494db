"""Tokenizers of all families, by the kind of their bundles.

A family has a dataclass of its architectures and a Linen module. The dataclass has `image_size`,
`latents` (codes per image, N) and `codebook_size` (K). The module maps images `[B, H, W, 3]` in
[-1, 1] to latents `[B, N, D]` (`latents`) and codes `[B, N]` (`encode`), and codes to images
(`decode`; `decode_first` keeps only the first of them).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from gigatok_jax.models import layers
from gigatok_jax.models.titok import Titok, TitokConfig
from gigatok_jax.models.tokenizer import Tokenizer, TokenizerConfig
from gigatok_jax.models.vqgan import Vqgan, VqganConfig

KINDS: dict[str, type] = {
    "tokenizer": TokenizerConfig,
    "vqgan": VqganConfig,
    "titok": TitokConfig,
}
_MODULES = {TokenizerConfig: Tokenizer, VqganConfig: Vqgan, TitokConfig: Titok}


def make(config: Any, dtype: layers.Dtype = jnp.float32) -> nn.Module:
    """The module of an architecture."""
    return _MODULES[type(config)](config, dtype=dtype)


def param_shapes(config: Any) -> dict:
    """Shapes of the parameters; allocates nothing."""
    return layers.param_shapes(make(config), (1, config.image_size, config.image_size, 3))


def describe(config: Any) -> str:
    """The name of the family, for reports: "gigatok", "llamagen", "ibq", ..."""
    if isinstance(config, VqganConfig):
        return "ibq" if config.quantizer == "ibq" else config.family
    return {TokenizerConfig: "gigatok", TitokConfig: "titok"}[type(config)]
