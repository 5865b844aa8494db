"""Trained tokenizers and generators as jitted functions on arrays.

tokenizer = load_tokenizer("runs/b_l")
codes = tokenizer.encode(images)
images = tokenizer.decode(codes)
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import hashlib
import importlib
import os
import sys
import traceback
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax import bundles, files, locate, recipes, sampling, sharding
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.models import families, generator, quantizer, titok, vqgan
from gigatok_jax.models.generator import Generator, GeneratorConfig
from gigatok_jax.models.layers import compute_dtype
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.pictures import to_float
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.weights import convert, torch_files

Path = str | files.Path


class Pretrained:
    """A network and its weights, replicated on all local devices.

    A batch is split over the devices if their number divides it; otherwise each device computes all
    of it. Methods compile on their first call with a given architecture and batch size.

    Attributes:
      config: the architecture.
      module: the Linen module; `module.apply(variables, ..., method=...)` for pure functions.
      variables: `{"params": ...}`.
    """

    def __init__(self, module: nn.Module, params: Any, fingerprint: str | None = None):
        mesh = sharding.local_mesh()
        self._replicated, self._split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        self.config, self.module = module.config, module
        self.variables = {"params": jax.device_put(params, self._replicated)}
        self._fingerprint = fingerprint

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that identify the parameters."""
        if self._fingerprint is None:
            self._fingerprint = bundles.fingerprint(self.variables["params"])
        return self._fingerprint

    def _place(self, batch) -> jax.Array:
        divisible = len(batch) % self._split.mesh.size == 0
        return jax.device_put(batch, self._split if divisible else self._replicated)

    def _run(self, method, *batches, **kwargs) -> jax.Array:
        batches = map(self._place, batches)
        options = (method, tuple(kwargs.items()), sharding.mesh_in_use())
        return _apply(self.module, *options, self.variables, *batches)

    def _check_layer(self, layer: int, depth: int) -> None:
        if not isinstance(layer, int | np.integer) or not 1 <= layer <= depth:
            raise ValueError(f"layer: expected 1..{depth}, got {layer}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))  # one program for all of an architecture
def _apply(module, method, options, mesh, variables, *batches):
    del mesh  # the layers look it up
    return module.apply(variables, *batches, method=method, **dict(options))


class PretrainedTokenizer(Pretrained):
    """A tokenizer of any family and its weights; see `Pretrained`.

    Arrays are those of NumPy or JAX, lists, or PyTorch's tensors on CPUs.
    `images` are `[B, H, W, 3]`, B at least 1: floats in [-1, 1], or integers in 0..255. Floats up
    to twice that range pass, because decoded images exceed it a little. `codes` are `[B, N]`
    integers in [0, K). Anything else raises ValueError.

    Attributes:
      made_by: provenance of the weights.
      history: the last 65,536 codes assigned in training; unused entries are -1. None if there is
        no record.
    """

    def __init__(
        self,
        config: Any,
        weights: Mapping[str, Any],
        dtype: str = "auto",
        fingerprint: str | None = None,
        made_by: Mapping[str, Any] | None = None,
    ):
        module = families.make(config, compute_dtype(dtype))
        super().__init__(module, weights["params"], fingerprint)
        self.made_by, self.history = dict(made_by or {}), weights.get("history")

    @property
    def family(self) -> str:
        """Such as "gigatok" or "llamagen"."""
        return families.describe(self.config)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.variables["params"]))

    @property
    def codes_of(self) -> str:
        """Fingerprint of the tokenizer that makes the same codes: this one, or the one before.

        Codes stay the same if only the decoder is fine-tuned.
        """
        return self.made_by.get("codes_of", self.fingerprint)

    def encode(self, images) -> jax.Array:
        """Maps images `[B, H, W, 3]` to codes, int32 `[B, N]`."""
        return self._run("encode", self._images(images))

    def latents(self, images) -> jax.Array:
        """Latents before quantization, float32 `[B, N, D]`; `images` as for `encode`."""
        return self._run("latents", self._images(images))

    def decode(self, codes) -> jax.Array:
        """Maps codes `[B, N]` to images, float32 `[B, H, W, 3]` in about [-1, 1], not clipped."""
        return self._run("decode", self._checked(codes))

    def decode_first(self, codes, keep: int) -> jax.Array:
        """What the first `keep` codes of each row say of an image; results as of `decode`.

        The vectors of the other codes are replaced by the mean of the codebook's. Another `keep`, 0
        to N, does not compile again.
        """
        _check_keep(keep, self.config.latents)
        codes = self._checked(codes)
        return self._run("decode_first", codes, np.full(len(codes), keep, np.int32))

    def decoder_features(self, codes, layer: int) -> jax.Array:
        """Output of decoder transformer layer `layer` (from 1), float32 `[B, grid*grid, W]`.

        Only tokenizers of the family GigaTok have such layers; `has_decoder_features` tells.
        """
        if not self.has_decoder_features:
            raise ValueError("this tokenizer's decoder is no transformer of GigaTok's")
        self._check_layer(layer, self.config.decoder.depth)
        codes = self._checked(codes)
        return self._run("decoder_features", codes, layer=layer)

    @property
    def has_decoder_features(self) -> bool:
        return isinstance(self.config, TokenizerConfig)

    def semantic_features(self, codes) -> jax.Array:
        """Features that the semantic loss aligns with the teacher, float32 `[B, grid*grid, C]`."""
        if not getattr(self.config, "semantic_dim", 0):
            raise ValueError("this tokenizer has no projector: it was trained without a teacher")
        return self._run("semantic_features", self._checked(codes))

    def codebook_usage(self) -> float:
        """Fraction of the codebook used in the last 65,536 training assignments, in [0, 1].

        Only tokenizers of the family GigaTok have a record of these.
        """
        if self.history is None:
            raise ValueError("this tokenizer has no record of the codes assigned in training")
        return float(quantizer.codebook_usage(self.history, self.config.codebook_size))

    def _checked(self, codes) -> jax.Array:
        return _codes(codes, self.config.latents, self.config.codebook_size)

    def _images(self, images):
        images = self._place(_images(images, self.config.image_size))
        return to_float(images) if images.dtype == jnp.uint8 else images.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class OwnConfig:
    """What a tokenizer of the user's says of itself."""

    image_size: int
    latents: int  # codes per image, N
    codebook_size: int


