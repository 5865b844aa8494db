"""Tokenizers and generators in Python: load one, and call jitted functions on arrays."""

from collections.abc import Mapping
import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from gigatok_jax import bundles, recipes, sampling
from gigatok_jax.errors import UserError
from gigatok_jax.models import quantizer
from gigatok_jax.models.generator import Generator, GeneratorConfig
from gigatok_jax.models.layers import compute_dtype
from gigatok_jax.models.tokenizer import Tokenizer, TokenizerConfig
from gigatok_jax.pictures import to_float
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.weights import convert, torch_files


class _Pretrained:
    """A module with its weights, on all local devices, which share each batch that they divide.

    Functions compile at their first call with a batch size.
    """

    def __init__(self, module: nn.Module, params: Any):
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        self._whole, self._shared = (NamedSharding(mesh, P(axis)) for axis in (None, "data"))
        self.module = module
        self.variables = {"params": jax.device_put(params, NamedSharding(mesh, P()))}
        self._compiled = {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `bundles.fingerprint`."""
        return bundles.fingerprint(self.variables["params"])

    def _place(self, batch) -> jax.Array:
        divisible = len(batch) % self._shared.mesh.size == 0
        return jax.device_put(batch, self._shared if divisible else self._whole)

    def _run(self, method, *batches, **kwargs) -> jax.Array:
        key = (method, *kwargs.items())
        if key not in self._compiled:
            apply = functools.partial(self.module.apply, method=method, **kwargs)
            self._compiled[key] = jax.jit(apply)
        return self._compiled[key](self.variables, *map(self._place, batches))


class PretrainedTokenizer(_Pretrained):
    """A tokenizer with its weights, on all local devices, which share each batch they divide.

    Functions compile at their first call with a batch size.

    Attributes:
      config: the architecture.
      module: the Linen module; `module.apply(variables, ..., method=...)` for pure functions.
      variables: `{"params": ...}`.
      history: the last 65,536 codes assigned in training, -1 where there was none.
    """

    def __init__(self, config: TokenizerConfig, weights: Mapping[str, Any], dtype: str = "auto"):
        super().__init__(Tokenizer(config, dtype=compute_dtype(dtype)), weights["params"])
        self.config = config
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

    def _images(self, images):
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (size, size, 3):
            raise ValueError(f"images must be [B, {size}, {size}, 3], got {list(images.shape)}")
        images = self._place(images)
        return to_float(images) if images.dtype == jnp.uint8 else images.astype(jnp.float32)

    def _codes(self, codes):
        if codes.ndim != 2 or codes.shape[1] != self.config.latents:
            raise ValueError(f"codes must be [B, {self.config.latents}], got {list(codes.shape)}")
        return jnp.asarray(codes, jnp.int32)


class PretrainedGenerator(_Pretrained):
    """A generator with its weights, on all local devices, which share each batch they divide.

    Functions compile at their first call with a batch size.

    Attributes:
      config: the architecture.
      module: the Linen module; `module.apply(variables, ..., method=...)` for pure functions.
      variables: `{"params": ...}`.
      made_by: what made the weights; "tokenizer" is its tokenizer's fingerprint, where known.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        weights: Mapping[str, Any],
        dtype: str = "auto",
        made_by: Mapping[str, Any] | None = None,
    ):
        super().__init__(Generator(config, dtype=compute_dtype(dtype)), weights["params"])
        self.config, self.made_by = config, dict(made_by or {})

    def logits(self, codes, classes=None) -> jax.Array:
        """Logits of each code, given the class and the codes before it.

        Args:
          codes: `[B, N]` integers in [0, K).
          classes: `[B]` integers; None: the null class.

        Returns:
          float32 `[B, N, K]`.
        """
        return self._run(Generator.__call__, *self._inputs(codes, classes)).astype(jnp.float32)

    def features(self, codes, classes=None, *, layer: int) -> jax.Array:
        """Output of layer 1, 2, ..., float32 `[B, N, W]`: of the class and all codes but the last.

        `codes` and `classes` are as for `logits`.
        """
        if not 1 <= layer <= self.config.depth:
            raise ValueError(f"layer must be in 1..{self.config.depth}, got {layer}")
        return self._run(Generator.features, *self._inputs(codes, classes), layer=layer)

    def sample(
        self,
        classes,
        key: jax.Array,
        guidance: float = 1.0,
        schedule: str = "constant",
        schedule_start: float = 0.18,
        schedule_end: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> jax.Array:
        """Draws codes of images of the given classes.

        Args:
          classes: `[B]` integers; `config.null_class` for any.
          key: a random key, from which each image gets its own; or `[B]` keys, one an image, which
            give an image the same codes in any batch.
          guidance, schedule, schedule_start, schedule_end, temperature, top_k, top_p: see
            `sampling.SamplingConfig`.

        Returns:
          int32 `[B, N]`.

        Raises:
          ValueError: a value is outside its range.
        """
        settings = SamplingConfig(
            guidance, schedule, schedule_start, schedule_end, temperature, top_k, top_p
        )
        classes = self._classes(classes)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        keys = key if key.ndim else jax.random.split(key, len(classes))
        if keys.shape != classes.shape:
            raise ValueError(f"key must be one key, or {len(classes)}, got {list(keys.shape)}")
        params, dtype = self.variables["params"], self.module.dtype
        batch = (self._place(classes), self._place(keys))
        return sampling.sample(self.config, params, *batch, settings, dtype)

    def _inputs(self, codes, classes) -> tuple[np.ndarray, np.ndarray]:
        """All codes but the last, and classes."""
        config = self.config
        if codes.ndim != 2 or codes.shape[1] != config.codes:
            raise ValueError(f"codes must be [B, {config.codes}], got {list(codes.shape)}")
        if classes is None:
            classes = np.full(len(codes), config.null_class)
        classes = self._classes(classes)
        if len(classes) != len(codes):
            raise ValueError(f"classes must be as many as codes, {len(codes)}, got {len(classes)}")
        return np.asarray(codes, np.int32)[:, :-1], classes

    def _classes(self, classes) -> np.ndarray:
        classes = np.asarray(classes)
        if classes.ndim != 1 or not classes.size or classes.dtype.kind not in "iu":
            raise ValueError(
                f"classes must be integers [B], got {list(classes.shape)} {classes.dtype}"
            )
        bad = classes[(classes < 0) | (classes > self.config.null_class)]
        if bad.size:
            raise ValueError(f"classes must be in 0..{self.config.null_class}, got {bad[0]}")
        return classes.astype(np.int32)


def load_tokenizer(directory: str | pathlib.Path, dtype: str = "auto") -> PretrainedTokenizer:
    """Loads a tokenizer's bundle, or that of a workdir.

    Args:
      directory: what training or `gigatok convert` wrote.
      dtype: type of the computation, see `precision.compute_dtype`.

    Raises:
      UserError: there is no such bundle.
    """
    bundle = bundles.load(directory, "tokenizer", TokenizerConfig)
    return PretrainedTokenizer(bundle.config, bundle.weights, dtype)


def load_generator(directory: str | pathlib.Path, dtype: str = "auto") -> PretrainedGenerator:
    """Loads a generator's bundle, or that of a workdir; see `load_tokenizer`."""
    bundle = bundles.load(directory, "generator", GeneratorConfig)
    return PretrainedGenerator(bundle.config, bundle.weights, dtype, bundle.made_by)


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
    weights = convert.tokenizer_from_torch(_tensors(checkpoint), config)
    return PretrainedTokenizer(config, weights, dtype)


def generator_from_torch(
    checkpoint: str | pathlib.Path | Mapping[str, np.ndarray], name: str, dtype: str = "auto"
) -> PretrainedGenerator:
    """Loads a generator's checkpoint of the reference, such as "b" or "b,2d".

    Arguments and errors are those of `tokenizer_from_torch`.
    """
    config = recipes.generator_model(name)
    weights = convert.generator_from_torch(_tensors(checkpoint), config)
    return PretrainedGenerator(config, weights, dtype)


def _tensors(checkpoint) -> Mapping[str, np.ndarray]:
    return checkpoint if isinstance(checkpoint, Mapping) else torch_files.read(checkpoint)


def parameter_count(name: str) -> int:
    """Exact number of trainable parameters; allocates nothing.

    Args:
      name: of a tokenizer, such as "b_l", or a generator, such as "generator:b".

    Raises:
      UserError: the name is unknown.
    """
    kind, _, rest = name.rpartition(":")
    if kind == "generator":
        shapes = convert.generator_shapes(recipes.generator_model(rest))
    elif kind:
        raise UserError(f"{name!r}: no such model; known: generator:b, ..., b_l, ...")
    else:
        shapes = convert.tokenizer_shapes(recipes.tokenizer_model(name))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
