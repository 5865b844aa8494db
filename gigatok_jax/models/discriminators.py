"""Image discriminators of the adversarial loss."""

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from gigatok_jax.models import layers
from gigatok_jax.models.convolution import conv_general_dilated


class BatchNorm(nn.Module):
    """BatchNorm with PyTorch's running statistics: momentum 0.1, unbiased variance.

    Under `jit` the statistics are those of the global batch on any mesh; the reference, under
    data parallelism, normalised each device's share on its own.

    Attributes:
      epsilon: added to the variance.
      affine: whether there are a gain and a bias.
    """

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
            y = x.astype(jnp.float32)
            axes = tuple(range(x.ndim - 1))
            mean, var = y.mean(axes), y.var(axes)
            count = x.size // width
            if not self.is_initializing():
                running_mean.value += 0.1 * (lax.stop_gradient(mean) - running_mean.value)
                unbiased = lax.stop_gradient(var) * count / (count - 1)
                running_var.value += 0.1 * (unbiased - running_var.value)
        else:
            mean, var = running_mean.value, running_var.value
        gain = scale * lax.rsqrt(var + self.epsilon)
        return (x * gain + (bias - mean * gain)).astype(self.dtype)


class PatchGAN(nn.Module):
    """Judges overlapping patches: `[B, H, W, 3]` to logits `[B, h, w, 1]` float32.

    Attributes:
      channels: width of each layer; all but the last two halve the extent.
    """

    channels: tuple[int, ...] = (64, 128, 256, 512)
    dtype: layers.Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = True) -> jax.Array:
        def conv(features, stride, bias, name):
            return nn.Conv(
                features,
                (4, 4),
                strides=(stride, stride),
                padding=((1, 1), (1, 1)),
                use_bias=bias,
                dtype=self.dtype,
                conv_general_dilated=conv_general_dilated,
                kernel_init=layers.partitioned(
                    nn.initializers.normal(0.02), None, None, "conv_in", "conv_out"
                ),
                bias_init=layers.partitioned(nn.initializers.zeros, "norm"),
                name=name,
            )

        x = images.astype(self.dtype)
        for i, features in enumerate(self.channels):
            stride = 1 if i == len(self.channels) - 1 else 2
            x = conv(features, stride, i == 0, f"conv{i}")(x)
            if i > 0:
                x = BatchNorm(dtype=self.dtype, name=f"norm{i}")(x, train=train)
            x = nn.leaky_relu(x, 0.2)
        return conv(1, 1, True, "conv_out")(x).astype(jnp.float32)