class OwnTokenizer:
    """A tokenizer of the user's, in NumPy, JAX or PyTorch, for all that needs codes and images.

    Arguments and results of `encode` and `decode` are those of `PretrainedTokenizer`.

    Args:
      name: "python:MODULE:FUNCTION". FUNCTION() returns an object with `image_size`, `codes` (per
        image, N), `codebook_size` (K), `fingerprint` (any text that changes with the weights),
        `encode` (images float32 `[B, H, W, 3]` in [-1, 1] to integers `[B, N]`) and `decode` (these
        to images, floats in about [-1, 1]).
      where: flag or argument that holds the name, for messages.

    Raises:
      UserError: the function cannot be imported or fails, or what it returns lacks an attribute.
    """

    history, has_decoder_features, made_by = None, False, MappingProxyType({})
    family = "own"
    parameters = None  # not known

    def __init__(self, name: str, where: str = ""):
        self.name = f"{where}: {name}" if where else name
        module, _, function = name.removeprefix(locate.OWN).partition(":")
        if not module or not function:
            raise UserError(f"{self.name}: expected {locate.OWN}MODULE:FUNCTION")
        if os.getcwd() not in sys.path:  # an installed command does not look there
            sys.path.append(os.getcwd())
        try:
            self._own = getattr(importlib.import_module(module), function)()
        except Exception as error:  # of any type: it is another program
            raise UserError(
                f"{self.name}: expected {locate.OWN}MODULE:FUNCTION that returns a tokenizer, got "
                f"{_fault(error)}"
            ) from error
        needed = ("image_size", "codes", "codebook_size", "encode", "decode", "fingerprint")
        if missing := [name for name in needed if not hasattr(self._own, name)]:
            raise UserError(f"{self.name}: expected {', '.join(needed)}, found no {missing[0]}")
        sizes = (self._own.image_size, self._own.codes, self._own.codebook_size)
        if not all(isinstance(size, int | np.integer) and size > 0 for size in sizes):
            raise UserError(f"{self.name}: expected {', '.join(needed[:3])} above 0, got {sizes}")
        self.config = OwnConfig(*map(int, sizes))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sixteen hex digits of its text."""
        return hashlib.sha256(str(self._own.fingerprint).encode()).hexdigest()[:16]

    @property
    def codes_of(self) -> str:
        return self.fingerprint

    def encode(self, images) -> np.ndarray:
        """See `PretrainedTokenizer.encode`."""
        images = np.asarray(_images(images, self.config.image_size))
        images = images / np.float32(127.5) - 1 if images.dtype == np.uint8 else images
        codes = self._call("encode", np.array(images, np.float32))
        count, highest = (len(images), self.config.latents), self.config.codebook_size - 1
        right = codes.shape == count and codes.dtype.kind in "iu"
        if not right or codes.min() < 0 or codes.max() > highest:
            found = f"{codes.dtype} {list(codes.shape)}"
            found += f" from {codes.min()} to {codes.max()}" if codes.size else ""
            raise UserError(
                f"{self.name}: encode: expected integers {list(count)} from 0 to {highest}, got "
                f"{found}"
            )
        return codes.astype(np.int32)

    def decode(self, codes) -> np.ndarray:
        """See `PretrainedTokenizer.decode`."""
        config = self.config
        # A copy, because PyTorch wants arrays that can be written to.
        codes = np.array(_codes(codes, config.latents, config.codebook_size))
        images = self._call("decode", codes)
        shape = (len(codes), config.image_size, config.image_size, 3)
        if images.shape != shape or not jnp.issubdtype(images.dtype, jnp.floating):
            raise UserError(
                f"{self.name}: decode: expected floats {list(shape)}, got {images.dtype} "
                f"{list(images.shape)}"
            )
        images = images.astype(np.float32)
        if not np.isfinite(images).all():
            raise UserError(f"{self.name}: decode: expected finite values, got NaN or inf")
        return images

    def _call(self, method: str, batch: np.ndarray) -> np.ndarray:
        """The result of the user's method, which may be of another library and on any device."""
        try:
            values = getattr(self._own, method)(batch)
        except Exception as error:  # of any type: it is another program
            raise UserError(f"{self.name}: {method}: {_fault(error)}") from error
        try:
            if hasattr(values, "detach"):  # PyTorch
                values = values.detach().cpu()
                values = values.float() if values.is_floating_point() else values
            return np.asarray(values)
        except Exception as error:  # of any type: it is another program
            raise UserError(
                f"{self.name}: expected arrays, got {type(values).__name__} ({first_line(error)})"
            ) from error


