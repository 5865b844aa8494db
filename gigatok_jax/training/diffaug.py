"""DiffAug: differentiable augmentation of a discriminator's input (Zhao et al. 2020).

Strengths are those of StyleGAN-T, which VAR and the reference adopted. Each function maps images
`[B, H, W, C]`, floats in [-1, 1], to the same shape, with random parameters for each image.
"""

import jax
from jax import lax
import jax.numpy as jnp

TRANSLATION = 0.125  # of the extent, at most
BRIGHTNESS = 0.5  # added, at most
SATURATION = (0.0, 2.0)
CONTRAST = (0.5, 1.5)
CUTOUT = 0.2  # of the extent


def augment(images: jax.Array, key: jax.Array) -> jax.Array:
    """Applies translation, color and cutout, always all three, in this order."""
    for function, part in zip((translate, color, cutout), jax.random.split(key, 3), strict=True):
        images = function(images, part)
    return images


def translate(images: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each image by up to 12.5 % of its height and width, padding with zeros."""
    batch, *shape = images.shape
    reach = [round(TRANSLATION * extent) for extent in shape[:2]]
    padded = jnp.pad(images, ((0, 0), *((r, r) for r in reach), (0, 0)))
    most = 2 * jnp.asarray(reach) + 1
    corners = jax.random.randint(key, (batch, 2), 0, most)

    def window(image, corner):
        return lax.dynamic_slice(image, (*corner, 0), shape)

    return jax.vmap(window)(padded, corners)


def color(images: jax.Array, key: jax.Array) -> jax.Array:
    """Shifts brightness by up to 0.5; scales saturation by 0 to 2, then contrast by 0.5 to 1.5."""
    keys, shape = jax.random.split(key, 3), (len(images), 1, 1, 1)
    images += jax.random.uniform(keys[0], shape, minval=-BRIGHTNESS, maxval=BRIGHTNESS)
    for part, (low, high), axes in (
        (keys[1], SATURATION, (3,)),
        (keys[2], CONTRAST, (1, 2, 3)),
    ):
        mean = images.mean(axes, keepdims=True)
        images = mean + (images - mean) * jax.random.uniform(part, shape, minval=low, maxval=high)
    return images


def cutout(images: jax.Array, key: jax.Array) -> jax.Array:
    """Zeroes a rectangle of 20 % of the height and width, which may extend over the edge."""
    inside = True
    for axis, part in zip((1, 2), jax.random.split(key), strict=True):
        extent = images.shape[axis]
        length = round(CUTOUT * extent)
        # The bound is that of the published DiffAug.
        middle = jax.random.randint(part, (len(images), 1), 0, extent + 1 - length % 2)
        offset = jnp.arange(extent) - middle + length // 2  # [B, H or W], from the rectangle's edge
        within = (offset >= 0) & (offset < length)
        inside &= jnp.expand_dims(within, 3 - axis)
    return jnp.where(inside[..., None], 0.0, images)
