"""The Inception-v3 of FID: the 2015 TensorFlow graph with 1008 outputs (Szegedy et al. 2015).

It differs from later ones in its pooling branches: averages leave the padding out of the count, and
the last block takes a maximum.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.models import layers, resize

INPUT_SIZE = 299
SPATIAL_CHANNELS, OUTPUTS = 7, 1008


def preprocess(images: jax.Array) -> jax.Array:
    """uint8 images `[B, H, W, 3]` as the network wants them, float32 `[B, 299, 299, 3]`."""
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
        x = nn.Conv(
            self.features,
            self.kernel,
            strides=self.stride,
            padding=self.padding,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=layers.partitioned(
                nn.initializers.lecun_normal(), None, None, "conv_in", "conv_out"
            ),
            name="conv",
        )(x)

        def vector(name, init):
            return self.param(name, layers.partitioned(init, "norm"), (self.features,))

        scale, var = vector("scale", nn.initializers.ones), vector("var", nn.initializers.ones)
        bias, mean = vector("bias", nn.initializers.zeros), vector("mean", nn.initializers.zeros)
        gain = scale * jax.lax.rsqrt(var + 1e-3)
        return nn.relu(x * gain.astype(x.dtype) + (bias - mean * gain).astype(x.dtype))


def _average(x):
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _maximum(x):
    return nn.max_pool(x, (3, 3), padding="SAME")


def _shrink(x):
    return nn.max_pool(x, (3, 3), strides=(2, 2))


# A layer: its name in torchvision's Inception v3, width, kernel, and what is not the default.
Layer = tuple
# A block: name, and branches, each a sequence of layers, of pools, and of tuples of layers that
# share an input and whose outputs are concatenated.
_VALID = {"padding": "VALID"}
_HALVE = {"padding": "VALID", "stride": 2}

STEM = (
    ("Conv2d_1a_3x3", 32, (3, 3), _HALVE),
    ("Conv2d_2a_3x3", 32, (3, 3), _VALID),
    ("Conv2d_2b_3x3", 64, (3, 3)),
    _shrink,
    ("Conv2d_3b_1x1", 80, (1, 1)),
    ("Conv2d_4a_3x3", 192, (3, 3), _VALID),
    _shrink,
)


def _block_5x5(pool: int):
    return (
        [("branch1x1", 64, (1, 1))],
        [("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))],
        [
            ("branch3x3dbl_1", 64, (1, 1)),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3)),
        ],
        [_average, ("branch_pool", pool, (1, 1))],
    )


def _block_7x7(width: int):
    return (
        [("branch1x1", 192, (1, 1))],
        [
            ("branch7x7_1", width, (1, 1)),
            ("branch7x7_2", width, (1, 7)),
            ("branch7x7_3", 192, (7, 1)),
        ],
        [
            ("branch7x7dbl_1", width, (1, 1)),
            ("branch7x7dbl_2", width, (7, 1)),
            ("branch7x7dbl_3", width, (1, 7)),
            ("branch7x7dbl_4", width, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ],
        [_average, ("branch_pool", 192, (1, 1))],
    )


def _block_fork(pool: Callable):
    return (
        [("branch1x1", 320, (1, 1))],
        [
            ("branch3x3_1", 384, (1, 1)),
            (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))),
        ],
        [
            ("branch3x3dbl_1", 448, (1, 1)),
            ("branch3x3dbl_2", 384, (3, 3)),
            (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))),
        ],
        [pool, ("branch_pool", 192, (1, 1))],
    )


BLOCKS = {
    "Mixed_5b": _block_5x5(32),
    "Mixed_5c": _block_5x5(64),
    "Mixed_5d": _block_5x5(64),
    "Mixed_6a": (
        [("branch3x3", 384, (3, 3), _HALVE)],
        [
            ("branch3x3dbl_1", 64, (1, 1)),
            ("branch3x3dbl_2", 96, (3, 3)),
            ("branch3x3dbl_3", 96, (3, 3), _HALVE),
        ],
        [_shrink],
    ),
    "Mixed_6b": _block_7x7(128),
    "Mixed_6c": _block_7x7(160),
    "Mixed_6d": _block_7x7(160),
    "Mixed_6e": _block_7x7(192),
    "Mixed_7a": (
        [("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3), _HALVE)],
        [
            ("branch7x7x3_1", 192, (1, 1)),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, (3, 3), _HALVE),
        ],
        [_shrink],
    ),
    "Mixed_7b": _block_fork(_average),
    "Mixed_7c": _block_fork(_maximum),
}
SPATIAL_BLOCK = "Mixed_6d"  # "mixed_6" in the graph


class Inception(nn.Module):
    """Features of preprocessed images `[B, 299, 299, 3]`."""

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Maps images, see `preprocess`, to float32 arrays.

        Returns:
          "pool" `[B, 2048]`; "spatial" `[B, 17 * 17 * 7]`, of sFID; "logits" `[B, 1008]`.
        """
        x = self._sequence(STEM, x.astype(self.dtype), "")
        for name, branches in BLOCKS.items():
            outputs = [self._sequence(branch, x, f"{name}.") for branch in branches]
            if name == SPATIAL_BLOCK:
                spatial = outputs[0][..., :SPATIAL_CHANNELS]
            x = jnp.concatenate(outputs, axis=-1)
        pool = x.astype(jnp.float32).mean((1, 2))
        kernel_init = layers.partitioned(nn.initializers.lecun_normal(), "embed", "vocab")
        bias_init = layers.partitioned(nn.initializers.zeros, "vocab")
        head = nn.Dense(OUTPUTS, kernel_init=kernel_init, bias_init=bias_init, name="fc")
        return {
            "pool": pool,
            "spatial": spatial.astype(jnp.float32).reshape(len(x), -1),
            "logits": head(pool),
        }

    def _sequence(self, parts: Sequence, x: jax.Array, prefix: str) -> jax.Array:
        for part in parts:
            if callable(part):
                x = part(x)
            elif isinstance(part[0], str):
                x = self._layer(part, x, prefix)
            else:
                x = jnp.concatenate([self._layer(layer, x, prefix) for layer in part], axis=-1)
        return x

    def _layer(self, layer: Layer, x: jax.Array, prefix: str) -> jax.Array:
        name, features, kernel, *rest = layer
        options = rest[0] if rest else {}
        return Conv(features, kernel, dtype=self.dtype, name=prefix + name, **options)(x)


def layer_names() -> list[str]:
    """Names of the convolutions, "Conv2d_1a_3x3" to "Mixed_7c.branch_pool", in order."""

    def names(part):
        if callable(part):
            return []
        return [part[0]] if isinstance(part[0], str) else [layer[0] for layer in part]

    blocks = {"": (STEM,)} | {f"{name}.": branches for name, branches in BLOCKS.items()}
    return [
        prefix + name
        for prefix, branches in blocks.items()
        for branch in branches
        for part in branch
        for name in names(part)
    ]
