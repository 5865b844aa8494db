"""Networks so small that their programs compile in seconds, and checkpoints of any size."""

import math
import pathlib
from typing import Any

from flax.traverse_util import flatten_dict
import jax
import numpy as np

from gigatok_jax import bundles
from gigatok_jax.models import generator, quantizer, tokenizer
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize
from gigatok_jax.weights import convert


def config(**changes) -> TokenizerConfig:
    """32-pixel images, an 8x8 grid, 16 codes of 64."""
    options = {
        "encoder": TransformerSize(1, 2, 16),
        "decoder": TransformerSize(2, 2, 16),
        "image_size": 32,
        "latents": 16,
        "base_channels": 4,
        "channel_multipliers": (1, 1, 2),
        "residual_blocks": 1,
        "z_channels": 8,
        "codebook_size": 64,
        "semantic_layer": 1,
        "semantic_dim": 12,
    }
    return TokenizerConfig(**(options | changes))


def fill(template):
    """Random parameters of the template's shapes, scaled as trained ones are."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape, dtype=np.float32)
        if path[-1].key == "scale":
            return 1 + 0.1 * x
        return x * (0.1 if path[-1].key == "bias" else float(np.prod(leaf.shape[:-1])) ** -0.5)

    return jax.tree_util.tree_map_with_path(draw, template)


def weights(config: TokenizerConfig) -> dict:
    """What a bundle holds: parameters, and the history of one that has been assigned nothing."""
    params = fill(tokenizer.param_shapes(config))
    return {"params": params, "history": np.array(quantizer.empty_history())}


def save_networks(root: pathlib.Path, config: TokenizerConfig, model: GeneratorConfig) -> dict:
    """Bundles of a tokenizer and a generator of its codes; name to directory."""
    own = weights(config)
    bundles.save(root / "tokenizer", "tokenizer", config, own, {})
    params = fill(generator.param_shapes(model))
    made_by = {"tokenizer": bundles.fingerprint(own["params"])}
    bundles.save(root / "generator", "generator", model, {"params": params}, made_by)
    return {name: str(root / name) for name in ("tokenizer", "generator")}


def images(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Noise, float32 in [-1, 1]."""
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (count, size, size, 3)).astype(np.float32)


def torch_shapes(kind: str, config: Any = None) -> dict[str, tuple[int, ...]]:
    """Name to shape, in PyTorch's layout, of the tensors that a checkpoint has."""
    rule = convert.KINDS[kind]
    template = flatten_dict(rule.shapes(config), sep="/")
    return {entry.name: entry.torch_shape(template) for entry in rule.entries(config)}


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors of these shapes; within a tensor no two elements are equal."""
    return {
        name: np.arange(i, i + math.prod(shape), dtype=np.float32).reshape(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
