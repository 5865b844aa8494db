"""The convolutional encoder and decoder of all tokenizers; images are NHWC.

In GigaTok they are the outer half of the hybrid tokenizer (paper, 4.1), and in the VQGAN and its
successors the whole network. The encoder halves the resolution after every level but the last; the
decoder doubles it after every level but its last. Images of 256 pixels become a 16x16 grid of
features, and back.
"""

import dataclasses
import functools
from typing import Literal

from einops import rearrange, repeat
import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.models import layers
from gigatok_jax.models.norms import GroupNorm


@dataclasses.dataclass(frozen=True)
class Design:
    """What sets the CNNs of published tokenizers apart; the defaults are GigaTok's."""

    bias: bool = True  # in residual blocks and the encoder's first convolution
    # What a block's 1x1 convolution reads if the width changes: the block's input, or its result
    # before the sum.
    shortcut: Literal["input", "result"] = "input"
    middle_blocks: int = 2  # beside those of the levels, at the lowest resolution
    attention: bool = False  # after every block of the lowest level, and the first middle block
    more_blocks: int = 1  # of a level in the decoder than in the encoder
    # How a level halves the resolution: a convolution that pads below and on the right only, one
    # that pads all sides, or the means of 2x2 pixels.
    down: Literal["conv", "padded_conv", "pool"] = "conv"
    # How a level doubles it: a convolution to four times the width, whose channels become pixels;
    # or each pixel four times, before a convolution.
    up: Literal["conv_to_space", "nearest"] = "conv_to_space"
    adaptive: bool = True  # whether an `AdaptiveGroupNorm` begins every level of the decoder
    out_kernel: int = 3  # size of the encoder's last convolution


GIGATOK = Design()


class Levels:
    """Base of configurations with `image_size`, `base_channels` and `channel_multipliers`."""

    @property
    def factor(self) -> int:
        """Downsampling factor of the CNN."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> int:
        """Side of the grid of features."""
        return self.image_size // self.factor

    @property
    def channels(self) -> tuple[int, ...]:
        """Width of each level of the CNN."""
        return tuple(self.base_channels * m for m in self.channel_multipliers)


def norm_silu(*, remat: str, dtype: layers.Dtype, name: str | None) -> GroupNorm:
    """GroupNorm and SiLU. "dots" recomputes them from the convolution outputs that it keeps."""
    module = layers.remat(GroupNorm, "full" if remat == "dots" else "none")
    return module(silu=True, dtype=dtype, name=name)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv, twice, plus the input (through a 1x1 conv if the width changes)."""

    features: int
    dropout: float = 0.0
    remat: str = "none"
    bias: bool = True
    shortcut: str = "input"  # see `Design`
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(norm_silu, remat=self.remat, dtype=self.dtype)
        conv = functools.partial(layers.conv, self.features, use_bias=self.bias, dtype=self.dtype)
        y = conv(name="conv1")(norm(name="norm1")(x))
        y = norm(name="norm2")(y)
        y = layers.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(y)
        y = conv(name="conv2")(y)
        if x.shape[-1] != self.features:
            x = conv(1, name="shortcut")(x if self.shortcut == "input" else y)
        return x + y


def residual_block(
    dropout: float, remat: str, dtype: layers.Dtype, design: Design = GIGATOK
) -> functools.partial:
    """`ResidualBlock` with options; "full" keeps only a block's input and its norms' statistics."""
    module = layers.remat(ResidualBlock, "full" if remat == "full" else "none")
    options = {"bias": design.bias, "shortcut": design.shortcut}
    return functools.partial(module, dropout=dropout, remat=remat, dtype=dtype, **options)


class PixelAttention(nn.Module):
    """GroupNorm, attention of one head over all pixels, plus the input."""

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = rearrange(GroupNorm(dtype=self.dtype, name="norm")(x), "b h w c -> b (h w) c")
        y = layers.Attention(x.shape[-1], heads=1, dtype=self.dtype, name="attention")(y, y, y)
        return x + y.reshape(x.shape)


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


def middle(
    x: jax.Array, block: functools.partial, design: Design, dtype: layers.Dtype
) -> jax.Array:
    """The blocks that belong to no level; to be called in an `nn.compact` method."""
    for i in range(design.middle_blocks):
        x = block(x.shape[-1], name=f"mid_block{i}")(x)
        if design.attention and i == 0:
            x = PixelAttention(dtype, name="mid_attention")(x)
    return x


class Encoder(nn.Module):
    """Maps images `[B, H, W, 3]` to features `[B, H/f, W/f, z_channels]`, f = 2^(levels - 1)."""

    channels: tuple[int, ...]  # of each level
    residual_blocks: int  # per level
    z_channels: int
    dropout: float = 0.0
    remat: str = "none"
    design: Design = GIGATOK
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        conv, design = functools.partial(layers.conv, dtype=self.dtype), self.design
        block = residual_block(self.dropout, self.remat, self.dtype, design)
        lowest = len(self.channels) - 1

        x = conv(self.channels[0], use_bias=design.bias, name="conv_in")(images)
        for level, features in enumerate(self.channels):
            for i in range(self.residual_blocks):
                x = block(features, name=f"level{level}_block{i}")(x)
                if design.attention and level == lowest:
                    x = PixelAttention(self.dtype, name=f"level{level}_attention{i}")(x)
            if level < lowest and design.down == "pool":
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            elif level < lowest:
                before = int(design.down == "padded_conv")
                halve = {"strides": 2, "padding": ((before, 1),) * 2}
                x = conv(features, **halve, name=f"level{level}_down")(x)
        x = middle(x, block, design, self.dtype)
        x = norm_silu(remat=self.remat, dtype=self.dtype, name="norm_out")(x)
        return conv(self.z_channels, design.out_kernel, name="conv_out")(x)


class Decoder(nn.Module):
    """Maps features `[B, h, w, z_channels]` to images `[B, h*f, w*f, 3]`, not clipped.

    The input is also the style of every level's adaptive GroupNorm.
    """

    channels: tuple[int, ...]  # of each level, starting at full resolution
    residual_blocks: int  # per level of the encoder
    dropout: float = 0.0
    remat: str = "none"
    design: Design = GIGATOK
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, style: jax.Array) -> jax.Array:
        conv, design = functools.partial(layers.conv, dtype=self.dtype), self.design
        block = residual_block(self.dropout, self.remat, self.dtype, design)
        lowest = len(self.channels) - 1

        x = conv(self.channels[-1], name="conv_in")(style)
        x = middle(x, block, design, self.dtype)
        for level, features in reversed(list(enumerate(self.channels))):
            if design.adaptive:
                x = AdaptiveGroupNorm(self.dtype, name=f"level{level}_adaptive")(x, style)
            for i in range(self.residual_blocks + design.more_blocks):
                x = block(features, name=f"level{level}_block{i}")(x)
                if design.attention and level == lowest:
                    x = PixelAttention(self.dtype, name=f"level{level}_attention{i}")(x)
            if level > 0 and design.up == "nearest":
                x = repeat(x, "b h w c -> b (h r) (w s) c", r=2, s=2)
                x = conv(features, name=f"level{level}_up")(x)
            elif level > 0:
                x = conv(4 * features, name=f"level{level}_up")(x)
                x = rearrange(x, "b h w (r s c) -> b (h r) (w s) c", r=2, s=2)
        x = norm_silu(remat=self.remat, dtype=self.dtype, name="norm_out")(x)
        return conv(3, name="conv_out")(x)
