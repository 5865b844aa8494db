"""DiffAug: what each augmentation may and may not do to an image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax.training import diffaug

import tiny

KEY = jax.random.key(0)
FUNCTIONS = [diffaug.translate, diffaug.color, diffaug.cutout, diffaug.augment]


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(tiny.images(64, size=24))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_draws_differ_between_images_and_keys_and_repeat(function, images):
    one, same, other = (function(images, jax.random.key(i)) for i in (0, 0, 1))
    assert one.shape == images.shape and one.dtype == images.dtype
    np.testing.assert_array_equal(one, same)
    assert (np.abs(one - other).max((1, 2, 3)) > 0).mean() > 0.9
    alike = function(jnp.broadcast_to(images[:1], images.shape), KEY)
    assert len(np.unique(np.asarray(alike).reshape(len(images), -1), axis=0)) > 16


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradient_is_the_slope(function, images):
    few = images[:2]
    direction = jnp.asarray(tiny.images(2, size=24, seed=1))

    def value(step):
        return (function(few + step * direction, KEY) ** 2).sum()

    slope = jax.grad(value)(0.0)
    # Exact for a quadratic value; in float64, because the two values nearly cancel.
    ends = (np.asarray(function(few + s * direction, KEY), np.float64) for s in (0.5, -0.5))
    difference = np.subtract(*(np.sum(end**2) for end in ends))
    np.testing.assert_allclose(slope, difference, rtol=1e-3)
    assert slope != 0


def test_translation_moves_by_an_eighth_at_most_and_fills_with_zeros(images):
    moves = set()
    for before, after in zip(np.asarray(images), diffaug.translate(images, KEY), strict=True):
        padded = np.pad(before, ((3, 3), (3, 3), (0, 0)))
        moves |= {
            (row, column)
            for row in range(7)
            for column in range(7)
            if np.array_equal(padded[row : row + 24, column : column + 24], after)
        }
    rows, columns = zip(*moves, strict=True)
    assert set(rows) == set(columns) == set(range(7))
    assert len(moves) > 7  # rows and columns are drawn apart


def test_color_changes_brightness_saturation_and_contrast_within_their_ranges(images):
    before, after = np.asarray(images), np.asarray(diffaug.color(images, KEY))
    shift = (after - before).mean((1, 2, 3))
    assert -0.5 <= shift.min() < -0.3 and 0.3 < shift.max() <= 0.5

    def parts(x):
        """Deviation of grey values from the image's, and of channels from grey."""
        grey = x.mean(3, keepdims=True)
        return (grey - grey.mean((1, 2), keepdims=True)).std((1, 2, 3)), (x - grey).std((1, 2, 3))

    contrast = parts(after)[0] / parts(before)[0]
    assert 0.5 <= contrast.min() < 0.7 and 1.3 < contrast.max() <= 1.5
    saturation = parts(after)[1] / parts(before)[1] / contrast
    assert 0 <= saturation.min() < 0.3 and 1.7 < saturation.max() <= 2
    np.testing.assert_allclose(contrast.mean(), 1, atol=0.1)


@pytest.mark.parametrize("size", [24, 25, 26])  # even and odd lengths of the rectangle
def test_cutout_is_a_rectangle_of_a_fifth_wherever_it_fits(size):
    holes = np.asarray(diffaug.cutout(jnp.ones((500, size, size, 3)), KEY))[..., 0] == 0
    length = round(0.2 * size)
    rows, columns = holes.any(2), holes.any(1)
    np.testing.assert_array_equal(holes, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):
        assert side.sum(1).max() == length
        assert side.sum(1).min() == (length + 1) // 2  # its middle is never outside
        inner = side.mean(0)[length:-length]
        np.testing.assert_allclose(inner, length / size, atol=0.1)  # anywhere alike
