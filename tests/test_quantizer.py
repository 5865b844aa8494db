"""Code search, entropy loss and codebook usage against formulations without chunks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.models import quantizer

import jaxprs

CODES, ROWS, WIDTH = 32, 24, 4
LIMITS = [1, CODES, 100, 5 * CODES, 10**9]


def points(rows=ROWS, codes=CODES, width=WIDTH):
    rng = np.random.default_rng(0)
    z, codebook = rng.standard_normal((rows, width)), rng.standard_normal((codes, width))
    return z.astype(np.float32), codebook.astype(np.float32)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("limit", LIMITS)
def test_search_finds_the_nearest_code_in_chunks_of_any_size(limit, entropy):
    z, codebook = points()
    distances = ((z[:, None].astype(np.float64) - codebook) ** 2).sum(-1)
    codes, _ = quantizer.search(
        z.reshape(4, 6, WIDTH), codebook, entropy=entropy, chunk_elements=limit
    )
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, distances.argmin(-1).reshape(4, 6))


@pytest.mark.parametrize("limit", LIMITS)
def test_tie_goes_to_the_first_code(limit):
    z, codebook = points()
    once, _ = quantizer.search(z, codebook, chunk_elements=limit)
    twice, _ = quantizer.search(z, np.concatenate([codebook, codebook]), chunk_elements=limit)
    np.testing.assert_array_equal(twice, once)
    codes, _ = quantizer.search(np.zeros((3, 2), np.float32), np.float32([[0, 2], [0, 1], [1, 0]]))
    np.testing.assert_array_equal(codes, [1, 1, 1])


@pytest.mark.parametrize("limit", LIMITS)
def test_most_probable_code_is_found_in_chunks_of_any_size(limit):
    z, codebook = points()
    products = z.astype(np.float64) @ codebook.T
    codes = quantizer.most_probable(z.reshape(4, 6, WIDTH), codebook, chunk_elements=limit)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, products.argmax(-1).reshape(4, 6))


def test_first_of_equal_probabilities_is_chosen_though_its_product_is_smaller():
    smaller = np.float32(0.25)
    codebook = np.array([[-1], [smaller], [np.nextafter(smaller, 1)]], np.float32)
    codes = quantizer.most_probable(np.ones((1, 1), np.float32), codebook)
    np.testing.assert_array_equal(codes, [1])


def test_channels_are_bits_of_a_code_from_the_least_significant():
    z = np.float32([[1e-9, -2, 3], [0, -0.0, 0.5], [-1, -1, -1]])
    codes = quantizer.bits_to_codes(z)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, [5, 4, 0])
    np.testing.assert_array_equal(
        quantizer.codes_to_bits(codes, 3), [[1, -1, 1], [-1, -1, 1], [-1, -1, -1]]
    )


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def dense_entropy_with_gradients(z, codebook):
    """Mean entropy of a row's soft assignment less the entropy of the mean assignment."""
    p = jax.nn.softmax(-100 * jnp.sum((z[:, None] - codebook) ** 2, -1))
    mean = p.mean(0)
    each = -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-37)), -1)
    return each.mean() + jnp.sum(mean * jnp.log(mean + 1e-5))


@pytest.mark.parametrize("limit", LIMITS)
def test_entropy_loss_and_its_gradients_equal_the_dense_formulation(limit):
    z, codebook = points()
    z, codebook = 0.3 * z, 0.3 * codebook  # several codes share each row

    def chunked(z, codebook):
        return quantizer.search(z, codebook, entropy=True, chunk_elements=limit)[1]

    value, gradients = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(z, codebook)
    expected, dense = dense_entropy_with_gradients(z, codebook)
    assert abs(expected) > 0.1
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for actual, gradient in zip(gradients, dense, strict=True):
        largest = np.abs(gradient).max()
        assert largest > 1e-2
        np.testing.assert_allclose(actual, gradient, rtol=1e-3, atol=2e-5 * largest)


@pytest.mark.parametrize("entropy", [False, True])
def test_no_array_is_larger_than_the_limit_forward_or_backward(entropy):
    z, codebook = points(rows=64, codes=CODES, width=2)
    limit = 16 * CODES  # a quarter of the distance matrix; all other arrays are smaller

    def largest(function):
        program = jax.make_jaxpr(function)(z, codebook)
        found = [v.aval for e in jaxprs.equations(program) for v in e.outvars]
        return max(math.prod(aval.shape) for aval in found)

    def run(z, codebook, chunk_elements=limit):
        return quantizer.search(z, codebook, entropy=entropy, chunk_elements=chunk_elements)

    def gradient(z, codebook):
        return jax.grad(lambda *args: run(*args)[1], argnums=(0, 1))(z, codebook)

    assert largest(functools.partial(run, chunk_elements=10**9)) == 64 * CODES
    assert largest(run) == limit
    assert largest(gradient) <= limit


def usage(history):
    return float(quantizer.codebook_usage(history, CODES))


def test_usage_counts_codes_that_have_been_assigned():
    history = quantizer.empty_history()
    assert history.shape == (65_536,)
    assert usage(history) == 0
    history = quantizer.update_history(history, jnp.array([[5, 7], [5, 0]]))
    assert usage(history) == 3 / CODES
    assert usage(quantizer.update_history(history, jnp.array([CODES - 1]))) == 4 / CODES


def test_usage_forgets_codes_after_65536_assignments():
    update = jax.jit(quantizer.update_history)
    history = update(quantizer.empty_history(), jnp.array([1]))
    history = update(history, jnp.zeros((3, 5), jnp.int32))
    history = update(history, jnp.zeros(65_536 - 16, jnp.int32))
    assert usage(history) == 2 / CODES
    history = update(history, jnp.zeros(1, jnp.int32))
    assert usage(history) == 1 / CODES


def test_batch_larger_than_the_history_keeps_its_last_assignments():
    codes = jnp.arange(65_536 + 3, dtype=jnp.int32)
    history = quantizer.update_history(quantizer.empty_history(), codes)
    np.testing.assert_array_equal(history, codes[3:])
