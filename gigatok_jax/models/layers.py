"""The transformer stack that every model here is made of, with logical axis names throughout.

Modules name *logical* axes only (`embed`, `heads`, `mlp`, ...); `training.partitioning` maps them
to the mesh.  Parameters are float32; `dtype` is the type of the computation between them.
"""

from typing import Any

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = Any

# PyTorch's trunc_normal_(std=0.02) cuts at +-2, a hundred deviations: in effect a normal.
INIT_STD = 0.02
default_init = nn.initializers.normal(INIT_STD)

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMAT = ("none", *REMAT_POLICIES)


def partitioned(init, *axes: str | None):
    """Attaches logical axis names to a parameter initializer."""
    return nn.with_logical_partitioning(init, axes)


def remat(module: type[nn.Module], policy: str, *, scanned: bool = False) -> type[nn.Module]:
    """Wraps `module` so that its activations are recomputed in the backward pass.

    Args:
      module: a Linen module class.
      policy: "none" keeps all activations, "dots" keeps products with weights (convolutions are
        none), "full" keeps only inputs.
      scanned: the module is the body of a scan, where XLA cannot merge the recomputation away.
    """
    if policy == "none":
        return module
    return nn.remat(module, policy=REMAT_POLICIES[policy], prevent_cse=not scanned)


def dense(features: int, axes: tuple[str | None, str | None], *, dtype: Dtype, name: str, **kwargs):
    """A Linear layer whose `[in, out]` kernel carries the logical `axes`."""
    kernel_init = kwargs.pop("kernel_init", default_init)
    bias_init = kwargs.pop("bias_init", nn.initializers.zeros)
    return nn.Dense(
        features,
        dtype=dtype,
        kernel_init=partitioned(kernel_init, *axes),
        bias_init=partitioned(bias_init, axes[1]),
        name=name,
        **kwargs,
    )


def layer_norm(*, epsilon: float = 1e-5, dtype: Dtype, name: str) -> nn.LayerNorm:
    """LayerNorm over the last axis, statistics in float32."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        scale_init=partitioned(nn.initializers.ones, "norm"),
        bias_init=partitioned(nn.initializers.zeros, "norm"),
        name=name,
    )


def packed_xavier_uniform(width: int):
    """Xavier-uniform bound of PyTorch's packed `[3W, W]` q/k/v matrix."""
    bound = (6 / (4 * width)) ** 0.5

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, **kwargs) -> jax.Array:
    """Attention over `[B, T, heads, head_dim]`: cuDNN's flash kernel where it applies, else XLA."""
    implementation = "cudnn" if _flash_applies(q.dtype, q.shape[-1]) else "xla"
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation, **kwargs)


def _flash_applies(dtype: Dtype, head_dim: int) -> bool:
    """Whether cuDNN has a kernel: half precision, Ampere or newer, heads of up to 128."""
    if jax.default_backend() != "gpu" or dtype not in (jnp.bfloat16, jnp.float16):
        return False
    capability = getattr(jax.devices()[0], "compute_capability", "0")  # AMD's have letters in it
    recent = capability.replace(".", "").isdigit() and float(capability) >= 8
    return recent and head_dim % 8 == 0 and head_dim <= 128


class Attention(nn.Module):
    """Multi-head attention with separate inputs for queries, keys and values."""

    heads: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        """Maps `[B, T, W]`, `[B, S, W]`, `[B, S, W]` to `[B, T, W]`."""
        width = query.shape[-1]

        def project(x, name):
            return nn.DenseGeneral(
                (self.heads, width // self.heads),
                dtype=self.dtype,
                kernel_init=partitioned(packed_xavier_uniform(width), "embed", "heads", "head_dim"),
                bias_init=partitioned(nn.initializers.zeros, "heads", "head_dim"),
                name=name,
            )(x)

        q, k, v = project(query, "query"), project(key, "key"), project(value, "value")
        x = dot_product_attention(q, k, v)
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=partitioned(default_init, "heads", "head_dim", "embed"),
            bias_init=partitioned(nn.initializers.zeros, "norm"),
            name="out",
        )(x)


