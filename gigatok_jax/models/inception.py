"""The Inception-v3 of FID: the 2015 TensorFlow graph with 1008 outputs (Szegedy et al. 2015).

It differs from later versions in its pooling branches: averages do not count the padding, and the
last block takes a maximum. Layers are named as in torchvision's Inception v3.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.models import layers, resize

INPUT_SIZE = 299
SPATIAL_CHANNELS, OUTPUTS = 7, 1008


def preprocess(images: jax.Array) -> jax.Array:
    """Resizes and normalizes uint8 images `[B, H, W, 3]` to float32 `[B, 299, 299, 3]`."""
    return (resize.tf1_bilinear(images.astype(jnp.float32), INPUT_SIZE) - 128) / 128


class Conv(nn.Module):
    """Convolution, BatchNorm with stored statistics (eps 1e-3), ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = layers.conv(
            self.features,
            self.kernel,
            strides=self.stride,
            padding=self.padding,
            use_bias=False,
            trained=False,
            dtype=self.dtype,
            name="conv",
        )(x)

        def vector(name, init):
            return self.param(name, layers.partitioned(init, "norm"), (self.features,))

        scale, var = vector("scale", nn.initializers.ones), vector("var", nn.initializers.ones)
        bias, mean = vector("bias", nn.initializers.zeros), vector("mean", nn.initializers.zeros)
        gain = scale * jax.lax.rsqrt(var + 1e-3)
        return nn.relu(x * gain.astype(x.dtype) + (bias - mean * gain).astype(x.dtype))


# The network is a nested structure. A list is a sequence, and a tuple holds branches whose outputs
# are concatenated. Leaves are partial functions: pools, and convolutions with their names.
AVERAGE = functools.partial(
    nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
)
MAXIMUM = functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
SHRINK = functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))
VALID, HALVE = {"padding": "VALID"}, {"padding": "VALID", "stride": 2}


def _conv(name, features, height=1, width=1, options=None):
    return functools.partial(Conv, features, (height, width), name=name, **(options or {}))


def _block(name: str, *branches) -> tuple:
    """Branches of rows: a pool, the arguments of `_conv`, or a tuple of such rows as a fork."""

    def part(row):
        if callable(row):
            return row
        if isinstance(row[0], tuple):
            return tuple(map(part, row))
        return _conv(f"{name}.branch{row[0]}", *row[1:])

    return tuple([part(row) for row in branch] for branch in branches)


def _block_5x5(name: str, pool: int) -> tuple:
    return _block(
        name,
        [("1x1", 64)],
        [("5x5_1", 48), ("5x5_2", 64, 5, 5)],
        [("3x3dbl_1", 64), ("3x3dbl_2", 96, 3, 3), ("3x3dbl_3", 96, 3, 3)],
        [AVERAGE, ("_pool", pool)],
    )


def _block_7x7(name: str, width: int) -> tuple:
    double = [("7x7dbl_1", width), ("7x7dbl_2", width, 7, 1), ("7x7dbl_3", width, 1, 7)]
    return _block(
        name,
        [("1x1", 192)],
        [("7x7_1", width), ("7x7_2", width, 1, 7), ("7x7_3", 192, 7, 1)],
        [*double, ("7x7dbl_4", width, 7, 1), ("7x7dbl_5", 192, 1, 7)],
        [AVERAGE, ("_pool", 192)],
    )


def _block_fork(name: str, pool: functools.partial) -> tuple:
    double = (("3x3dbl_3a", 384, 1, 3), ("3x3dbl_3b", 384, 3, 1))
    return _block(
        name,
        [("1x1", 320)],
        [("3x3_1", 384), (("3x3_2a", 384, 1, 3), ("3x3_2b", 384, 3, 1))],
        [("3x3dbl_1", 448), ("3x3dbl_2", 384, 3, 3), double],
        [pool, ("_pool", 192)],
    )


UP_TO_SPATIAL = [  # to "mixed_6" of the graph, from which sFID takes its features
    _conv("Conv2d_1a_3x3", 32, 3, 3, HALVE),
    _conv("Conv2d_2a_3x3", 32, 3, 3, VALID),
    _conv("Conv2d_2b_3x3", 64, 3, 3),
    SHRINK,
    _conv("Conv2d_3b_1x1", 80),
    _conv("Conv2d_4a_3x3", 192, 3, 3, VALID),
    SHRINK,
    _block_5x5("Mixed_5b", 32),
    _block_5x5("Mixed_5c", 64),
    _block_5x5("Mixed_5d", 64),
    _block(
        "Mixed_6a",
        [("3x3", 384, 3, 3, HALVE)],
        [("3x3dbl_1", 64), ("3x3dbl_2", 96, 3, 3), ("3x3dbl_3", 96, 3, 3, HALVE)],
        [SHRINK],
    ),
    _block_7x7("Mixed_6b", 128),
    _block_7x7("Mixed_6c", 160),
    _block_7x7("Mixed_6d", 160),
]
AFTER_SPATIAL = [
    _block_7x7("Mixed_6e", 192),
    _block(
        "Mixed_7a",
        [("3x3_1", 192), ("3x3_2", 320, 3, 3, HALVE)],
        [
            ("7x7x3_1", 192),
            ("7x7x3_2", 192, 1, 7),
            ("7x7x3_3", 192, 7, 1),
            ("7x7x3_4", 192, 3, 3, HALVE),
        ],
        [SHRINK],
    ),
    _block_fork("Mixed_7b", AVERAGE),
    _block_fork("Mixed_7c", MAXIMUM),
]


def layer_names() -> list[str]:
    """Names of the convolutions, "Conv2d_1a_3x3" to "Mixed_7c.branch_pool", in order."""
    parts = jax.tree.leaves([UP_TO_SPATIAL, AFTER_SPATIAL])
    return [part.keywords["name"] for part in parts if part.func is Conv]


class Inception(nn.Module):
    """FID's feature network."""

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Maps preprocessed images `[B, 299, 299, 3]` to float32 features.

        Returns:
          "pool" `[B, 2048]`; "spatial" `[B, 17 * 17 * 7]`, for sFID; "logits" `[B, 1008]`.
        """
        x = self._run(UP_TO_SPATIAL, x.astype(self.dtype))
        spatial = x[..., :SPATIAL_CHANNELS]
        x = self._run(AFTER_SPATIAL, x)
        pool = x.astype(jnp.float32).mean((1, 2))
        head = layers.dense(OUTPUTS, ("embed", "vocab"), dtype=jnp.float32, name="fc")
        return {
            "pool": pool,
            "spatial": spatial.astype(jnp.float32).reshape(len(x), -1),
            "logits": head(pool),
        }

    def _run(self, part: Any, x: jax.Array) -> jax.Array:
        if isinstance(part, list):
            for each in part:
                x = self._run(each, x)
            return x
        if isinstance(part, tuple):
            return jnp.concatenate([self._run(branch, x) for branch in part], axis=-1)
        return part(dtype=self.dtype)(x) if part.func is Conv else part(x)
