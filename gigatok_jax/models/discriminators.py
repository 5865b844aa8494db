"""Image discriminators of the adversarial loss: PatchGAN, and heads on a frozen DINO.

Calls in training update the collection `batch_stats`: BatchNorm statistics and singular vectors.
"""

import functools

from einops import rearrange
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from gigatok_jax import sharding
from gigatok_jax.models import layers, resize, vit
from gigatok_jax.models.norms import BatchNorm, LocalBatchNorm


class PatchGAN(nn.Module):
    """Classifies overlapping patches of `[B, H, W, 3]`: logits `[B, h, w, 1]` float32."""

    channels: tuple[int, ...] = (64, 128, 256, 512)  # all but the last two layers have stride 2
    groups: int = 1  # see `BatchNorm`
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = True) -> jax.Array:
        conv = functools.partial(layers.conv, size=4, padding=1, dtype=self.dtype)
        x = images.astype(self.dtype)
        for i, features in enumerate(self.channels):
            stride = 1 if i == len(self.channels) - 1 else 2
            x = conv(features, strides=stride, use_bias=i == 0, name=f"conv{i}")(x)
            if i > 0:
                norm = BatchNorm(groups=self.groups, dtype=self.dtype, name=f"norm{i}")
                x = norm(x, train=train)
            x = nn.leaky_relu(x, 0.2)
        return conv(1, name="conv_out")(x).astype(jnp.float32)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class SpectralConv(nn.Module):
    """Circular convolution of `[B, T, C]` with a kernel divided by its spectral norm.

    The norm is that of the kernel as a matrix from a window to the outputs (Miyato et al. 2018).
    Each training call refines the estimated singular vectors by one step of power iteration; they
    are constants to the gradient.
    """

    features: int
    window: int = 1  # width of the kernel, odd
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        axes = (None, "conv_in", "conv_out")
        shape = (self.window, x.shape[-1], self.features)
        init = layers.uniform((self.window * x.shape[-1]) ** -0.5)
        kernel = sharding.gather(
            self.param("kernel", layers.partitioned(init, *axes), shape), *axes
        )
        bias = self.param("bias", layers.partitioned(init, "norm"), (self.features,))

        def random_unit():
            return _unit(jax.random.normal(self.make_rng("params"), (self.features,)))

        def inwards(u):
            return _unit(_product("kio, o -> ki", lax.stop_gradient(kernel), u))

        u = self.variable("batch_stats", "u", random_unit)
        v = self.variable("batch_stats", "v", lambda: inwards(u.value))
        if train and not self.is_initializing():
            v.value = inwards(u.value)
            u.value = _unit(_product("kio, ki -> o", lax.stop_gradient(kernel), v.value))
        norm = _product("kio, o, ki ->", kernel, u.value, v.value)
        margin = self.window // 2
        return bias.astype(self.dtype) + lax.conv_general_dilated(
            jnp.pad(x, ((0, 0), (margin, margin), (0, 0)), mode="wrap").astype(self.dtype),
            (kernel / norm).astype(self.dtype),
            window_strides=(1,),
            padding="VALID",
            dimension_numbers=("NWC", "WIO", "NWC"),
        )


class DinoHead(nn.Module):
    """Classifies each token of `[B, T, W]`: logits `[B, T]` float32."""

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        def block(x, window, name):
            conv = SpectralConv(x.shape[-1], window, self.dtype, name=f"conv_{name}")
            norm = LocalBatchNorm(self.dtype, name=f"norm_{name}")
            return nn.leaky_relu(norm(conv(x, train=train)), 0.2)

        x = block(x, 1, "in")
        x = (x + block(x, 9, "mix")) * 0.5**0.5
        logits = SpectralConv(1, dtype=self.dtype, name="conv_out")(x, train=train)
        return logits[..., 0].astype(jnp.float32)


class DinoHeads(nn.Module):
    """One head per tapped layer of a frozen DINO (VAR's discriminator, after StyleGAN-T's).

    Maps features `[L, B, T, W]`, see `vit.ViT.readouts`, to logits `[B, L * T]` float32.
    """

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool = True) -> jax.Array:
        def head(module, carry, x):
            del module
            return carry, DinoHead(self.dtype, name="head")(x, train=train)

        scan = nn.scan(
            head,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        _, logits = scan(self, None, features)
        return rearrange(logits, "l b t -> b (l t)")


def dino_inputs(images: jax.Array, config: vit.ViTConfig, key: jax.Array) -> jax.Array:
    """Turns square images `[B, H, H, 3]` in [-1, 1] into DINO's normalized input `[B, S, S, 3]`.

    With probability 1/2 all images are cropped at the same random place, otherwise all are resized
    by area; the reference also decides for the whole batch. Images no larger than S are resized
    bicubically.
    """
    size, extent = config.grid * config.patch_size, images.shape[1]
    images = vit.normalize(images, config)
    if extent <= size:
        return resize.bicubic(images, size)
    coin, place = jax.random.split(key)
    row, column = jax.random.randint(place, (2,), 0, extent - size + 1)
    crop = lax.dynamic_slice(images, (0, row, column, 0), (len(images), size, size, 3))
    return jnp.where(jax.random.bernoulli(coin), crop, resize.area(images, size))