class Block(nn.Module):
    """Pre-norm transformer layer: self-attention, cross-attention if there is a memory, MLP.

    Positions are added to queries and keys only, as in DETR (paper, appendix C).  `layer_scale`
    gives each branch a learned gain a channel (DINOv2's LayerScale).
    """

    heads: int
    epsilon: float = 1e-5
    layer_scale: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, memory=None, positions=None, memory_positions=None):
        width = x.shape[-1]

        def norm(name):
            return layer_norm(epsilon=self.epsilon, dtype=self.dtype, name=name)(x)

        def add(x, branch, name):
            if self.layer_scale:
                init = partitioned(nn.initializers.constant(1e-5), "norm")
                branch = branch * self.param(name, init, (width,)).astype(self.dtype)
            x = nn.with_logical_constraint(x + branch, ("batch", "length", "activation_embed"))
            return x

        def with_positions(x, positions):
            return x if positions is None else x + positions.astype(x.dtype)

        y = norm("norm_self")
        q = with_positions(y, positions)
        x = add(x, Attention(self.heads, self.dtype, name="self_attention")(q, q, y), "scale_self")
        if memory is not None:
            q = with_positions(norm("norm_cross"), positions)
            k = with_positions(memory, memory_positions)
            y = Attention(self.heads, self.dtype, name="cross_attention")(q, k, memory)
            x = add(x, y, "scale_cross")
        y = norm("norm_mlp")
        y = dense(4 * width, ("embed", "mlp"), dtype=self.dtype, name="mlp_in")(y)
        y = nn.gelu(y, approximate=False)
        y = dense(width, ("mlp", "embed"), dtype=self.dtype, name="mlp_out")(y)
        return add(x, y, "scale_mlp")


class Transformer(nn.Module):
    """`depth` blocks, their parameters stacked on a leading `layers` axis and scanned.

    Compile time does not depend on the depth.  `remat` is one of "none", "dots", "full".
    """

    depth: int
    heads: int
    epsilon: float = 1e-5
    layer_scale: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x, memory=None, positions=None, memory_positions=None, *, taps: tuple[int, ...] = ()
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Runs the stack.

        Args:
          x: `[B, T, W]`.
          memory: `[B, S, W]` for cross-attention, or None.
          positions: `[T, W]`, added to queries (and self-attention keys) in every layer.
          memory_positions: `[S, W]`, added to the memory's keys in every layer.
          taps: layers, counted from 1, whose outputs are wanted (0: the input).

        Returns:
          The last layer's output `[B, T, W]`, and the outputs of the layers in `taps`.
        """
        block = remat(Block, self.remat, scanned=True)

        def body(module, carry, index, *args):
            x, tapped = carry
            x = block(self.heads, self.epsilon, self.layer_scale, self.dtype, name="block")(
                x, *args
            )
            # Selecting in the carry keeps one array a tap instead of every layer's output.
            tapped = tuple(jnp.where(index == t, x, y) for t, y in zip(taps, tapped, strict=True))
            return (x, tapped), None

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0,) + (nn.broadcast,) * 3,
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        carry = (x, (x,) * len(taps))
        (x, tapped), _ = scan(
            self, carry, jnp.arange(1, self.depth + 1), memory, positions, memory_positions
        )
        return x, tapped


def pool_queries(grid: jax.Array, count: int) -> jax.Array:
    """Multi-level average pooling that seeds the Q-Former's queries (paper, appendix C).

    Args:
      grid: `[B, H, W, C]`.
      count: number of queries, a power of two.

    Returns:
      `[B, count, C]`: groups of 1, 1, 2, 4, ... count/2 block means, each read row-major.
    """
    groups = []
    for group in range(count.bit_length()):
        level = max(group - 1, 0)
        rows, columns = query_blocks(level)
        means = rearrange(grid, "b (r h) (c w) d -> b r c (h w) d", r=rows, c=columns).mean(
            3, dtype=jnp.float32
        )
        groups.append(rearrange(means, "b r c d -> b (r c) d").astype(grid.dtype))
    return jnp.concatenate(groups, axis=1)


def query_blocks(level: int) -> tuple[int, int]:
    """Rows and columns of blocks into which pooling level `level` splits the grid."""
    return 2 ** (level // 2), 2 ** ((level + 1) // 2)


def depth_to_space(x: jax.Array) -> jax.Array:
    """`[B, H, W, 4C]` to `[B, 2H, 2W, C]`, channels ordered (row, column, channel): DCR."""
    return rearrange(x, "b h w (r s c) -> b (h r) (w s) c", r=2, s=2)
