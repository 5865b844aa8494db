"""The Llama-style generator of codes (paper, 4.2).

An image's sequence is its class followed by its N codes, in the tokenizer's order. The transformer
predicts each code from the preceding ones:

    class, code 1, ..., code n     [B], [B, n]
      embeddings                   [B, 1 + n, W]
      causal blocks                [B, 1 + n, W]
      norm, linear                 [B, 1 + n, K]   logits of code 1, ..., code n + 1

`Generator` computes all positions at once, for training. `Decoder` computes one position at a time,
with cached keys and values, for sampling.
"""

import functools
import math
from typing import Annotated, Any, Literal

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from gigatok_jax import sharding
from gigatok_jax.config import configclass
from gigatok_jax.models import layers
from gigatok_jax.models.norms import RMSNorm, defer_rms, rms_normalize

Positions = Literal["learned", "rotary", "rotary_2d"]
AdaLN = Literal["none", "block", "shared"]
Form = Literal["plain", "joined", "decoding"]
QKV = ("query", "key", "value")


@configclass
class GeneratorConfig:
    """A generator's architecture: all that determines its parameters and outputs."""

    depth: PositiveInt  # layers
    heads: PositiveInt  # of attention
    width: PositiveInt  # features of a token, a multiple of `heads`
    codes: PositiveInt = 256  # per image, N
    codebook_size: Annotated[int, Field(ge=2)] = 16_384  # number of different codes, K
    # Without the null class, which is one more. 0, in a training run: the number in the data.
    classes: NonNegativeInt = 1_000
    positions: Positions = "learned"  # 2d tokenizers need "rotary_2d", that of LlamaGen
    qk_norm: bool = False  # LayerNorm over the dimensions of each head's queries and keys
    # Modulation of blocks by the class: "block" has one Linear per block; "shared" has one for all
    # blocks, and an offset per block.
    adaln: AdaLN = "none"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of embeddings and both branches' outputs

    @property
    def hidden(self) -> int:
        """Hidden width of the SwiGLU."""
        return 256 * math.ceil(int(8 * self.width / 3) / 256)

    @property
    def null_class(self) -> int:
        return self.classes

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """The parameters' first-level names, by the part of the generator that they belong to."""
        return {
            "classes": ("class_embedding",),
            "codes": ("embedding", "positions"),
            "layers": ("layers", "modulation"),
            "head": ("modulation_out", "norm_out", "head"),
        }

    @model_validator(mode="after")
    def _check(self):
        multiple = {"learned": 1, "rotary": 2, "rotary_2d": 4}[self.positions]
        if self.width % (self.heads * multiple):
            raise ValueError(
                f"width: expected a multiple of {self.heads * multiple} for {self.heads} heads and "
                f"{self.positions} positions, got {self.width}"
            )
        if self.positions == "rotary_2d" and math.isqrt(self.codes) ** 2 != self.codes:
            raise ValueError(f"codes: expected a square for rotary_2d positions, got {self.codes}")
        return self


