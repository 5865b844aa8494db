"""Convolution with a weight gradient that is fast on CPUs too."""

import functools

import jax
from jax import lax
import jax.numpy as jnp

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
ROWS = 8  # output rows a block: a block's pixels and products stay in a core's cache
LARGE = 2**27  # multiply-adds from which blocks beat XLA's own weight gradient on CPU


def conv_general_dilated(x, kernel, window_strides, padding, *args, **kwargs):
    """`lax.conv_general_dilated` for `nn.Conv(conv_general_dilated=...)`: 2D, NHWC, one stride.

    XLA's CPU backend runs the weight gradient of a large image some five times slower than the
    rest; there it is computed in blocks of rows as nine (for 3x3) matrix products.
    """
    del args, kwargs  # dilations of 1 and one group, nn.Conv's defaults
    return _conv(x, kernel, window_strides[0], tuple(map(tuple, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x, kernel, stride, padding):
    strides = (stride, stride)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


def _forward(x, kernel, stride, padding):
    return _conv(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, residuals, gradient):
    x, kernel = residuals
    strides = (stride, stride)

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)

    def native(x, gradient):
        return jax.vjp(lambda k: plain(x, k), kernel)[1](gradient)[0]

    blocks = functools.partial(_kernel_gradient_by_rows, kernel.shape, stride, padding)
    (x_gradient,) = jax.vjp(lambda x: plain(x, kernel), x)[1](gradient)
    if gradient.size * kernel.size // kernel.shape[-1] < LARGE or gradient.shape[1] % ROWS:
        return x_gradient, native(x, gradient)
    return x_gradient, lax.platform_dependent(x, gradient, cpu=blocks, default=native)


def _kernel_gradient_by_rows(shape, stride, padding, x, gradient):
    height, width, channels_in, channels_out = shape
    batch, rows, columns, _ = gradient.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    blocks = rows // ROWS

    def add(total, index):
        image, row = index // blocks, index % blocks * ROWS
        g = lax.dynamic_slice(gradient, (image, row, 0, 0), (1, ROWS, columns, channels_out))
        span = stride * (ROWS - 1) + height
        y = lax.dynamic_slice(x, (image, row * stride, 0, 0), (1, span, x.shape[2], channels_in))[0]
        # Transposed once for all products; within them, it would be for each.
        g = lax.optimization_barrier(g.reshape(-1, channels_out).T)
        taps = [
            jnp.dot(
                g,
                y[
                    i : i + span - height + 1 : stride,
                    j : j + stride * (columns - 1) + 1 : stride,
                ].reshape(-1, channels_in),
                preferred_element_type=jnp.float32,
            )
            for i in range(height)
            for j in range(width)
        ]
        return total + jnp.stack(taps), None

    total = jnp.zeros((height * width, channels_out, channels_in), jnp.float32)
    total, _ = lax.scan(add, total, jnp.arange(batch * blocks))
    return total.transpose(0, 2, 1).reshape(shape).astype(gradient.dtype)


_conv.defvjp(_forward, _backward)
