"""LPIPS, the perceptual distance of VGG-16 features (Zhang et al. 2018)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from gigatok_jax.models import layers

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# Widths of each stage's convolutions. LPIPS reads the last ReLU: relu1_2, 2_2, 3_3, 4_3, 5_3.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """The convolutions of VGG-16; returns the last activation of each stage."""

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        features = []
        for stage, widths in enumerate(STAGES, start=1):
            if stage > 1:
                x = _halve(x)
            for i, width in enumerate(widths, start=1):
                name = f"conv{stage}_{i}"
                x = nn.relu(layers.conv(width, trained=False, dtype=self.dtype, name=name)(x))
            features.append(x)
        return features


class LPIPS(nn.Module):
    """Distance `[B]` float32 between two batches of images `[B, H, W, 3]` in [-1, 1].

    The reference accidentally leaves LPIPS's dropout active in training. This one has no dropout.
    """

    dtype: layers.Dtype = jnp.float32

    def setup(self):
        self.vgg = VGG16(self.dtype)
        ones = layers.partitioned(nn.initializers.ones, "norm")
        self.gains = [self.param(f"lin{i}", ones, (w[-1],)) for i, w in enumerate(STAGES)]

    def features(self, images: jax.Array) -> list[jax.Array]:
        """Unit-normalized features of each stage, `[B, h, w, C]` float32."""
        x = (images - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        return [_unit(y.astype(jnp.float32)) for y in self.vgg(x.astype(self.dtype))]

    def distance(self, first: list[jax.Array], second: list[jax.Array]) -> jax.Array:
        """Distance `[B]` between the `features` of two batches."""
        return sum(
            jnp.einsum("bhwc,c->b", (a - b) ** 2, gain) / (a.shape[1] * a.shape[2])
            for a, b, gain in zip(first, second, self.gains, strict=True)
        )

    def __call__(self, images: jax.Array, others: jax.Array) -> jax.Array:
        return self.distance(self.features(images), self.features(others))


def param_shapes() -> dict:
    """Shapes of the parameters; allocates nothing."""
    return layers.param_shapes(LPIPS(), (1, 32, 32, 3), (1, 32, 32, 3))


@jax.custom_vjp
def _halve(x):
    """Maxima of 2x2 pixels; the gradient goes to the first of them, as with `nn.max_pool`.

    XLA's own gradient of a pooling moves five times as many bytes.
    """
    return functools.reduce(jnp.maximum, _corners(x))


def _halve_forward(x):
    y = _halve(x)
    return y, (x, y)


def _halve_backward(residuals, gradient):
    x, y = residuals
    parts, found = [], jnp.zeros(y.shape, bool)
    for corner in _corners(x):
        hit = (corner == y) & ~found
        parts.append(jnp.where(hit, gradient, 0))
        found |= hit
    batch, height, width, channels = y.shape
    rows = jnp.stack([jnp.stack(parts[:2], 3), jnp.stack(parts[2:], 3)], 2)  # [B, h, 2, w, 2, C]
    rows = rows.reshape(batch, 2 * height, 2 * width, channels)
    # Pooling ignores a last row or column without a partner.
    return (jnp.pad(rows, [(0, n - m) for n, m in zip(x.shape, rows.shape, strict=True)]),)


def _corners(x):
    """The pixels at each place in squares of 2x2."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    return [x[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]


_halve.defvjp(_halve_forward, _halve_backward)


def _unit(x):
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    # The floor keeps the gradient finite where every channel is zero.
    return x / (jnp.sqrt(jnp.maximum(squared, 1e-20)) + 1e-10)