def _fault(error: Exception) -> str:
    """An exception of the user's program, and the line of code that raised it."""
    text = f"{type(error).__name__}: {first_line(error)}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<")  # Python's importer
    ]
    if not frames:
        return text
    return f"{text} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})"


class PretrainedGenerator(Pretrained):
    """A generator and its weights; see `Pretrained`.

    Arrays are as for a tokenizer. In all methods, `codes` are `[B, N]` integers in [0, K), and
    `classes` are `[B]` integers among `trained`, or `config.null_class`, which means unconditional.
    Anything else raises ValueError.

    Attributes:
      made_by: provenance of the weights; "tokenizer" is the tokenizer's fingerprint, if known.
      class_names: of the training data, by class; empty if unknown.
      class_count: number of classes of the training data.
      trained: numbers of the classes of which the training data had an image.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        weights: Mapping[str, Any],
        dtype: str = "auto",
        made_by: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
    ):
        module = Generator(config, dtype=compute_dtype(dtype))
        super().__init__(module, weights["params"], fingerprint)
        self.made_by = dict(made_by or {})
        data = self.made_by.get("data") or {}
        self.class_names = tuple(data.get("class_names", ()))
        # The table may have more rows than the data have classes.
        self.class_count = len(self.class_names) or config.classes
        self.trained = np.setdiff1d(np.arange(self.class_count), data.get("untrained", ()))
        self._warned = False  # of guidance by an untrained class

    def logits(self, codes, classes=None) -> jax.Array:
        """Logits of each code, given the class and the preceding codes, float32 `[B, N, K]`.

        `classes` defaults to the null class.
        """
        return self._run(Generator.__call__, *self._inputs(codes, classes)).astype(jnp.float32)

    def features(self, codes, classes=None, *, layer: int) -> jax.Array:
        """Output of layer `layer` (from 1), float32 `[B, N, W]`.

        Positions are the class and all codes but the last. `classes` defaults to the null class.
        """
        self._check_layer(layer, self.config.depth)
        return self._run(Generator.features, *self._inputs(codes, classes), layer=layer)

    def sample(
        self, classes, key: jax.Array, *, prefix=None, keep: int | None = None, **settings
    ) -> jax.Array:
        """Samples the codes of images of the given classes, or completes given codes.

        Args:
          classes: `[B]` integers.
          key: one random key, which is split over the images; or `[B]` keys, one per image, which
            make an image's codes independent of its batch.
          prefix: `codes` to complete; needs `keep`. Default: all codes are sampled.
          keep: how many codes of each row of `prefix` to keep, 0 to N. The others follow from
            these, in the tokenizer's order: those of a 2D tokenizer are rows of the image, from the
            top. N gives `prefix` back, and 0 what is sampled without it. Another `keep` does not
            compile again.
          settings: fields of `sampling.SamplingConfig`, all optional:
            guidance: scale of classifier-free guidance, at least 1; default 1, no guidance.
            schedule: how guidance varies over an image's codes: "constant" (default), "step",
              "linear", "reversed_linear", "triangular", "rectangular" or "cosine".
            schedule_start, schedule_end: where guidance starts (default 0.18) and ends (1) in the
              schedules "step" and "rectangular", as fractions of the sequence.
            temperature: divides the logits; default 1; 0 takes the arg-max.
            top_k: sample from the k most likely codes only; default 0, all.
            top_p: sample from the fewest codes whose probabilities sum to more than p; default 1,
              all.

        Returns:
          int32 `[B, N]`.

        Raises:
          ValueError: a setting is unknown or outside its range, or `classes`, `key`, `prefix` or
            `keep` are not as above.
        """
        settings = SamplingConfig(**settings)
        if not self._warned:  # once, not in each batch
            run = self.made_by.get("run") or {}
            self._warned = sampling.check_null_class(settings, run.get("class_dropout"))
        classes, key = self._classes(classes), _random_key(key)
        keys = key if key.ndim else jax.random.split(key, len(classes))
        if keys.shape != classes.shape:
            raise ValueError(f"key: expected 1 or {len(classes)} keys, got {list(keys.shape)}")
        params, dtype = self.variables["params"], self.module.dtype
        batch = (self._place(classes), self._place(keys))
        if prefix is None:
            if keep is not None:
                raise ValueError(f"prefix: expected codes, because keep={keep}, got None")
            return sampling.sample(self.config, params, *batch, settings, dtype)
        _check_keep(keep, self.config.codes)
        prefix = _codes(prefix, self.config.codes, self.config.codebook_size)
        if len(prefix) != len(classes):
            raise ValueError(f"prefix: expected {len(classes)} rows of codes, got {len(prefix)}")
        given = self._place(prefix), keep
        return sampling.sample(self.config, params, *batch, settings, dtype, *given)

    def _inputs(self, codes, classes) -> tuple[jax.Array, np.ndarray]:
        """The codes that the generator reads: the last one predicts nothing. And the classes."""
        codes = _codes(codes, self.config.codes, self.config.codebook_size)
        if classes is None:
            classes = np.full(len(codes), self.config.null_class)
        classes = self._classes(classes)
        if len(classes) != len(codes):
            raise ValueError(
                f"classes: expected {len(codes)}, one per row of codes, got {len(classes)}"
            )
        return codes[:, :-1], classes

    def _classes(self, classes) -> np.ndarray:
        classes, null = np.asarray(_array("classes", classes)), self.config.null_class
        if classes.ndim != 1 or not classes.size or classes.dtype.kind not in "iu":
            found = f"{list(classes.shape)} {classes.dtype}"
            raise ValueError(f"classes: expected integers [B], got {found}")
        bad = classes[~np.isin(classes, self.trained) & (classes != null)]
        if bad.size:
            raise ValueError(
                f"classes: expected {class_list(self.trained)}, or {null} for none, got {bad[0]}"
            )
        return classes.astype(np.int32)


AnyTokenizer = PretrainedTokenizer | OwnTokenizer


def _check_keep(keep: int | None, codes: int) -> None:
    """Raises ValueError unless `keep` is a number of codes of an image."""
    if not isinstance(keep, int | np.integer) or not 0 <= keep <= codes:
        raise ValueError(f"keep: expected 0..{codes}, got {keep}")


def _codes(codes, length: int, codebook_size: int) -> jax.Array:
    codes = _array("codes", codes)
    if codes.ndim != 2 or codes.shape[1] != length or not len(codes):
        raise ValueError(f"codes: expected [B, {length}], got {list(codes.shape)}")
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes: expected integers, got {codes.dtype}")
    _check_range("codes: expected", codes, 0, codebook_size - 1)
    return jnp.asarray(codes, jnp.int32)


def _images(images, size: int):
    """The images as uint8 or floats."""
    images = _array("images", images)
    if images.ndim != 4 or images.shape[1:] != (size, size, 3) or not len(images):
        raise ValueError(f"images: expected [B, {size}, {size}, 3], got {list(images.shape)}")
    if jnp.issubdtype(images.dtype, jnp.floating):
        _check_range("images: expected floats in [-1, 1], at most", images, -2, 2)
    elif jnp.issubdtype(images.dtype, jnp.integer):
        if images.dtype != np.uint8:
            _check_range("images: expected integers in", images, 0, 255)
            images = images.astype(np.uint8)
    else:
        expected = "floats in [-1, 1] or integers in 0..255"
        raise ValueError(f"images: expected {expected}, got {images.dtype}")
    return images


def class_list(classes: Sequence[int]) -> str:
    """Sorted numbers of classes for messages, such as "0..3, 5"."""
    runs = np.split(classes, np.flatnonzero(np.diff(classes) > 1) + 1)
    parts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(parts if len(parts) < 9 else [*parts[:8], "..."])


def _array(name: str, values):
    """NumPy and JAX arrays as they are; lists, and PyTorch's tensors on CPUs, as NumPy arrays."""
    if isinstance(values, jax.Array | np.ndarray):
        return values
    try:
        return np.asarray(values)
    except (RuntimeError, TypeError, ValueError) as error:
        found = f"{type(values).__name__} ({first_line(error)})"
        raise ValueError(f"{name}: expected an array, got a {found}") from error


