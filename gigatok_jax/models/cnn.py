"""The convolutional half of the hybrid tokenizer (paper, 4.1); images are NHWC."""

import math

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax import sharding
from gigatok_jax.models import layers
from gigatok_jax.models.convolution import conv_general_dilated


def group_count(channels: int) -> int:
    """32 groups, or fewer where a narrow network would have fewer than 4 channels a group.

    Groups of one channel would take an image's mean colour out of every feature.
    """
    return math.gcd(32, max(channels // 4, 1))


class GroupNorm(nn.Module):
    """GroupNorm of `[B, H, W, C]`, eps 1e-6, all in float32.

    Its statistics are kept where all else is computed again; they are small and take a pass over
    the input.

    Attributes:
      affine: whether there are learned gains and offsets.
      silu: whether SiLU follows.
      dtype: of the output.
    """

    affine: bool = True
    silu: bool = False
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = x.astype(jnp.float32)

        def mean(x):
            """Over the pixels first, which keeps channels together; `[B, 1, 1, C]`."""
            means = rearrange(x.mean((1, 2)), "b (g c) -> b g c", g=group_count(channels))
            means = jnp.broadcast_to(means.mean(-1, keepdims=True), means.shape)
            return means.reshape(-1, 1, 1, channels)

        center, square = layers.keep((mean(x), mean(x * x)))
        scale = jax.lax.rsqrt(jnp.maximum(square - center * center, 0) + 1e-6)
        if self.affine:
            ones, zeros = nn.initializers.ones, nn.initializers.zeros
            scale *= self.param("scale", layers.partitioned(ones, "norm"), (channels,))
        x = (x - center) * scale
        if self.affine:
            x += self.param("bias", layers.partitioned(zeros, "norm"), (channels,))
        return (nn.silu(x) if self.silu else x).astype(self.dtype)


def norm_silu(*, remat: str, dtype, name: str) -> GroupNorm:
    """GroupNorm and SiLU; "dots" keeps convolutions' outputs and computes what is between again."""
    module = layers.remat(GroupNorm, "full" if remat == "dots" else "none")
    return module(silu=True, dtype=dtype, name=name)


def remat_blocks(remat: str) -> type[nn.Module]:
    """The residual block's class; "full" keeps nothing but its input."""
    return layers.remat(ResidualBlock, "full" if remat == "full" else "none")


def conv(features: int, size: int = 3, *, stride: int = 1, padding=None, dtype, name: str):
    """A square convolution that keeps the extent (`padding` defaults to size // 2)."""
    padding = ((size // 2, size // 2),) * 2 if padding is None else padding
    axes = (None, None, "conv_in", "conv_out")
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=padding,
        dtype=dtype,
        conv_general_dilated=conv_general_dilated,
        kernel_init=layers.partitioned(layers.default_init, *axes),
        promote_dtype=sharding.promote(*axes),
        bias_init=layers.partitioned(nn.initializers.zeros, "norm"),
        name=name,
    )


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, plus the input (through a 1x1 conv if the width changes)."""

    features: int
    dropout: float = 0.0
    remat: str = "none"
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = norm_silu(remat=self.remat, dtype=self.dtype, name="norm1")(x)
        y = conv(self.features, dtype=self.dtype, name="conv1")(y)
        y = norm_silu(remat=self.remat, dtype=self.dtype, name="norm2")(y)
        y = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        y = conv(self.features, dtype=self.dtype, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, dtype=self.dtype, name="shortcut")(x)
        return x + y


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm whose gain and bias are linear in the deviation and mean of a style grid."""

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, style: jax.Array) -> jax.Array:
        style = rearrange(style, "b h w c -> b (h w) c").astype(jnp.float32)
        deviation = jnp.sqrt(style.var(1, ddof=1) + 1e-6)
        channels = x.shape[-1]
        axes = ("conv_in", "conv_out")
        gain = layers.dense(channels, axes, dtype=self.dtype, name="gain")(deviation)
        bias = layers.dense(channels, axes, dtype=self.dtype, name="bias")(style.mean(1))
        x = GroupNorm(affine=False, dtype=self.dtype, name="norm")(x)
        return x * gain[:, None, None] + bias[:, None, None]


class Encoder(nn.Module):
    """Image `[B, H, W, 3]` to features `[B, H/f, W/f, z_channels]`, f = 2^(levels - 1)."""

    channels: tuple[int, ...]
    residual_blocks: int
    z_channels: int
    dropout: float = 0.0
    remat: str = "none"
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        residual = remat_blocks(self.remat)

        def block(features, name):
            return residual(features, self.dropout, self.remat, self.dtype, name=name)

        x = conv(self.channels[0], dtype=self.dtype, name="conv_in")(images)
        for level, features in enumerate(self.channels):
            for i in range(self.residual_blocks):
                x = block(features, f"level{level}_block{i}")(x)
            if level < len(self.channels) - 1:
                down = conv(
                    features,
                    stride=2,
                    padding=((0, 1), (0, 1)),
                    dtype=self.dtype,
                    name=f"level{level}_down",
                )
                x = down(x)
        for i in range(2):
            x = block(self.channels[-1], f"mid_block{i}")(x)
        x = norm_silu(remat=self.remat, dtype=self.dtype, name="norm_out")(x)
        return conv(self.z_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Features `[B, h, w, z_channels]` to an image `[B, h*f, w*f, 3]`, not squashed.

    The input is also the style of every level's adaptive GroupNorm.
    """

    channels: tuple[int, ...]
    residual_blocks: int
    dropout: float = 0.0
    remat: str = "none"
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, style: jax.Array) -> jax.Array:
        residual = remat_blocks(self.remat)

        def block(features, name):
            return residual(features, self.dropout, self.remat, self.dtype, name=name)

        x = conv(self.channels[-1], dtype=self.dtype, name="conv_in")(style)
        for i in range(2):
            x = block(self.channels[-1], f"mid_block{i}")(x)
        for level, features in reversed(list(enumerate(self.channels))):
            x = AdaptiveGroupNorm(self.dtype, name=f"level{level}_adaptive")(x, style)
            for i in range(self.residual_blocks + 1):
                x = block(features, f"level{level}_block{i}")(x)
            if level > 0:
                x = conv(4 * features, dtype=self.dtype, name=f"level{level}_up")(x)
                x = layers.depth_to_space(x)
        x = norm_silu(remat=self.remat, dtype=self.dtype, name="norm_out")(x)
        return conv(3, dtype=self.dtype, name="conv_out")(x)
