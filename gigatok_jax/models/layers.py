"""Shared building blocks: linear layers, convolutions, attention, the transformer stack.

Every parameter names its *logical* axes ("embed", "heads", "mlp", ...), which `sharding.RULES` maps
to mesh axes. Parameters are float32; `dtype` is the type of the computation.

The parameters of a transformer's blocks are stacked along a leading axis `layers` and scanned, so
that 48 layers compile as fast as 6.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

from einops import rearrange
import flax.linen as nn
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from gigatok_jax import sharding
from gigatok_jax.models import splash
from gigatok_jax.models.convolution import conv_general_dilated

Dtype = Any
DTYPES = ("auto", "float32", "bfloat16")

# The reference's trunc_normal_(std=0.02) truncates at +-2, a hundred standard deviations, and so
# in effect not at all.
INIT_STD = 0.02
default_init = nn.initializers.normal(INIT_STD)

KEPT, INPUTS = "statistics", "inputs of products"


def _dots(primitive: Any, *args: Any, **kwargs: Any) -> bool:
    """Keeps products with weights, and the results of flash attention, which is as dear."""
    if primitive.name == "name" and kwargs["name"] in (INPUTS, splash.RESIDUALS):
        return True
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **kwargs)


REMAT_POLICIES = {
    "dots": _dots,
    "full": jax.checkpoint_policies.save_only_these_names(KEPT),
}


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU; except on CPUs, its gradient needs only the input."""
    return nn.gelu(x, approximate=False) if sharding.platform() == "cpu" else _gelu(x)


@jax.custom_vjp
def _gelu(x):
    return nn.gelu(x, approximate=False)


def _gelu_backward(x, gradient):
    # By erf, where the value is by erfc: the compiler would store what both have in common.
    x32 = x.astype(jnp.float32)
    below = 0.5 * (1 + lax.erf(x32 * 0.5**0.5))
    density = jnp.exp(-0.5 * x32 * x32) / (2 * np.pi) ** 0.5
    return ((gradient * (below + x32 * density)).astype(x.dtype),)


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)

ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # in OpenAI's and DFN's CLIP
}


def compute_dtype(name: str) -> Dtype:
    """The type of the computation; "auto" is float32 on CPUs and bfloat16 elsewhere.

    Parameters, losses, norm statistics, softmax and the code search are always float32.

    Raises:
      ValueError: the name is not one of `DTYPES`.
    """
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(name)


def param_shapes(module: nn.Module, *inputs: Any) -> dict:
    """Shapes of a module's parameters, without logical axes; allocates nothing.

    An input is a `jax.ShapeDtypeStruct` or the shape of a float32 array.
    """
    return jax.tree.map(lambda leaf: leaf, _param_shapes(module, *inputs))  # the caller's own


@functools.lru_cache(maxsize=64)  # each bundle that is read asks, and tracing takes a second
def _param_shapes(module: nn.Module, *inputs: Any) -> dict:
    inputs = [jax.ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple) else x for x in inputs]
    return nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"])


def partitioned(init, *axes: str | None):
    """Attaches logical axis names to a parameter initializer."""
    return nn.with_logical_partitioning(init, axes)


