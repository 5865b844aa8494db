"""Norms that Flax lacks.

GroupNorm whose statistics survive remat, RMSNorm in forms that accelerators are fast at, BatchNorm
with PyTorch's running statistics, and BatchNorm over parts of a batch.

Statistics are always float32.
"""

import functools
import math

from einops import rearrange
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from gigatok_jax import sharding
from gigatok_jax.models import layers

GROUP = 8  # maximum number of samples that share statistics in a `LocalBatchNorm`
ones = layers.partitioned(nn.initializers.ones, "norm")
zeros = layers.partitioned(nn.initializers.zeros, "norm")


def group_count(channels: int) -> int:
    """32 groups, or fewer in narrow networks, so that a group has at least 4 channels.

    Groups of one channel would remove an image's mean color from every feature.
    """
    return math.gcd(32, max(channels // 4, 1))


class GroupNorm(nn.Module):
    """GroupNorm of `[B, H, W, C]`, eps 1e-6, computed in float32.

    Rematerialization keeps its statistics: they are small, but recomputing them takes a pass over
    the input.
    """

    affine: bool = True  # whether to learn gains and offsets
    silu: bool = False  # whether SiLU follows
    dtype: layers.Dtype = jnp.float32  # of the output

    @nn.compact
    def __call__(
        self, x: jax.Array, gain: jax.Array | None = None, offset: jax.Array | None = None
    ) -> jax.Array:
        """Normalizes; without learned ones, `gain` and `offset` may be given, `[B, 1, 1, C]`."""
        channels = x.shape[-1]
        if self.affine:
            gain = self.param("scale", ones, (channels,))
            offset = self.param("bias", zeros, (channels,))
        statistics = layers.keep(_group_statistics(lax.stop_gradient(x)))
        gain = jnp.ones(channels) if gain is None else gain
        offset = jnp.zeros(channels) if offset is None else offset
        return _normalize(x, *statistics, gain, offset, self.silu, self.dtype)


def _group_mean(means: jax.Array) -> jax.Array:
    """Means over the channels of each group, `[B, C]` to `[B, 1, 1, C]`."""
    channels = means.shape[-1]
    groups = rearrange(means, "b (g c) -> b g c", g=group_count(channels))
    # A sum of slices fuses with what follows, which a reduction does not.
    size = groups.shape[-1]
    total = sum(groups[..., i : i + 1] for i in range(size))
    return jnp.broadcast_to(total / size, groups.shape).reshape(-1, 1, 1, channels)


@functools.partial(jax.jit, inline=True)  # traced once for all layers of a shape
def _group_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and inverse deviation of each channel's group, float32 `[B, 1, 1, C]`."""
    x = x.astype(jnp.float32)
    # Averaging pixels first is faster.
    center, square = _group_mean(x.mean((1, 2))), _group_mean((x * x).mean((1, 2)))
    return center, lax.rsqrt(jnp.maximum(square - center * center, 0) + 1e-6)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _normalize(x, center, inverse, gain, offset, silu, dtype):
    """`(x - center) * inverse * gain + offset`, and SiLU, computed in float32.

    Its gradient includes that through the statistics, and reads `x` and the output's gradient only
    twice: once for two sums of each channel, and once for the result. It is for the reverse mode,
    and once: the statistics are constants to a second derivative.
    """
    y = (x.astype(jnp.float32) - center) * (inverse * gain) + offset
    return (nn.silu(y) if silu else y).astype(dtype)


def _normalize_forward(x, center, inverse, gain, offset, silu, dtype):
    residuals = (x, center, inverse, gain, offset)
    return _normalize(*residuals, silu, dtype), residuals


def _normalize_backward(silu, dtype, residuals, gradient):
    del dtype
    x, center, inverse, gain, offset = residuals
    pixels = x.shape[1] * x.shape[2]
    slope = inverse * gain
    x, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)

    def before_silu(y):
        if not silu:
            return gradient
        sigmoid = nn.sigmoid(y)
        return gradient * (sigmoid * (1 + y * (1 - sigmoid)))

    outer = before_silu((x - center) * slope + offset)
    # Without the barrier, the sum over images would become one over `outer`, another pass over it.
    total = lax.optimization_barrier(outer.sum((1, 2), keepdims=True))
    weighted = (outer * (x - center)).sum((1, 2), keepdims=True) * inverse
    # Of the sums over a group that the statistics are, each element has an equal share.
    mean = _group_mean((total * gain)[:, 0, 0] / pixels)
    slant = _group_mean((weighted * gain)[:, 0, 0] / pixels) * inverse
    if sharding.platform() != "cpu":
        # If this were the same expression, the compiler would store its value for both passes, in
        # float32. Computing it twice from bfloat16 moves a third less.
        outer = before_silu(x * slope + (offset - center * slope))
    x_gradient = slope * outer - inverse * slant * x - inverse * (mean - slant * center)

    def like(array, value):
        return value.sum((0, 1, 2)) if array.ndim == 1 else value

    none = jnp.zeros_like(center)
    return (
        *(x_gradient.astype(residuals[0].dtype), none, none),
        *(like(gain, weighted), like(offset, total)),
    )


_normalize.defvjp(_normalize_forward, _normalize_backward)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, eps 1e-5, computed in float32."""

    dtype: layers.Dtype = jnp.float32  # of the output

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gain = self.param("scale", ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        return (x * (_inverse_rms(x) * gain)).astype(self.dtype)


def _inverse_rms(x: jax.Array) -> jax.Array:
    return lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


@jax.custom_vjp
def rms_normalize(x: jax.Array) -> jax.Array:
    """RMSNorm without gains, of the input's type.

    Its gradient reads the input and the output's gradient twice: for sums, and for the result.
    """
    return (x * _inverse_rms(x.astype(jnp.float32))).astype(x.dtype)


def _rms_normalize_forward(x):
    return rms_normalize(x), x


def _rms_normalize_backward(x, gradient):
    dtype, x, gradient = x.dtype, x.astype(jnp.float32), gradient.astype(jnp.float32)
    inverse = _inverse_rms(x)
    along = (gradient * x).mean(-1, keepdims=True) * inverse**3
    return ((gradient * inverse - x * along).astype(dtype),)


rms_normalize.defvjp(_rms_normalize_forward, _rms_normalize_backward)


def defer_rms(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a product takes, and what its result is to be multiplied with, instead of an RMSNorm.

    The normalized array is never stored. Only linear products may take the first result, because
    its gradient includes the one through the second.
    """
    return _deferred(x), lax.stop_gradient(_inverse_rms(x.astype(jnp.float32)))


@jax.custom_vjp
def _deferred(x):
    return x


def _deferred_backward(x, gradient):
    # What arrives is the gradient of the normalized array, times the inverse.
    dtype, x, gradient = x.dtype, x.astype(jnp.float32), gradient.astype(jnp.float32)
    along = (gradient * x).mean(-1, keepdims=True) * jnp.square(_inverse_rms(x))
    return ((gradient - x * along).astype(dtype),)


_deferred.defvjp(lambda x: (x, x), _deferred_backward)


class BatchNorm(nn.Module):
    """BatchNorm with PyTorch's running statistics: momentum 0.1, unbiased variance.

    Under `jit`, statistics are those of the global batch on any mesh. The reference normalizes each
    device's part of the batch separately; `groups` reproduces this.
    """

    groups: int = 1  # equal parts of a training batch; only the first updates running statistics
    epsilon: float = 1e-5
    affine: bool = True  # whether to learn gains and offsets
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        width = x.shape[-1]

        def scale_init(key, shape):
            return 1 + 0.02 * jax.random.normal(key, shape)

        scale, bias = 1.0, 0.0
        if self.affine:
            scale = self.param("scale", layers.partitioned(scale_init, "norm"), (width,))
            bias = self.param("bias", zeros, (width,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,))
        if train:
            y = x.astype(jnp.float32).reshape(self.groups, -1, width)
            mean, var, count = y.mean(1), y.var(1), y.shape[1]
            if not self.is_initializing():
                running_mean.value += 0.1 * (lax.stop_gradient(mean[0]) - running_mean.value)
                unbiased = lax.stop_gradient(var[0]) * count / (count - 1)
                running_var.value += 0.1 * (unbiased - running_var.value)
        else:
            y, mean, var = x, running_mean.value, running_var.value
        gain = scale * lax.rsqrt(var + self.epsilon)
        shift = bias - mean * gain
        if train:
            y = x.reshape(y.shape)
            gain, shift = gain[:, None], shift[:, None]
        return (y * gain + shift).astype(self.dtype).reshape(x.shape)


def batch_groups(batch_size: int) -> int:
    """Number of groups, of at most `GROUP` samples, into which `LocalBatchNorm` splits a batch.

    Raises:
      ValueError: the groups would differ in size.
    """
    groups = math.ceil(batch_size / GROUP)
    if batch_size % groups:
        raise ValueError(
            f"batch_size: expected equal groups of at most {GROUP} images for the dino "
            f"discriminator, got {batch_size}"
        )
    return groups


class LocalBatchNorm(nn.Module):
    """BatchNorm of each group of consecutive samples, in evaluation too; eps 1e-6.

    Under `jit`, groups are parts of the global batch, so results are the same on any mesh.
    """

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, groups = x.shape[-1], batch_groups(len(x))
        scale, bias = self.param("scale", ones, (width,)), self.param("bias", zeros, (width,))
        y = rearrange(x.astype(jnp.float32), "(g n) t w -> g (n t) w", g=groups)
        mean, var = y.mean(1, keepdims=True), y.var(1, keepdims=True)
        y = (y - mean) * lax.rsqrt(var + 1e-6) * scale + bias
        return rearrange(y, "g (n t) w -> (g n) t w", n=len(x) // groups).astype(self.dtype)
