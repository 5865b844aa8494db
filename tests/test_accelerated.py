"""What only accelerators run, computed on a CPU, against the plain formulations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import sharding
from gigatok_jax.models import convolution, layers, lpips, norms, splash
from gigatok_jax.models.generator import Generator, GeneratorConfig
from gigatok_jax.training import losses, optimizer

CONFIG = GeneratorConfig(2, 2, 32, codes=5, codebook_size=32, classes=3, qk_norm=True)


@pytest.fixture
def on(monkeypatch):
    """Traces as for another platform from now on."""
    return lambda platform: monkeypatch.setattr(sharding, "platform", lambda: platform)


def value_and_gradients(function, *arrays):
    """Of a sum with random weights."""

    def weighted(*arrays):
        y = function(*arrays)
        return (y * jax.random.normal(jax.random.key(9), y.shape)).sum()

    return jax.value_and_grad(weighted, tuple(range(len(arrays))))(*arrays)


def agree(found, expected, rtol=1e-5):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.abs(b).max()))

    jax.tree.map(close, found, expected)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("adaln", ["none", "shared", "block"])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_generator_and_its_gradients(on, adaln, platform, remat):
    config = GeneratorConfig(**vars(CONFIG) | {"adaln": adaln})
    codes = jax.random.randint(jax.random.key(1), (4, 5), 0, 32)
    classes = jnp.arange(4)
    params = nn.meta.unbox(Generator(config).init(jax.random.key(0), codes[:, :-1], classes))
    leaves, structure = jax.tree.flatten(params)
    leaves = [leaf + 0.3 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    params = jax.tree.unflatten(structure, leaves)

    def logits(params):
        return Generator(config, remat=remat).apply(params, codes[:, :-1], classes)

    def joined():  # in one array, because some gradients vanish, but for rounding
        found = jax.tree.leaves(value_and_gradients(logits, params))
        return jnp.concatenate([jnp.ravel(array) for array in found])

    expected = joined()
    on(platform)
    agree(joined(), expected)


def test_rms_norms():
    x, gain = normal(3, 5, 16), normal(16, seed=1)
    kernel = normal(16, 7, seed=2)
    reference = nn.RMSNorm(epsilon=1e-5)

    def apply(module):
        return lambda x, gain: module.apply({"params": {"scale": gain}}, x)

    expected = value_and_gradients(apply(reference), x, gain)
    agree(value_and_gradients(apply(norms.RMSNorm()), x, gain), expected)
    plain = nn.RMSNorm(epsilon=1e-5, use_scale=False)
    expected = value_and_gradients(lambda x: plain.apply({}, x), x)
    agree(value_and_gradients(norms.rms_normalize, x), expected)

    def deferred(x, kernel):
        x, inverse = norms.defer_rms(x)
        return x @ kernel * inverse

    expected = value_and_gradients(lambda x, kernel: plain.apply({}, x) @ kernel, x, kernel)
    agree(value_and_gradients(deferred, x, kernel), expected)


def test_dropout_has_the_same_masks_in_both_passes(on):
    module, x = layers.Dropout(0.3), normal(32, 48)

    def drop(x):
        return module.apply({}, x, rngs={"dropout": jax.random.key(3)})

    (expected, (gradient,)), kept = value_and_gradients(drop, x), drop(x) != 0
    assert 0.6 < kept.mean() < 0.8
    assert ((gradient != 0) == kept).all()
    on("gpu")
    found = value_and_gradients(drop, x)
    assert found[0] == expected and (found[1][0] == gradient).all()


def test_gelu(on):
    x = jnp.linspace(-6, 6, 101)
    expected = value_and_gradients(layers.gelu, x)
    on("gpu")
    agree(value_and_gradients(layers.gelu, x), expected)


def test_pooling_of_lpips_also_in_ties_and_at_edges():
    # Rounded values after a ReLU are often equal; 9 rows have one without a partner.
    x = nn.relu(jnp.round(2 * normal(2, 9, 8, 5)) / 2)
    expected = value_and_gradients(lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)), x)
    found = value_and_gradients(lpips._halve, x)
    assert found[0] == expected[0] and (found[1][0] == expected[1][0]).all()


@pytest.mark.parametrize("padding", [((0, 1), (0, 1)), ((1, 0), (0, 1)), ((1, 1), (1, 1))])
def test_convolution_with_cudnns_padding(on, padding):
    x, kernel = normal(2, 8, 8, 5), normal(3, 3, 5, 6, seed=1)

    def conv(x, kernel):
        return convolution.conv_general_dilated(x, kernel, (2, 2), padding)

    expected = value_and_gradients(conv, x, kernel)
    on("gpu")
    agree(value_and_gradients(conv, x, kernel), expected)


@pytest.mark.parametrize("scale", [1, 1e4])
def test_logsumexp_and_cross_entropy(on, scale):
    logits, targets = scale * normal(4, 6, 33), jax.random.randint(jax.random.key(1), (4, 6), 0, 33)
    expected = value_and_gradients(lambda x: losses.cross_entropy(x, targets), logits)
    on("gpu")
    agree(losses.logsumexp(logits), jax.nn.logsumexp(logits, -1), rtol=1e-6)
    agree(value_and_gradients(lambda x: losses.cross_entropy(x, targets), logits), expected)


@pytest.mark.parametrize("is_causal", [True, False])
def test_splash_attention(is_causal):
    q, k, v = normal(2, 256, 2, 8), normal(2, 384, 2, 8, seed=1), normal(2, 384, 2, 8, seed=2)
    if is_causal:
        k, v = k[:, :256], v[:, :256]
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
    ours = functools.partial(splash._attend, is_causal=is_causal, interpret=True)
    agree(value_and_gradients(ours, q, k, v), value_and_gradients(plain, q, k, v))


def test_splash_attention_applies_to_whole_blocks_on_tpus(on):
    mesh = sharding.make_mesh(sharding.MeshConfig())
    fits, short = jnp.zeros((8, 256, 2, 8)), jnp.zeros((8, 257, 2, 8))
    assert not splash.applies(fits, fits)
    on("tpu")
    assert not splash.applies(fits, fits)  # no mesh to divide it over
    with sharding.use(mesh):
        assert splash.applies(fits, fits)
        assert not splash.applies(fits, short)


@pytest.mark.parametrize("bias", [True, False])
def test_projection_is_a_linear_layer(bias):
    init = layers.uniform(0.5)
    ours = layers.Projection((3, 4), bias, init, jnp.float32)
    theirs = nn.DenseGeneral((3, 4), use_bias=bias, kernel_init=init)
    x = normal(2, 5, 8)
    params = nn.meta.unbox(ours.init(jax.random.key(0), x))
    expected = theirs.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    if bias:
        params["params"]["bias"] = normal(3, 4)
    agree(ours.apply(params, x), theirs.apply(params, x))


def test_global_norm_of_small_and_large_arrays():
    tree = {"large": normal(300, 300), "small": [normal(7), normal(3, 2)], "scalar": jnp.ones(())}
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    agree(optimizer.global_norm(tree), np.linalg.norm(flat.astype(np.float64)), rtol=1e-6)
    assert optimizer.global_norm({"a": jnp.ones(4)}) == 2