def _random_key(key) -> jax.Array:
    try:
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        return key if typed else jax.random.wrap_key_data(key)
    except (AttributeError, TypeError, ValueError) as error:
        found = f"{type(key).__name__} ({first_line(error)})"
        raise ValueError(f"key: expected jax.random.key(SEED), got a {found}") from error


def _check_range(expected: str, array, low: int, high: int) -> None:
    """Raises ValueError for values out of range, and for NaN."""
    if isinstance(array, jax.core.Tracer):  # inside a caller's jit, values are not known
        return
    for value in (array.min(), array.max()):
        if not low <= value <= high:
            raise ValueError(f"{expected} {low}..{high}, got {value}")


def load_tokenizer(name: Path, dtype: str = "auto", *, where: str = "") -> AnyTokenizer:
    """Loads a tokenizer of any family.

    Args:
      name: a folder, which is a bundle or the workdir of a training run; the name of published
        weights, such as "gigatok_b_l"; or a bundle on the Hugging Face Hub,
        `hf://OWNER/REPO[/FOLDER][@REVISION]`. What is not on this machine is downloaded. Or a
        tokenizer of your own, "python:MODULE:FUNCTION", see `OwnTokenizer`.
      dtype: type of the computation: "float32", "bfloat16", or "auto", which is float32 on CPUs
        and bfloat16 elsewhere.
      where: what holds the name, such as a flag of a program, for messages.

    Raises:
      UserError: the name is unknown (the message lists the published ones), cannot be downloaded,
        or is no tokenizer's; or JAX finds no device of JAX_PLATFORMS.
    """
    if str(name).startswith(locate.OWN):
        return OwnTokenizer(str(name), where)
    bundle = _load(name, families.KINDS, families.KINDS, where)
    return PretrainedTokenizer(
        bundle.config, bundle.weights, dtype, bundle.fingerprint, bundle.made_by
    )