def uniform(bound: float):
    """Uniform in [-bound, bound). PyTorch's Linear has bound = fan_in^-0.5."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def remat(module: type[nn.Module], policy: str, *, barrier: bool = True) -> type[nn.Module]:
    """Wraps a module class so that the backward pass recomputes activations.

    The policy "none" keeps all activations; "dots" keeps products with weights, the results of
    flash attention, and what `keep_product` marks; "full" keeps only inputs and the arrays that
    `keep` marks. Without a `barrier`, and outside a scan, the compiler may merge what is recomputed
    with its first computation, and so store it after all.
    """
    if policy == "none":
        return module
    return nn.remat(module, policy=REMAT_POLICIES[policy], prevent_cse=barrier)


def keep_product(x: jax.Array) -> jax.Array:
    """Marks an input of a product, so that "dots" keeps it on GPUs.

    There it is written to memory in any case. Elsewhere, it would take a place in a scan's stack.
    """
    return checkpoint_name(x, INPUTS) if sharding.platform() == "gpu" else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fan_out(x: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """The same array for `count` products.

    The sum of their gradients has the newest product first, so that cuBLAS adds the sum so far.
    """
    return (x,) * count


def _fan_out_forward(x, count):
    return fan_out(x, count), None


def _fan_out_backward(count, _, gradients):
    return (functools.reduce(lambda total, gradient: gradient + total, gradients),)


fan_out.defvjp(_fan_out_forward, _fan_out_backward)


def keep(arrays: Any) -> Any:
    """Marks small arrays for "full" to keep besides inputs; other policies ignore the mark."""
    return checkpoint_name(arrays, KEPT)


def dense(
    features: int | tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    axis: int | tuple[int, ...] = -1,
    kernel_init: Callable = default_init,
    bias_init: Callable = nn.initializers.zeros,
    bias_axes: tuple[str | None, ...] | None = None,
    dtype: Dtype,
    name: str,
    **kwargs,
):
    """A Linear layer from `axis` to `features` whose kernel has the logical axes `axes`.

    The bias has the logical axes of the features, unless `bias_axes` overrides them.
    """
    count = len(features) if isinstance(features, tuple) else 1
    return nn.DenseGeneral(
        features,
        axis,
        dtype=dtype,
        kernel_init=partitioned(kernel_init, *axes),
        bias_init=partitioned(bias_init, *(bias_axes or axes[-count:])),
        promote_dtype=sharding.promote(*axes),
        name=name,
        **kwargs,
    )


def conv(
    features: int,
    size: int | tuple[int, int] = 3,
    axes: tuple[str, str] = ("conv_in", "conv_out"),
    *,
    padding: Any = None,
    trained: bool = True,
    dtype: Dtype,
    name: str,
    **kwargs,
):
    """A convolution whose kernel `[h, w, in, out]` has the logical axes `axes` on its last two.

    The default `padding` preserves the resolution. Networks that are not `trained` use XLA's own
    convolution: `models.convolution` would compute a weight gradient in every backward pass.
    """
    height, width = (size, size) if isinstance(size, int) else size
    axes = (None, None, *axes)
    return nn.Conv(
        features,
        (height, width),
        padding=((height // 2,) * 2, (width // 2,) * 2) if padding is None else padding,
        dtype=dtype,
        kernel_init=partitioned(default_init, *axes),
        bias_init=partitioned(nn.initializers.zeros, "norm"),
        promote_dtype=sharding.promote(*axes),
        conv_general_dilated=conv_general_dilated if trained else lax.conv_general_dilated,
        name=name,
        **kwargs,
    )


def layer_norm(*, epsilon: float = 1e-5, dtype: Dtype, name: str) -> nn.LayerNorm:
    """LayerNorm over the last axis, with float32 statistics."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        scale_init=partitioned(nn.initializers.ones, "norm"),
        bias_init=partitioned(nn.initializers.zeros, "norm"),
        name=name,
    )


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, **kwargs) -> jax.Array:
    """Attention over `[B, T, heads, head_dim]`, with a flash kernel where one applies."""
    if splash.applies(q, k):
        return splash.attention(q, k, v, **kwargs)
    implementation = "cudnn" if _flash_applies(q.dtype, q.shape[-1]) else "xla"
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **kwargs)


def _flash_applies(dtype: Dtype, head_dim: int) -> bool:
    """Whether cuDNN has a kernel: half precision, Ampere or newer, head_dim of up to 128."""
    if sharding.platform() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    capability = getattr(sharding.target(), "compute_capability", "0")  # AMD: "gfx942"
    recent = capability.replace(".", "").isdigit() and float(capability) >= 8
    return recent and head_dim % 8 == 0 and head_dim <= 128


def constrain(x: jax.Array) -> jax.Array:
    """Constrains the sharding of activations `[B, T, W]`."""
    return sharding.constrain(x, "batch", "length", "activation_embed")


class Dropout(nn.Module):
    """Sets a share of the elements to zero, and scales the others; needs the rng "dropout".

    Masks come from a hash of each element's place: unlike JAX's random numbers, it is cheap enough
    to be computed wherever the mask is needed, instead of being stored.
    """

    rate: float
    deterministic: bool = False  # whether to do nothing

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.deterministic or not self.rate:
            return x
        words = jax.random.key_data(self.make_rng("dropout")).reshape(-1)[-2:]
        return _drop(x, words, self.rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drop(x, words, rate):
    return _masked(x, _hash(x.shape, words), rate)


def _drop_forward(x, words, rate):
    return _drop(x, words, rate), words


def _drop_backward(rate, words, gradient):
    # Except on CPUs, the same bits by another expression: for one that it meets twice, the compiler
    # would store the masks after all.
    bits = _hash(gradient.shape, words, factor_first=sharding.platform() == "cpu")
    return _masked(gradient, bits, rate), None


_drop.defvjp(_drop_forward, _drop_backward)


def _masked(x, bits, rate):
    return jnp.where(bits >= jnp.uint32(rate * 2**32), x / (1 - rate), jnp.zeros_like(x))


def _hash(shape: tuple[int, ...], words: jax.Array, *, factor_first: bool = True) -> jax.Array:
    """Random uint32 of each element: its place and two words, through a hash of two rounds."""
    factor, inverse = 0x9E3779B1, pow(0x9E3779B1, -1, 2**32)
    bits = sharding.places(shape)
    for word in words:
        if factor_first:
            bits = bits * jnp.uint32(factor) + word
        else:
            bits = (bits + word * jnp.uint32(inverse)) * jnp.uint32(factor)
        bits = (bits ^ (bits >> 16)) * jnp.uint32(0x21F0AAAD)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x735A2D97)
        bits ^= bits >> 15
    return bits


