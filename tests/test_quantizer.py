"""Quantizers against their published programs, and their parts against formulations without chunks.

`data/baselines/quantizers.npz` holds what vector-quantize-pytorch, Open-MAGVIT2, bsq-vit, IBQ,
LlamaGen, TiTok, MaskGIT's VQGAN and taming-transformers computed. Its arrays are channels first.
"""

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.models import lookup_free, quantizer

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
    codes = quantizer.IBQ(codebook, limit).encode(z.reshape(4, 6, WIDTH))
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, products.argmax(-1).reshape(4, 6))


def test_first_of_equal_probabilities_is_chosen_though_its_product_is_smaller():
    smaller = np.float32(0.25)
    codebook = np.array([[-1], [smaller], [np.nextafter(smaller, 1)]], np.float32)
    codes = quantizer.IBQ(codebook).encode(np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(codes, [1])


def test_channels_are_bits_of_a_code_from_the_least_significant():
    z = np.float32([[1e-9, -2, 3], [0, -0.0, 0.5], [-1, -1, -1]])
    lfq = lookup_free.LFQ(3)
    codes = lfq.encode(z)
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, [5, 4, 0])
    np.testing.assert_array_equal(lfq.look_up(codes), [[1, -1, 1], [-1, -1, 1], [-1, -1, -1]])


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


EXPECTED = np.load(pathlib.Path(__file__).parent / "data" / "baselines" / "quantizers.npz")


def load(name):
    """An array with its channels last; only those of `bsq` are so in the file."""
    array = EXPECTED[name]
    return array if name.startswith("bsq") else np.moveaxis(array, 1, -1)


def check(name, quantize, z, upstream, *codebook, total=lambda found: 0.0):
    """Compares vectors, codes, and gradients of vectors times `upstream` plus the loss `total`.

    `quantize` takes the latents, and the codebook if there is one. Returns its result.
    """

    def objective(*inputs):
        found = quantize(*inputs)
        return jnp.sum(found.vectors * upstream) + total(found), found

    argnums = tuple(range(1 + len(codebook)))
    run = jax.jit(jax.value_and_grad(objective, argnums=argnums, has_aux=True))
    (_, found), gradients = run(z, *codebook)
    np.testing.assert_allclose(found.vectors, load(f"{name}_quantized"), rtol=0, atol=1e-5)
    if f"{name}_indices" in EXPECTED:
        codes = EXPECTED[f"{name}_indices"].reshape(found.codes.shape)
        np.testing.assert_array_equal(found.codes, codes)
    wanted = [load(f"{name}_grad_z")]
    if codebook:
        wanted.append(EXPECTED[f"{name}_grad_codebook"])
    for gradient, want in zip(gradients, wanted, strict=True):
        assert np.abs(gradient - want).max() <= 1e-3 * np.abs(want).max()
    return found


def equal(actual, name, factor=1.0):
    assert float(actual) == pytest.approx(factor * float(EXPECTED[name]), rel=1e-4), name


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (8, 5, 5, 5)])
def test_fsq_matches_its_program(levels):
    name = "fsq_" + "".join(map(str, levels))
    fsq, z = lookup_free.FSQ(levels), load(f"{name}_z")
    found = check(name, fsq.quantize, z, load(f"{name}_upstream"))
    np.testing.assert_array_equal(fsq.encode(z), found.codes)
    np.testing.assert_allclose(fsq.look_up(found.codes), found.vectors, rtol=0, atol=1e-6)
    assert found[2:] == (0, 0, 0)


def test_lfq_matches_its_program():
    name, z = "lfq_open_magvit2", load("bits_z")
    lfq = lookup_free.LFQ(18)

    def total(found):
        return 0.1 * found.entropy_loss + found.commitment_loss

    quantize = functools.partial(lfq.quantize, entropy=True)
    found = check(name, quantize, z, load("bits_upstream"), total=total)
    equal(found.entropy_loss, f"{name}_entropy_loss")
    equal(found.commitment_loss, f"{name}_commitment", 0.25)
    sample, batch = lookup_free.bit_entropies(400 * z, group=18, epsilon=1e-5)
    equal(sample, f"{name}_sample_entropy")
    equal(batch, f"{name}_batch_entropy")
    np.testing.assert_array_equal(lfq.encode(z), found.codes)
    np.testing.assert_array_equal(lfq.look_up(found.codes), np.sign(found.vectors))
    reverse = lookup_free.LFQ(18, first_is_most_significant=True)
    np.testing.assert_array_equal(reverse.encode(z), EXPECTED["lfq_lucidrains_indices"])
    np.testing.assert_array_equal(reverse.look_up(reverse.encode(z)), lfq.look_up(found.codes))