def load_generator(name: Path, dtype: str = "auto", *, where: str = "") -> PretrainedGenerator:
    """Loads a generator; arguments and errors as for `load_tokenizer`.

    For a published one, such as "gigatok_gpt_b_s_s", `made_by["published_tokenizer"]` is the name
    of its tokenizer, and `made_by["sampling"]` are settings of `sample`.
    """
    bundle = _load(name, "generator", GeneratorConfig, where)
    return PretrainedGenerator(
        bundle.config, bundle.weights, dtype, bundle.made_by, bundle.fingerprint
    )


def tokenizer_from_torch(
    checkpoint: Path | Mapping[str, np.ndarray], name: str, dtype: str = "auto"
) -> PretrainedTokenizer:
    """Loads a tokenizer from a checkpoint of the reference.

    Args:
      checkpoint: a `.pt` or `.safetensors` file, or a mapping from tensor names to arrays.
      name: the architecture, such as "b_l".
      dtype: see `load_tokenizer`.

    Raises:
      UserError: the file cannot be read, or the name is unknown.
      ValueError: the tensors do not fit the architecture.
    """
    config = recipes.tokenizer_model(name)
    weights = convert.from_torch("tokenizer", _tensors(checkpoint), config)
    return PretrainedTokenizer(config, weights, dtype)


