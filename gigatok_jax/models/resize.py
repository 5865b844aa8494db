"""Image resizing inside compiled programs, equal to that of PyTorch or TensorFlow 1."""

import functools

from einops import einsum
import jax
import jax.numpy as jnp
import numpy as np


@functools.lru_cache
def _bicubic_matrix(length: int, target: int) -> np.ndarray:
    """`[target, length]` weights: a = -0.75, half-pixel centers, repeated edges."""
    a = -0.75
    center = (np.arange(target) + 0.5) * (length / target) - 0.5
    first = np.floor(center).astype(int) - 1
    weights = np.zeros((target, length))
    for tap in range(4):
        t = np.abs(center - (first + tap))
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        column = np.clip(first + tap, 0, length - 1)
        np.add.at(weights, (np.arange(target), column), np.where(t <= 1, near, far))
    return weights.astype(np.float32)


def bicubic(images: jax.Array, size: int) -> jax.Array:
    """Resizes `[B, H, W, C]` to `[B, size, size, C]` without antialiasing.

    Equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`;
    `jax.image.resize` has another kernel (a = -0.5).
    """
    return _separable(images, size, _bicubic_matrix)


@functools.lru_cache
def _area_matrix(length: int, target: int) -> np.ndarray:
    """`[target, length]` weights: equal for all pixels that an output pixel overlaps."""
    place = np.arange(length)
    first = np.arange(target)[:, None] * length // target
    last = ((np.arange(target)[:, None] + 1) * length + target - 1) // target
    inside = (first <= place) & (place < last)
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)


def area(images: jax.Array, size: int) -> jax.Array:
    """Resizes `[B, H, W, C]` to `[B, size, size, C]`, like PyTorch's `interpolate(mode="area")`."""
    return _separable(images, size, _area_matrix)


def _separable(images, size, matrix):
    """Multiplies both spatial axes of `[B, H, W, C]` by `matrix(length, size)`."""
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    rows, columns = matrix(height, size), matrix(width, size)
    images = einsum(jnp.asarray(rows, images.dtype), images, "t h, b h w c -> b t w c")
    return einsum(jnp.asarray(columns, images.dtype), images, "t w, b h w c -> b h t c")


@functools.lru_cache
def _tf1_bilinear_matrix(length: int, target: int) -> np.ndarray:
    """`[target, length]` weights: neither half-pixel centers nor aligned corners."""
    place = np.arange(target) * (length / target)
    lower = place.astype(int)
    upper = np.minimum(lower + 1, length - 1)
    weights = np.zeros((target, length))
    np.add.at(weights, (np.arange(target), lower), 1 - (place - lower))
    np.add.at(weights, (np.arange(target), upper), place - lower)
    return weights.astype(np.float32)


def tf1_bilinear(images: jax.Array, size: int) -> jax.Array:
    """Resizes `[B, H, W, C]` to `[B, size, size, C]` like `resize_bilinear` in FID's graph."""
    return _separable(images, size, _tf1_bilinear_matrix)
