"""BatchNorms, whose statistics are those of the global batch, or of fixed parts of it."""

from einops import rearrange
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from gigatok_jax.models import layers

GROUP = 8  # most samples that share statistics in a `LocalBatchNorm`


class BatchNorm(nn.Module):
    """BatchNorm with PyTorch's running statistics: momentum 0.1, unbiased variance.

    Under `jit` the statistics are those of the global batch on any mesh; the reference, under
    data parallelism, normalised each device's share on its own, as `groups` do.

    Attributes:
      groups: parts of the batch, side by side and equally large, that are normalised apart in
        training; the running statistics are those of the first.
      epsilon: added to the variance.
      affine: whether there are a gain and a bias.
    """

    groups: int = 1
    epsilon: float = 1e-5
    affine: bool = True
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        width = x.shape[-1]

        def scale_init(key, shape):
            return 1 + 0.02 * jax.random.normal(key, shape)

        scale, bias = 1.0, 0.0
        if self.affine:
            scale = self.param("scale", layers.partitioned(scale_init, "norm"), (width,))
            bias = self.param("bias", layers.partitioned(nn.initializers.zeros, "norm"), (width,))
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,))
        if train:
            y = x.astype(jnp.float32).reshape(self.groups, -1, width)
            mean, var, count = y.mean(1), y.var(1), y.shape[1]
            if not self.is_initializing():
                running_mean.value += 0.1 * (lax.stop_gradient(mean[0]) - running_mean.value)
                unbiased = lax.stop_gradient(var[0]) * count / (count - 1)
                running_var.value += 0.1 * (unbiased - running_var.value)
        else:
            y, mean, var = x, running_mean.value, running_var.value
        gain = scale * lax.rsqrt(var + self.epsilon)
        shift = bias - mean * gain
        if train:
            y = x.reshape(y.shape)
            gain, shift = gain[:, None], shift[:, None]
        return (y * gain + shift).astype(self.dtype).reshape(x.shape)


def batch_groups(batch_size: int) -> int:
    """Number of groups, of at most `GROUP` samples, that `LocalBatchNorm` splits a batch into.

    Raises:
      ValueError: the groups would differ in size.
    """
    groups = -(-batch_size // GROUP)
    if batch_size % groups:
        raise ValueError(
            f"batch_size must split into equal groups of at most {GROUP} images for the dino "
            f"discriminator, got {batch_size}"
        )
    return groups


class LocalBatchNorm(nn.Module):
    """BatchNorm of each group of consecutive samples, always by its own statistics; eps 1e-6.

    Under `jit` groups are formed of the global batch, so that results are the same on any mesh.
    """

    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, groups = x.shape[-1], batch_groups(len(x))
        scale = self.param("scale", layers.partitioned(nn.initializers.ones, "norm"), (width,))
        bias = self.param("bias", layers.partitioned(nn.initializers.zeros, "norm"), (width,))
        y = rearrange(x.astype(jnp.float32), "(g n) t w -> g (n t) w", g=groups)
        mean, var = y.mean(1, keepdims=True), y.var(1, keepdims=True)
        y = (y - mean) * lax.rsqrt(var + 1e-6) * scale + bias
        return rearrange(y, "g (n t) w -> (g n) t w", n=len(x) // groups).astype(self.dtype)