def generator_from_torch(
    checkpoint: Path | Mapping[str, np.ndarray], name: str, dtype: str = "auto"
) -> PretrainedGenerator:
    """Loads a generator from a checkpoint of the reference; `name` is, for example, "b" or "b,2d".

    Arguments and errors as for `tokenizer_from_torch`.
    """
    config = recipes.generator_model(name)
    weights = convert.from_torch("generator", _tensors(checkpoint), config)
    return PretrainedGenerator(config, weights, dtype)


def _load(name: Path, kind: Any, config_type: Any, where: str) -> bundles.Bundle:
    sharding.require_accelerator(fallback=True)
    return bundles.load(name, kind, config_type, where=where)


def _tensors(checkpoint) -> Mapping[str, np.ndarray]:
    sharding.require_accelerator(fallback=True)
    if isinstance(checkpoint, Mapping):
        return checkpoint
    return torch_files.read(files.as_path(checkpoint, "checkpoint"))


def parameter_count(name: str) -> int:
    """Exact number of trainable parameters; allocates nothing.

    Args:
      name: a tokenizer, such as "b_l" or "titok_b64", or a generator, such as "generator:b".

    Raises:
      UserError: the name is unknown.
    """
    kind, _, rest = name.rpartition(":")
    if kind == "generator":
        shapes = generator.param_shapes(recipes.generator_model(rest))
    elif kind:
        raise UserError(f"{name!r}: no such model; expected a name such as b_l or generator:b")
    else:
        config = vqgan.MODELS.get(name) or titok.MODELS.get(name) or recipes.tokenizer_model(name)
        shapes = families.param_shapes(config)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
