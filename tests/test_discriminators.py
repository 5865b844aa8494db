"""The heads on a frozen DINO: their layers, and what DINO gets to see."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.models import discriminators, norms, resize, vit

import tiny

KEY = jax.random.key(0)


def tokens(batch, positions=12, width=6):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((batch, positions, width), np.float32))


@pytest.fixture(scope="module")
def conv():
    module = discriminators.SpectralConv(5, window=3)
    return module, nn.meta.unbox(module.init(KEY, tokens(2), train=True))


def test_spectral_convolution_is_circular_and_divides_by_the_norm(conv):
    module, variables = conv
    x = np.asarray(tokens(2))
    kernel = np.asarray(variables["params"]["kernel"])
    for _ in range(200):
        _, updated = module.apply(variables, x, train=True, mutable=["batch_stats"])
        variables = variables | updated
    norm = np.linalg.svd(kernel.reshape(-1, 5), compute_uv=False)[0]
    expected = variables["params"]["bias"] + sum(
        np.roll(x, 1 - offset, axis=1) @ kernel[offset] / norm for offset in range(3)
    )
    np.testing.assert_allclose(module.apply(variables, x, train=False), expected, atol=1e-5)


def test_training_call_takes_one_step_of_power_iteration_and_evaluation_none(conv):
    module, variables = conv
    _, still = module.apply(variables, tokens(2), train=False, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, still["batch_stats"], variables["batch_stats"])
    _, moved = module.apply(variables, tokens(2), train=True, mutable=["batch_stats"])
    matrix = np.asarray(variables["params"]["kernel"]).reshape(-1, 5).T
    v = matrix.T @ variables["batch_stats"]["u"]
    u = matrix @ v
    stats = moved["batch_stats"]
    np.testing.assert_allclose(stats["v"].reshape(-1), v / np.linalg.norm(v), atol=1e-6)
    np.testing.assert_allclose(stats["u"], u / np.linalg.norm(u), atol=1e-6)


def test_longer_kernel_has_the_same_output_and_no_gradient_along_itself(conv):
    module, variables = conv

    def output(length):
        params = variables["params"] | {"kernel": length * variables["params"]["kernel"]}
        return module.apply(variables | {"params": params}, tokens(2), train=False)

    np.testing.assert_allclose(output(3.0), output(1.0), atol=1e-5)
    slope = jax.jvp(output, (1.0,), (1.0,))[1]
    np.testing.assert_allclose(slope, np.zeros_like(slope), atol=1e-5)


@pytest.mark.parametrize("batch, size", [(2, 2), (8, 8), (12, 6), (16, 8)])
def test_local_batch_norm_normalizes_groups_of_eight_at_most(batch, size):
    x = tokens(batch) * 3 + 1
    module = norms.LocalBatchNorm()
    y = np.asarray(module.apply(module.init(KEY, x), x)).reshape(batch // size, -1, 6)
    np.testing.assert_allclose(y.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(1), 1, atol=1e-5)


def test_batch_of_unequal_groups_is_rejected():
    assert norms.batch_groups(256) == 32
    with pytest.raises(ValueError, match=r"^batch_size: expected equal groups .* got 13"):
        norms.batch_groups(13)


def test_area_resize_averages_every_pixel_it_touches():
    image = tiny.images(1, size=7)
    rows = [slice(0, 3), slice(2, 5), slice(4, 7)]  # thirds of 7 begin at 0, 2.33, 4.67
    expected = [[image[0, r, c].mean((0, 1)) for c in rows] for r in rows]
    np.testing.assert_allclose(resize.area(image, 3)[0], expected, atol=1e-6)


def test_dino_sees_a_crop_or_the_whole_image_with_even_odds():
    config = vit.ViTConfig(1, 1, 4, patch_size=2, grid=3)
    images = jnp.asarray(tiny.images(2, size=8))
    normal = np.asarray(vit.normalize(images, config))
    crops = {
        (row, column): normal[:, row : row + 6, column : column + 6]
        for row in range(3)
        for column in range(3)
    }
    whole = resize.area(normal, 6)
    see = jax.jit(lambda key: discriminators.dino_inputs(images, config, key))
    seen, count = set(), 0
    for i in range(100):
        inputs = see(jax.random.key(i))
        matches = {place for place, crop in crops.items() if np.allclose(inputs, crop, atol=1e-6)}
        assert matches or np.allclose(inputs, whole, atol=1e-5)
        seen |= matches
        count += bool(matches)
    assert seen == crops.keys() and 35 < count < 65


def test_small_images_are_enlarged_for_dino():
    config = vit.ViTConfig(1, 1, 4, patch_size=2, grid=3)
    images = tiny.images(2, size=5)
    inputs = discriminators.dino_inputs(images, config, KEY)
    np.testing.assert_allclose(inputs, vit.preprocess(images, config, 3), atol=1e-6)


def test_heads_rate_every_token_of_every_feature():
    module, features = discriminators.DinoHeads(), tokens(6).reshape(3, 2, 12, 6)
    variables = nn.meta.unbox(jax.jit(module.init)(KEY, features))
    logits = jax.jit(functools.partial(module.apply, train=False))(variables, features)
    assert logits.shape == (2, 36)
    one = jax.jit(functools.partial(discriminators.DinoHead().apply, train=False))
    for i in range(3):
        own = jax.tree.map(lambda x, i=i: x[i], {k: v["head"] for k, v in variables.items()})
        expected = one(own, features[i])
        np.testing.assert_allclose(logits[:, 12 * i : 12 * i + 12], expected, atol=1e-5)


def test_groups_of_a_batch_are_normalized_separately():
    x = np.random.default_rng(0).standard_normal((6, 4, 4, 3), np.float32)
    variables = norms.BatchNorm().init(jax.random.key(0), x, train=True)

    def apply(groups, x):
        module = norms.BatchNorm(groups=groups)
        return module.apply(variables, x, train=True, mutable=["batch_stats"])

    y, updated = apply(3, x)
    for i in range(3):
        part, statistics = apply(1, x[2 * i : 2 * i + 2])
        np.testing.assert_allclose(y[2 * i : 2 * i + 2], part, atol=1e-5)
        if i == 0:  # PyTorch's data parallelism keeps those of the first process
            jax.tree.map(np.testing.assert_array_equal, updated, statistics)
    whole, _ = apply(1, x)
    assert np.abs(whole - y).max() > 0.01