class Cache(NamedTuple):
    """Keys and values of one attention layer, in the order in which `decode` multiplies them."""

    keys: jax.Array  # [B, heads, T, head_dim]
    values: jax.Array  # [B, heads, T, head_dim]


def rotary_table(positions: np.ndarray, head_dim: int, base: float = 10_000.0) -> np.ndarray:
    """Cosines and sines of rotary position embeddings, float32 `[T, head_dim / 2, 2]`.

    Each axis of the positions `[T, axes]` rotates an equal share of a head's pairs of adjacent
    dimensions; frequencies are powers of `base`.
    """
    dims = head_dim // positions.shape[1]
    frequencies = base ** (-np.arange(0, dims, 2) / dims)
    angles = rearrange(positions[..., None] * frequencies, "t a f -> t (a f)")
    return np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates adjacent pairs of `[B, T, heads, head_dim]` by a `rotary_table` of T rows."""
    a, b = x[..., ::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cosine, sine = table[:, None, :, 0], table[:, None, :, 1]
    pairs = jnp.stack([a * cosine - b * sine, b * cosine + a * sine], -1)
    return pairs.reshape(x.shape).astype(x.dtype)


class Projection(nn.Module):
    """A Linear layer from `[..., W]` to `[..., heads, head_dim]`, or with more axes before these.

    Unlike in `nn.DenseGeneral`, the product has one axis of features while the bias is added, so
    that cuBLAS adds it.
    """

    shape: tuple[int, ...]
    bias: bool
    kernel_init: Callable
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, features = x.shape[-1], math.prod(self.shape)
        axes = (*(None,) * (len(self.shape) - 2), "heads", "head_dim")

        def flat_init(key, shape, dtype=jnp.float32):
            return self.kernel_init(key, (width, features), dtype).reshape(shape)

        kernel_init = partitioned(flat_init, "embed", *axes)
        kernel, bias = self.param("kernel", kernel_init, (width, *self.shape)), None
        if self.bias:
            bias = self.param("bias", partitioned(nn.initializers.zeros, *axes), self.shape)
        promote = sharding.promote("embed", *axes)
        x, kernel, bias = promote(x, kernel, bias, dtype=self.dtype)
        y = x @ kernel.reshape(width, features)
        if bias is not None:
            y += bias.reshape(features)
        return y.reshape(*y.shape[:-1], *self.shape)


class Attention(nn.Module):
    """Multi-head attention with separate inputs for queries, keys and values."""

    width: int
    heads: int
    bias: bool = True  # of all four projections
    kernel_init: Callable | None = None  # of q, k and v; None: PyTorch's, see `setup`
    qk_norm: bool = False  # LayerNorm over the dimensions of each head's queries and keys
    joined: bool = False  # whether one kernel, "qkv", has those of query, key and value
    dtype: Dtype = jnp.float32

    def setup(self):
        # PyTorch draws q, k and v as one Xavier-uniform [3W, W] matrix.
        init = self.kernel_init or uniform((6 / (4 * self.width)) ** 0.5)
        shape = (self.heads, self.width // self.heads)
        project = functools.partial(Projection, shape, self.bias, init, self.dtype)
        if self.joined:
            self.qkv = Projection((3, *shape), self.bias, init, self.dtype)
        else:
            self.query, self.key, self.value = project(), project(), project()
        self.out = dense(
            self.width,
            ("heads", "head_dim", "embed"),
            axis=(-2, -1),
            bias_axes=("norm",),
            use_bias=self.bias,
            dtype=self.dtype,
            name="out",
        )
        if self.qk_norm:
            self.query_norm = layer_norm(dtype=self.dtype, name="query_norm")
            self.key_norm = layer_norm(dtype=self.dtype, name="key_norm")

    def _project(self, query, key, value, rotation):
        if query is key is value:
            query, key, value = fan_out(query, 3)
        if self.joined:
            q, k, v = jnp.moveaxis(self.qkv(query), -3, 0)
        else:
            q, k, v = self.query(query), self.key(key), self.value(value)
        if self.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v

    def __call__(self, query, key, value, *, causal: bool = False, rotation=None) -> jax.Array:
        """Maps `[B, T, W]`, `[B, S, W]`, `[B, S, W]` to `[B, T, W]`.

        If `causal`, position t attends to keys up to t only; `rotation` is a `rotary_table`.
        """
        q, k, v = self._project(query, key, value, rotation)
        return self.out(dot_product_attention(q, k, v, is_causal=causal))

    def decode(self, x, cache: Cache, position, rotation=None) -> tuple[jax.Array, Cache]:
        """Causal self-attention of the next position `[B, 1, W]`.

        Returns its output `[B, 1, W]`, and the cache with the scalar `position` filled in. Later
        positions of the cache are masked. `rotation` is this position's row of the `rotary_table`.
        """
        q, k, v = self._project(x, x, x, rotation)
        q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
        insert = lax.dynamic_update_slice_in_dim
        keys = insert(cache.keys, k.astype(cache.keys.dtype), position, axis=2)
        values = insert(cache.values, v.astype(cache.values.dtype), position, axis=2)
        scores = jnp.einsum("bhqd,bhtd->bhqt", q, keys, preferred_element_type=jnp.float32)
        seen = jnp.arange(keys.shape[2]) <= position
        weights = jax.nn.softmax(jnp.where(seen, scores * q.shape[-1] ** -0.5, -jnp.inf))
        x = jnp.einsum("bhqt,bhtd->bhqd", weights.astype(values.dtype), values)
        return self.out(rearrange(x, "b h t d -> b t h d")), Cache(keys, values)


class Block(nn.Module):
    """Pre-norm transformer layer: self-attention, cross-attention if given a memory, MLP.

    Positions are added to queries and keys only, as in DETR (paper, appendix C).
    """

    heads: int
    epsilon: float = 1e-5  # of the norms
    layer_scale: bool = False  # DINOv2's learned gain per channel of each branch
    mlp_width: int | None = None  # None: four times the input's
    activation: str = "gelu"  # of the MLP, a key of `ACTIVATIONS`
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, memory=None, positions=None, memory_positions=None):
        width = x.shape[-1]

        def norm(name):
            return layer_norm(epsilon=self.epsilon, dtype=self.dtype, name=name)(x)

        def attention(name):
            return Attention(width, self.heads, dtype=self.dtype, name=name)

        def add(x, branch, name):
            if self.layer_scale:
                init = partitioned(nn.initializers.constant(1e-5), "norm")
                branch = branch * self.param(name, init, (width,)).astype(self.dtype)
            return constrain(x + branch)

        def with_positions(x, positions):
            return x if positions is None else x + positions.astype(x.dtype)

        y = norm("norm_self")
        q = with_positions(y, positions)
        x = add(x, attention("self_attention")(q, q, y), "scale_self")
        if memory is not None:
            q = with_positions(norm("norm_cross"), positions)
            k = with_positions(memory, memory_positions)
            x = add(x, attention("cross_attention")(q, k, memory), "scale_cross")
        y = norm("norm_mlp")
        hidden = self.mlp_width or 4 * width
        y = dense(hidden, ("embed", "mlp"), dtype=self.dtype, name="mlp_in")(y)
        y = ACTIVATIONS[self.activation](y)
        y = dense(width, ("mlp", "embed"), dtype=self.dtype, name="mlp_out")(y)
        return add(x, y, "scale_mlp")


class Transformer(nn.Module):
    """`depth` blocks, their parameters stacked on a leading `layers` axis and scanned."""

    depth: int
    block: functools.partial  # a module class with its options
    remat: str = "none"  # see `remat`

    @nn.compact
    def __call__(
        self, x: jax.Array, *shared, taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Maps `[B, T, W]` to the outputs of the last layer and of the layers in `taps`.

        Layers are counted from 1 (0: the input). All of them also receive `shared`.
        """
        # Unrolled, layers take longer to compile, but a scan copies all that the backward pass
        # needs into stacks and out of them: a sixth of the bytes that a generator's step moves.
        # With "full" remat that is little.
        unrolled = sharding.platform() == "gpu" and self.remat != "full"
        # What "dots" recomputes is cheap. Barriers would cost more, in passes over memory.
        block = remat(self.block.func, self.remat, barrier=False)

        def body(module, carry, index, *shared):
            x, tapped = carry
            if unrolled:
                x = sharding.row_major(x)
            x = block(**self.block.keywords, name="block")(x, *shared)
            # Selecting in the carry stores one array per tap instead of every layer's output.
            tapped = tuple(jnp.where(index == t, x, y) for t, y in zip(taps, tapped, strict=True))
            return (x, tapped), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0,) + (nn.broadcast,) * len(shared),
            length=self.depth,
            unroll=self.depth if unrolled else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        carry = (x, (x,) * len(taps))
        (x, tapped), _ = scan(self, carry, jnp.arange(1, self.depth + 1), *shared)
        return x, tapped