def rotation(config: GeneratorConfig) -> np.ndarray | None:
    """The rotary table of the class and all codes, `[1 + N, head_dim / 2, 2]`, or None.

    The row of the class is zero, not a rotation: its queries and keys vanish, as in the reference.
    """
    if config.positions == "learned":
        return None
    places = np.arange(config.codes)
    if config.positions == "rotary_2d":
        axes = np.stack(np.divmod(places, math.isqrt(config.codes)), -1)  # row, column
    else:
        axes = places[:, None]
    table = layers.rotary_table(axes, config.width // config.heads)
    return np.concatenate([np.zeros_like(table[:1]), table])


def _modulation(config: GeneratorConfig, count: int, dtype: layers.Dtype, name: str) -> nn.Dense:
    """Zero-initialized Linear from the class to `count` vectors of the transformer's width."""
    axes, zeros = ("embed", "mlp"), nn.initializers.zeros
    return layers.dense(count * config.width, axes, kernel_init=zeros, dtype=dtype, name=name)


class Block(nn.Module):
    """Pre-norm layer: causal self-attention and SwiGLU, both modulated by AdaLN."""

    config: GeneratorConfig
    train: bool = False  # turns dropout on
    form: Form = "plain"  # of the parameters, see `rearranged`
    dtype: layers.Dtype = jnp.float32

    def setup(self):
        config, dtype = self.config, self.dtype

        def linear(features, axes, name):
            return layers.dense(features, axes, dtype=dtype, use_bias=False, name=name)

        if self.has_gains:
            self.norm_attention = RMSNorm(dtype)
            self.norm_mlp = RMSNorm(dtype)
        self.attention = layers.Attention(
            config.width,
            config.heads,
            bias=False,
            kernel_init=layers.default_init,
            qk_norm=config.qk_norm,
            joined=self.form == "decoding",
            dtype=dtype,
        )
        if self.form == "plain":
            self.mlp_gate = linear(config.hidden, ("embed", "mlp"), "mlp_gate")
            self.mlp_in = linear(config.hidden, ("embed", "mlp"), "mlp_in")
        else:
            self.mlp_joined = linear((2, config.hidden), ("embed", None, "mlp"), "mlp_joined")
        self.mlp_out = linear(config.width, ("mlp", "embed"), "mlp_out")
        self.dropout = layers.Dropout(config.dropout, deterministic=not self.train)
        if config.adaln == "block":
            self.modulation = _modulation(config, 6, dtype, "modulation")
        if config.adaln == "shared":
            init = layers.partitioned(nn.initializers.normal(config.width**-0.5), None, "embed")
            offset = self.param("offset", init, (6, config.width))
            self.offset = sharding.gather(offset, None, "embed")

    @property
    def has_gains(self) -> bool:
        """Whether norms have gains of their own."""
        return self.form == "plain" or self.config.adaln != "none"

    def __call__(self, x, rotation=None, condition=None):
        """Maps `[B, T, W]` to the same shape; `condition` comes from `Generator.condition`."""

        def attend(x):
            return self.attention(x, x, x, causal=True, rotation=rotation), None

        return self._layer(x, condition, attend)[0]

    def decode(self, x, cache, position, rotation=None, condition=None):
        """Computes one position `[B, 1, W]` and the updated cache; see `Attention.decode`."""
        attend = functools.partial(
            self.attention.decode, cache=cache, position=position, rotation=rotation
        )
        return self._layer(x, condition, attend)

    def _layer(self, x, condition, attend):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self._modulations(condition)
        if self.has_gains:
            y = self.norm_attention(x) * (1 + scale) + shift
        else:
            y = layers.keep_product(rms_normalize(x))
        y, cache = attend(y)
        x = layers.keep_product(layers.constrain(x + gate * self.dropout(y)))
        if self.has_gains:
            y, inverse = self.norm_mlp(x) * (1 + scale_mlp) + shift_mlp, 1
        else:
            y, inverse = defer_rms(x)
        if self.form == "plain":
            gate, y = self.mlp_gate(y), self.mlp_in(y)
        else:
            y = self.mlp_joined(y)
            gate, y = y[..., 0, :] * inverse, y[..., 1, :] * inverse
        y = self.mlp_out(layers.keep_product((nn.silu(gate) * y).astype(self.dtype)))
        return layers.constrain(x + gate_mlp * self.dropout(y)), cache

    def _modulations(self, condition):
        """Shift, scale and gate of both branches, `[B, 1, W]` each."""
        if condition is None:
            return (0, 0, 1) * 2
        if self.config.adaln == "block":
            condition = rearrange(self.modulation(condition), "b t (c w) -> b t c w", c=6)
        else:
            condition = condition + self.offset.astype(condition.dtype)
        return tuple(jnp.moveaxis(condition, 2, 0))


class Generator(nn.Module):
    """Maps a class and codes to the logits of each code, given the preceding ones."""

    config: GeneratorConfig
    train: bool = False  # turns dropout on, which needs the rng "dropout"
    remat: str = "none"  # see `layers.remat`
    dtype: layers.Dtype = jnp.float32  # norm statistics and softmax are always float32

    def setup(self):
        config, dtype = self.config, self.dtype

        def table(name, rows, axis, std=layers.INIT_STD):
            init = layers.partitioned(nn.initializers.normal(std), axis, "embed")
            return sharding.gather(self.param(name, init, (rows, config.width)), axis, "embed")

        self.class_embedding = table("class_embedding", config.classes + 1, None)
        self.embedding = table("embedding", config.codebook_size, "vocab")
        if config.positions == "learned":
            std = config.width**-0.5
            self.positions = table("positions", 1 + config.codes, None, std)
        options = {"config": config, "train": self.train, "dtype": dtype}
        block = functools.partial(Block, **options)
        if sharding.platform() == "gpu" and not self.is_initializing():

            def arrange(variables):
                return {"params": rearranged(variables["params"], config, "joined")}

            joined = nn.map_variables(Block, "params", arrange)
            block = functools.partial(joined, form="joined", **options)
        self.layers = layers.Transformer(config.depth, block, self.remat)
        if config.adaln == "shared":
            self.modulation = _modulation(config, 6, dtype, "modulation")
        if config.adaln != "none":
            self.modulation_out = _modulation(config, 2, dtype, "modulation_out")
        self.norm_out = RMSNorm(dtype)
        self.head = layers.dense(
            config.codebook_size,
            ("embed", "vocab"),
            kernel_init=nn.initializers.zeros,
            use_bias=False,
            dtype=dtype,
            name="head",
        )
        self.dropout = layers.Dropout(config.dropout, deterministic=not self.train)

    def __call__(self, codes: jax.Array, classes: jax.Array) -> jax.Array:
        """Logits of n + 1 codes, `[B, n + 1, K]` of the compute type.

        Args:
          codes: the first n codes of each image, `[B, n]` int32, n < N.
          classes: `[B]` int32; `config.null_class` means unconditional.
        """
        x, _ = self._run(codes, classes)
        return self.logits(x, self.class_vectors(classes))

    def factors(self, codes: jax.Array, classes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The factors `[B, n + 1, W]` and `[W, K]` of the logits, of the compute type.

        Of a large codebook, the logits of a whole batch may not fit in memory.
        """
        x, _ = self._run(codes, classes)
        x = self._before_head(x, self.class_vectors(classes))
        kernel = self.head.variables["params"]["kernel"]
        x, kernel, _ = self.head.promote_dtype(x, kernel, None, dtype=self.dtype)
        return x, kernel

    def features(self, codes: jax.Array, classes: jax.Array, layer: int) -> jax.Array:
        """Output of layer `layer` (from 1; 0: the embeddings), `[B, n + 1, W]` float32."""
        _, (features,) = self._run(codes, classes, taps=(layer,))
        return features.astype(jnp.float32)

    def _run(self, codes, classes, taps=()):
        classes = self.class_vectors(classes)
        codes = self.code_vectors(codes, jnp.arange(1, codes.shape[1] + 1))
        x = jnp.concatenate([classes, codes], axis=1)
        table = rotation(self.config)
        table = None if table is None else table[: x.shape[1]]
        return self.layers(self.dropout(x), table, self.condition(classes), taps=taps)

    def class_vectors(self, classes: jax.Array) -> jax.Array:
        """Embedded classes, the first position of each sequence, `[B, 1, W]`."""
        x = self.class_embedding[classes][:, None]
        if self.config.positions == "learned":
            x = x + self.positions[0]
        return x.astype(self.dtype)

    def code_vectors(self, codes: jax.Array, positions: jax.Array) -> jax.Array:
        """Embeds codes `[B, n]` at the given positions `[n]` (0 is the class): `[B, n, W]`."""
        x = self.embedding[codes]
        if self.config.positions == "learned":
            x = x + self.positions[positions]
        return x.astype(self.dtype)

    def condition(self, classes: jax.Array) -> jax.Array | None:
        """The blocks' AdaLN input, from `class_vectors`: `[B, 1, W]` or `[B, 1, 6, W]`."""
        if self.config.adaln == "none":
            return None
        y = nn.silu(classes)
        if self.config.adaln == "block":
            return y
        return rearrange(self.modulation(y), "b t (c w) -> b t c w", c=6)

    def logits(self, x: jax.Array, classes: jax.Array) -> jax.Array:
        """Maps the last block's output `[B, n, W]` and `class_vectors` to logits `[B, n, K]`."""
        return self.head(self._before_head(x, classes))

    def _before_head(self, x, classes):
        x = self.norm_out(x)
        if self.config.adaln != "none":
            shift, scale = jnp.split(self.modulation_out(nn.silu(classes)), 2, axis=-1)
            x = x * (1 + scale) + shift
        return x


class Decoder:
    """Computes the logits of a `Generator` one code at a time, for a batch of classes.

    Blocks are unrolled, because a scan would copy slices of the stacked parameters at every step.
    """

    def __init__(
        self, config: GeneratorConfig, params: Any, classes: jax.Array, dtype: layers.Dtype
    ):
        self._config, self._classes, self._dtype = config, classes, dtype
        # Products of few rows are bound by reading their kernels. On CPUs they run side by side.
        self._form = "plain" if sharding.platform() == "cpu" else "decoding"
        stacked = rearranged(params["layers"]["block"], config, self._form)
        # Decoding is bound by memory bandwidth: casting once to bfloat16 halves what a step reads.
        params, stacked = jax.tree.map_with_path(
            lambda path, array: array.astype(dtype) if path[-1].key == "kernel" else array,
            (params, stacked),
        )
        self._blocks = [
            jax.tree.map(lambda array, i=i: array[i], stacked) for i in range(config.depth)
        ]
        self._apply = functools.partial(Generator(config, dtype=dtype).apply, {"params": params})
        self._first = self._apply(classes, method="class_vectors")
        self._condition = self._apply(self._first, method="condition")
        self._rotation = rotation(config)

    def empty_cache(self, length: int) -> list[layers.Cache]:
        """One `layers.Cache` per block, with room for `length` positions."""
        config = self._config
        shape = (len(self._classes), config.heads, length, config.width // config.heads)
        zeros = jnp.zeros(shape, self._dtype)
        return [layers.Cache(zeros, zeros)] * config.depth

    def step(self, codes: jax.Array, position: jax.Array, cache: list[layers.Cache]):
        """Logits of the code after `position`, float32 `[B, K]`, and the updated cache.

        `codes` `[B]` are the codes at the scalar `position`; at position 0, the class, they are
        ignored. `cache` holds the preceding positions.
        """
        x = self._apply(codes[:, None], position[None], method="code_vectors")
        x = jnp.where(position == 0, self._first, x)
        table = self._rotation
        if table is not None:
            table = jax.lax.dynamic_slice_in_dim(jnp.asarray(table), position, 1)
        block = Block(self._config, form=self._form, dtype=self._dtype)
        decode = functools.partial(block.apply, method="decode")
        updated = []
        for params, kept in zip(self._blocks, cache, strict=True):
            x, kept = decode({"params": params}, x, kept, position, table, self._condition)
            updated.append(kept)
        logits = self._apply(x, self._first, method="logits")
        return logits[:, 0].astype(jnp.float32), updated


def rearranged(block: Any, config: GeneratorConfig, form: Form) -> Any:
    """The parameters of a "plain" `Block`, or of a stack of them, in the given form.

    "joined", for training, has one kernel for the two products that the SwiGLU multiplies, and
    without AdaLN the kernels after a norm contain its gains. Their gradients then need no pass over
    the activations. "decoding" has one kernel for queries, keys and values too. In training, that
    would be copied apart for cuDNN's attention.
    """
    if form == "plain":
        return block
    block, attention = dict(block), dict(block["attention"])
    qkv = [attention.pop(name)["kernel"] for name in QKV]  # [..., W, heads, head_dim]
    mlp = [block.pop(name)["kernel"] for name in ("mlp_gate", "mlp_in")]  # [..., W, hidden]
    if config.adaln == "none":
        gain, gain_mlp = (block.pop(name)["scale"] for name in ("norm_attention", "norm_mlp"))
        qkv = [kernel * gain[..., None, None] for kernel in qkv]
        mlp = [kernel * gain_mlp[..., None] for kernel in mlp]
    if form == "decoding":
        attention["qkv"] = {"kernel": jnp.stack(qkv, -3)}
    else:
        attention |= {name: {"kernel": kernel} for name, kernel in zip(QKV, qkv, strict=True)}
    return block | {"attention": attention, "mlp_joined": {"kernel": jnp.stack(mlp, -2)}}


def param_shapes(config: GeneratorConfig) -> dict:
    """Shapes of a generator's parameters; allocates nothing."""
    codes, classes = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, 1), (1,)))
    return layers.param_shapes(Generator(config), codes, classes)
