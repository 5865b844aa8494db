"""The convolutional half of the hybrid tokenizer (paper, 4.1); images are NHWC.

The encoder halves the resolution after every level but the last; the decoder doubles it after every
level but its last. Images of 256 pixels become a 16x16 grid of features, and back.
"""

import functools

from einops import rearrange
import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.models import layers
from gigatok_jax.models.norms import GroupNorm


def norm_silu(*, remat: str, dtype: layers.Dtype, name: str | None) -> GroupNorm:
    """GroupNorm and SiLU. "dots" recomputes them from the convolution outputs that it keeps."""
    module = layers.remat(GroupNorm, "full" if remat == "dots" else "none")
    return module(silu=True, dtype=dtype, name=name)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, plus the input (through a 1x1 conv if the width changes)."""

    features: int
    dropout: float = 0.0
    remat: str = "none"
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(norm_silu, remat=self.remat, dtype=self.dtype)
        conv = functools.partial(layers.conv, self.features, dtype=self.dtype)
        y = conv(name="conv1")(norm(name="norm1")(x))
        y = norm(name="norm2")(y)
        y = layers.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        y = conv(name="conv2")(y)
        if x.shape[-1] != self.features:
            x = conv(1, name="shortcut")(x)
        return x + y


def residual_block(dropout: float, remat: str, dtype: layers.Dtype) -> functools.partial:
    """`ResidualBlock` with options; "full" keeps only a block's input and its norms' statistics."""
    module = layers.remat(ResidualBlock, "full" if remat == "full" else "none")
    return functools.partial(module, dropout=dropout, remat=remat, dtype=dtype)


class AdaptiveGroupNorm(nn.Module):
    """GroupNorm whose gain and bias are linear in a style grid's deviation and mean over pixels."""

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, style: jax.Array) -> jax.Array:
        style = rearrange(style, "b h w c -> b (h w) c").astype(jnp.float32)
        deviation = jnp.sqrt(style.var(1, ddof=1) + 1e-6)
        linear = functools.partial(
            layers.dense, x.shape[-1], ("conv_in", "conv_out"), dtype=self.dtype
        )
        gain, bias = linear(name="gain")(deviation), linear(name="bias")(style.mean(1))
        gain, bias = (y[:, None, None].astype(jnp.float32) for y in (gain, bias))
        return GroupNorm(affine=False, dtype=self.dtype, name="norm")(x, gain, bias)


class Encoder(nn.Module):
    """Maps images `[B, H, W, 3]` to features `[B, H/f, W/f, z_channels]`, f = 2^(levels - 1)."""

    channels: tuple[int, ...]  # of each level
    residual_blocks: int  # per level
    z_channels: int
    dropout: float = 0.0
    remat: str = "none"
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        conv = functools.partial(layers.conv, dtype=self.dtype)
        block = residual_block(self.dropout, self.remat, self.dtype)

        x = conv(self.channels[0], name="conv_in")(images)
        for level, features in enumerate(self.channels):
            for i in range(self.residual_blocks):
                x = block(features, name=f"level{level}_block{i}")(x)
            if level < len(self.channels) - 1:
                # Padding below and on the right only, as in the reference.
                halve = {"strides": 2, "padding": ((0, 1), (0, 1))}
                x = conv(features, **halve, name=f"level{level}_down")(x)
        for i in range(2):
            x = block(self.channels[-1], name=f"mid_block{i}")(x)
        x = norm_silu(remat=self.remat, dtype=self.dtype, name="norm_out")(x)
        return conv(self.z_channels, name="conv_out")(x)


class Decoder(nn.Module):
    """Maps features `[B, h, w, z_channels]` to images `[B, h*f, w*f, 3]`, not clipped.

    The input is also the style of every level's adaptive GroupNorm.
    """

    channels: tuple[int, ...]  # of each level, starting at full resolution
    residual_blocks: int  # per level of the encoder; the decoder has one more
    dropout: float = 0.0
    remat: str = "none"
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, style: jax.Array) -> jax.Array:
        conv = functools.partial(layers.conv, dtype=self.dtype)
        block = residual_block(self.dropout, self.remat, self.dtype)

        x = conv(self.channels[-1], name="conv_in")(style)
        for i in range(2):
            x = block(self.channels[-1], name=f"mid_block{i}")(x)
        for level, features in reversed(list(enumerate(self.channels))):
            x = AdaptiveGroupNorm(self.dtype, name=f"level{level}_adaptive")(x, style)
            for i in range(self.residual_blocks + 1):
                x = block(features, name=f"level{level}_block{i}")(x)
            if level > 0:
                x = conv(4 * features, name=f"level{level}_up")(x)
                x = rearrange(x, "b h w (r s c) -> b (h r) (w s) c", r=2, s=2)
        x = norm_silu(remat=self.remat, dtype=self.dtype, name="norm_out")(x)
        return conv(3, name="conv_out")(x)
