"""The convolution whose weight gradient is computed in blocks of rows."""

import jax
from jax import lax
import numpy as np
import pytest

from gigatok_jax.models import convolution

import jaxprs

NEVER, ALWAYS = 2**62, 1


def gradients(function, x, kernel, stride, padding):
    """Output, and gradients of a weighted sum of it."""
    output, backward = jax.vjp(lambda x, k: function(x, k, (stride, stride), padding), x, kernel)
    upstream = np.random.default_rng(1).standard_normal(output.shape).astype(np.float32)
    return output, *backward(upstream)


def reference(x, kernel, strides, padding):
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def arrays(rows, size, stride, padding):
    """An image that gives so many output rows, nine columns; and a kernel."""
    rng = np.random.default_rng(0)
    extent = [
        stride * (count - 1) + length - sum(pads)
        for count, length, pads in zip((rows, 9), size, padding, strict=True)
    ]
    x = rng.standard_normal((2, *extent, 3)).astype(np.float32)
    return x, rng.standard_normal((*size, 3, 5)).astype(np.float32)


def weight_gradient_is_blocked(x, kernel, stride, padding):
    program = jax.make_jaxpr(
        lambda *args: gradients(convolution.conv_general_dilated, *args, stride, padding)
    )(x, kernel)
    return any(equation.primitive.name == "scan" for equation in jaxprs.equations(program))


@pytest.mark.parametrize("threshold", [ALWAYS, NEVER], ids=["blocked", "native"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "size, padding",
    [
        ((3, 3), ((1, 1), (1, 1))),
        ((3, 3), ((0, 1), (0, 1))),
        ((3, 3), ((2, 0), (1, 2))),
        ((1, 1), ((0, 0), (0, 0))),
        ((4, 2), ((1, 2), (0, 1))),
    ],
)
def test_output_and_gradients_equal_lax(monkeypatch, threshold, stride, size, padding):
    monkeypatch.setattr(convolution, "LARGE", threshold)
    x, kernel = arrays(16, size, stride, padding)
    assert weight_gradient_is_blocked(x, kernel, stride, padding) == (threshold == ALWAYS)
    actual = gradients(convolution.conv_general_dilated, x, kernel, stride, padding)
    expected = gradients(reference, x, kernel, stride, padding)
    assert actual[0].shape == (2, 16, 9, 5)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_rows_not_divisible_into_blocks_use_the_native_gradient(monkeypatch):
    monkeypatch.setattr(convolution, "LARGE", ALWAYS)
    padding = ((1, 1), (1, 1))
    x, kernel = arrays(12, (3, 3), 1, padding)
    assert not weight_gradient_is_blocked(x, kernel, 1, padding)
