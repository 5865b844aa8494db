"""Tokenizers in Python: load one, and call jitted functions on arrays."""

from collections.abc import Mapping
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax import bundles, recipes
from gigatok_jax.errors import UserError
from gigatok_jax.models import quantizer
from gigatok_jax.models.tokenizer import Tokenizer, TokenizerConfig
from gigatok_jax.pictures import to_float
from gigatok_jax.precision import compute_dtype
from gigatok_jax.weights import convert, torch_files


class PretrainedTokenizer:
    """A tokenizer with its weights. Functions compile at their first call with a batch size.

    Attributes:
      config: the architecture.
      module: the Linen module; `module.apply(variables, ..., method=...)` for pure functions.
      variables: `{"params": ...}`.
      history: the last 65,536 codes assigned in training, -1 where there was none.
    """

    def __init__(self, config: TokenizerConfig, weights: Mapping[str, Any], dtype: str = "auto"):
        self.config = config
        self.module = Tokenizer(config, dtype=compute_dtype(dtype))
        self._compiled = {}
        self.variables = {"params": weights["params"]}
        self.history = weights["history"]

    def encode(self, images) -> jax.Array:
        """Codes of images.

        Args:
          images: `[B, H, W, 3]`, float in [-1, 1] or uint8.

        Returns:
          int32 `[B, N]`.
        """
        return self._run(Tokenizer.encode, self._images(images))

    def latents(self, images) -> jax.Array:
        """Latents before the quantizer, float32 `[B, N, D]`; `images` as for `encode`."""
        return self._run(Tokenizer.latents, self._images(images))

    def decode(self, codes) -> jax.Array:
        """Images float32 `[B, H, W, 3]` in about [-1, 1], not clipped, of codes `[B, N]`."""
        return self._run(Tokenizer.decode, self._codes(codes))

    def decoder_features(self, codes, layer: int) -> jax.Array:
        """Output of the decoder transformer's layer 1, 2, ..., float32 `[B, grid*grid, W]`."""
        if not 1 <= layer <= self.config.decoder.depth:
            raise ValueError(f"layer must be in 1..{self.config.decoder.depth}, got {layer}")
        return self._run(Tokenizer.decoder_features, self._codes(codes), layer=layer)

    def semantic_features(self, codes) -> jax.Array:
        """What the semantic loss compares with the teacher, float32 `[B, grid*grid, C]`."""
        if not self.config.semantic_dim:
            raise ValueError("this tokenizer has no projector: it was trained without a teacher")
        return self._run(Tokenizer.semantic_features, self._codes(codes))

    def codebook_usage(self) -> float:
        """Share of the codes among training's last 65,536 assignments, in [0, 1]."""
        return float(quantizer.codebook_usage(self.history, self.config.codebook_size))

    def _run(self, method, *args, **kwargs):
        key = (method, *kwargs.items())
        if key not in self._compiled:
            apply = functools.partial(self.module.apply, method=method, **kwargs)
            self._compiled[key] = jax.jit(apply)
        return self._compiled[key](self.variables, *args)

    def _images(self, images):
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(f"images must be [B, {size}, {size}, 3], got {list(images.shape)}")
        images = jnp.asarray(images)
        return to_float(images) if images.dtype == jnp.uint8 else images.astype(jnp.float32)

    def _codes(self, codes):
        if codes.ndim != 2 or codes.shape[1] != self.config.latents:
            raise ValueError(f"codes must be [B, {self.config.latents}], got {list(codes.shape)}")
        return jnp.asarray(codes, jnp.int32)


def load_tokenizer(directory: str | pathlib.Path, dtype: str = "auto") -> PretrainedTokenizer:
    """Loads a tokenizer's bundle, or that of a workdir.

    Args:
      directory: what training or `gigatok convert` wrote.
      dtype: type of the computation, see `precision.compute_dtype`.

    Raises:
      UserError: there is no such bundle.
    """
    directory = pathlib.Path(directory)
    if (directory / "bundle").is_dir():
        directory = directory / "bundle"
    bundle = bundles.load(directory, "tokenizer", TokenizerConfig)
    return PretrainedTokenizer(bundle.config, bundle.weights, dtype)


def tokenizer_from_torch(
    checkpoint: str | pathlib.Path | Mapping[str, np.ndarray], name: str, dtype: str = "auto"
) -> PretrainedTokenizer:
    """Loads a checkpoint of the reference.

    Args:
      checkpoint: a `.pt` or `.safetensors` file, or its tensors by name.
      name: the architecture, such as "b_l".
      dtype: type of the computation, see `precision.compute_dtype`.

    Raises:
      UserError: the file or the name cannot be used.
      ValueError: the tensors are those of another architecture.
    """
    config = recipes.tokenizer_model(name)
    tensors = checkpoint
    if not isinstance(checkpoint, Mapping):
        tensors = torch_files.read(checkpoint)
    weights = convert.tokenizer_from_torch(tensors, config)
    return PretrainedTokenizer(config, jax.tree.map(jnp.asarray, weights), dtype)


def parameter_count(name: str) -> int:
    """Exact number of trainable parameters of a tokenizer such as "b_l"; allocates nothing.

    Raises:
      UserError: the name is unknown.
    """
    if ":" in name:
        raise UserError(f"{name!r}: no such model; known: {', '.join(recipes.TOKENIZERS)}")
    shapes = convert.tokenizer_shapes(recipes.tokenizer_model(name))
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
