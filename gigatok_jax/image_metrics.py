"""Reconstruction metrics of uint8 images."""

import jax
from jax import lax
import jax.numpy as jnp

SSIM_WINDOW = 7


def psnr(images: jax.Array, others: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB, `[B]`, of two uint8 batches `[B, H, W, C]`.

    Equal images count as if one value differed by 1, the least difference of 8-bit images: 101.1 dB
    for 256x256 RGB. So one exact copy does not make a mean infinite.
    """
    difference = images.astype(jnp.float32) - others.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(difference**2, axis=(1, 2, 3)), 1.0)
    return -10 * jnp.log10(total / (images[0].size * 255.0**2))


def ssim(images: jax.Array, others: jax.Array, data_range: float = 1.0) -> jax.Array:
    """Structural similarity, `[B]`, of two uint8 batches `[B, H, W, C]`.

    Follows scikit-image's defaults (Wang et al. 2004 with a uniform 7x7 window, unbiased
    covariances, and a border of 3 pixels excluded); averages over channels.

    Args:
      images, others: the batches, which are scaled to [0, 1].
      data_range: 1 is the true range; 2, as in the reference, gives higher values.
    """
    x, y = (a.astype(jnp.float32) / 255 for a in (images, others))

    def mean(a):
        window = (1, SSIM_WINDOW, SSIM_WINDOW, 1)
        total = lax.reduce_window(a, 0.0, lax.add, window, (1, 1, 1, 1), "valid")
        return total / SSIM_WINDOW**2

    unbiased = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    mean_x, mean_y = mean(x), mean(y)
    var_x = unbiased * (mean(x * x) - mean_x**2)
    var_y = unbiased * (mean(y * y) - mean_y**2)
    covariance = unbiased * (mean(x * y) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return similarity.mean(axis=(1, 2, 3))
