"""A convolution whose weight gradient is fast on CPUs too.

For large images, XLA's CPU backend takes about five times as long for the weight gradient as for
the rest of a convolution. On CPUs, the gradient is therefore a sum over blocks of output rows, with
one matrix product for each position in the kernel.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp

from gigatok_jax import sharding

ROWS = 8  # output rows per block, so that a block's data fit in a core's cache
LARGE = 2**27  # multiply-adds; for smaller gradients XLA is faster on CPUs too


def conv_general_dilated(x, kernel, window_strides, padding, *args, **kwargs):
    """`lax.conv_general_dilated` for `nn.Conv`: 2D, NHWC, the same stride on both axes."""
    del args, kwargs  # nn.Conv's defaults: no dilation, one group
    return _conv(x, kernel, window_strides[0], tuple(map(tuple, padding)))


def _plain(x, kernel, stride, padding):
    if sharding.platform() == "gpu":
        # cuDNN pads both sides alike. A row and a column of zeros in the kernel are much cheaper
        # than a padded copy of the input.
        extra = [(max(after - before, 0), max(before - after, 0)) for before, after in padding]
        kernel = jnp.pad(kernel, (*extra, (0, 0), (0, 0)))
        padding = tuple((max(sides),) * 2 for sides in padding)
    strides, dimensions = (stride, stride), ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dimensions)


_conv = jax.custom_vjp(_plain, nondiff_argnums=(2, 3))


def _forward(x, kernel, stride, padding):
    return _conv(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, residuals, gradient):
    x, kernel = residuals

    def by_xla(x, gradient):
        return jax.vjp(lambda k: _plain(x, k, stride, padding), kernel)[1](gradient)[0]

    (x_gradient,) = jax.vjp(lambda x: _plain(x, kernel, stride, padding), x)[1](gradient)
    if gradient.size * kernel.size // kernel.shape[-1] < LARGE or gradient.shape[1] % ROWS:
        return x_gradient, by_xla(x, gradient)
    by_rows = functools.partial(_kernel_gradient_by_rows, kernel.shape, stride, padding)
    return x_gradient, lax.platform_dependent(x, gradient, cpu=by_rows, default=by_xla)


_conv.defvjp(_forward, _backward)


def _kernel_gradient_by_rows(shape, stride, padding, x, gradient):
    height, width, channels_in, channels_out = shape
    batch, rows, columns, _ = gradient.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    blocks = rows // ROWS
    span = stride * (ROWS - 1) + height  # input rows that a block depends on

    def add(total, index):
        image, row = index // blocks, index % blocks * ROWS
        g = lax.dynamic_slice(gradient, (image, row, 0, 0), (1, ROWS, columns, channels_out))
        y = lax.dynamic_slice(x, (image, row * stride, 0, 0), (1, span, x.shape[2], channels_in))[0]
        # The barrier keeps XLA from fusing the transpose into, and repeating it for, each product.
        g = lax.optimization_barrier(g.reshape(-1, channels_out).T)
        products = []
        for i in range(height):
            for j in range(width):
                last_row, last_column = i + stride * (ROWS - 1), j + stride * (columns - 1)
                seen = y[i : last_row + 1 : stride, j : last_column + 1 : stride]
                seen = seen.reshape(-1, channels_in)
                products.append(jnp.dot(g, seen, preferred_element_type=jnp.float32))
        return total + jnp.stack(products), None

    total = jnp.zeros((height * width, channels_out, channels_in), jnp.float32)
    total, _ = lax.scan(add, total, jnp.arange(batch * blocks))
    return total.transpose(0, 2, 1).reshape(shape).astype(gradient.dtype)