@pytest.mark.parametrize(
    "name, group, inverse_temperature",
    [
        ("bsq_group9", 9, 1.0),
        ("bsq_group1_analytical", 1, 1.0),
        ("bsq_group9_inv100", 9, 100.0),
    ],
)
def test_entropies_of_groups_of_bits_are_those_of_bsqs_program(name, group, inverse_temperature):
    logits = 4 * 18**-0.5 * inverse_temperature * EXPECTED["bsq_z"]
    sample, batch = lookup_free.bit_entropies(logits, group=group, epsilon=1e-8)
    equal(sample, f"{name}_sample_entropy")
    equal(batch, f"{name}_batch_entropy")


def test_bsq_matches_its_program():
    name, z, bsq = "bsq_group1_analytical", EXPECTED["bsq_z"], lookup_free.BSQ(18)

    def total(found):
        return found.commitment_loss + found.entropy_loss

    quantize = functools.partial(bsq.quantize_unit, entropy=True)
    found = check(name, quantize, z, EXPECTED["bsq_upstream"], total=total)
    equal(found.commitment_loss, f"{name}_commitment")
    assert float(total(found)) == pytest.approx(float(EXPECTED[f"{name}_loss"]), abs=2e-5)
    np.testing.assert_array_equal(bsq.encode(z), found.codes)
    np.testing.assert_allclose(bsq.look_up(found.codes), found.vectors, rtol=0, atol=1e-6)
    np.testing.assert_allclose(bsq.quantize(3 * z).vectors, found.vectors, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 5 * 512, 10**9])
def test_ibq_matches_its_program_in_chunks_of_any_size(limit):
    z, codebook, upstream = load("ibq_z"), EXPECTED["ibq_codebook"], load("ibq_upstream")

    def quantize(z, codebook, entropy=True):
        return quantizer.IBQ(codebook, limit).quantize(z, entropy=entropy)

    def total(found):
        return found.codebook_loss + found.commitment_loss + 0.05 * found.entropy_loss

    found = check("ibq", quantize, z, upstream, codebook, total=total)
    equal(found.codebook_loss + found.commitment_loss, "ibq_quantizer_loss")
    equal(found.entropy_loss, "ibq_entropy_loss")
    ibq = quantizer.IBQ(jnp.asarray(codebook), limit)
    np.testing.assert_array_equal(ibq.encode(z), found.codes)
    np.testing.assert_allclose(ibq.look_up(found.codes), found.vectors, rtol=0, atol=1e-5)
    plain = check("ibq_output_only", lambda *x: quantize(*x, entropy=False), z, upstream, codebook)
    assert plain.entropy_loss == 0


# Weights of the codebook and commitment terms, the latter with its factor of 0.25. MaskGIT's and
# taming's programs have that factor in the other term.
VQ = [
    ("llamagen", True, 1.0, 1.0, 0.1),
    ("titok_l2", True, 1.0, 1.0, 0.0),
    ("titok_plain", False, 1.0, 1.0, 0.0),
    ("maskgit", False, 0.25, 4.0, 0.0),
    ("taming", False, 0.25, 4.0, 0.0),
]


@pytest.mark.parametrize("name, unit, codebook_weight, commitment_weight, entropy_weight", VQ)
def test_vq_matches_its_programs(name, unit, codebook_weight, commitment_weight, entropy_weight):
    z, codebook = load(f"{name}_z"), EXPECTED[f"{name}_codebook"]
    entropy = entropy_weight > 0

    def total(found):
        loss = codebook_weight * found.codebook_loss + commitment_weight * found.commitment_loss
        return loss + entropy_weight * found.entropy_loss

    found = check(
        name,
        lambda z, codebook: quantizer.VQ(codebook, unit).quantize(z, entropy=entropy),
        z,
        load(f"{name}_upstream"),
        codebook,
        total=total,
    )
    if f"{name}_loss" in EXPECTED:
        equal(total(found), f"{name}_loss")
    if f"{name}_commitment" in EXPECTED:
        equal(found.codebook_loss, f"{name}_codebook_loss")
        equal(found.commitment_loss, f"{name}_commitment")
    if entropy:
        equal(entropy_weight * found.entropy_loss, f"{name}_entropy_loss_times_ratio")
