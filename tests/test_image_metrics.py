"""PSNR and SSIM against their definitions in NumPy."""

import numpy as np
import pytest

from gigatok_jax import image_metrics


def batches():
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:20, 0:26]
    waves = 128 + 90 * np.sin(rows / 4 + columns / 7)[None, :, :, None] * np.ones((3, 1, 1, 3))
    noise = np.array([2, 20, 80]).reshape(3, 1, 1, 1) * rng.standard_normal(waves.shape)
    return tuple(np.clip(a, 0, 255).astype(np.uint8) for a in (waves, waves + noise))


def ssim(x, y, data_range):
    """scikit-image's, window by window: uniform 7x7, unbiased covariances, C1 and C2 of 2004."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for channel in range(x.shape[-1]):
        for i in range(x.shape[0] - 6):
            for j in range(x.shape[1] - 6):
                a, b = (z[i : i + 7, j : j + 7, channel].ravel() / 255 for z in (x, y))
                (var_a, covariance), (_, var_b) = np.cov(a, b)
                luminance = (2 * a.mean() * b.mean() + c1) / (a.mean() ** 2 + b.mean() ** 2 + c1)
                values.append(luminance * (2 * covariance + c2) / (var_a + var_b + c2))
    return np.mean(values)


def test_psnr_is_ten_log_of_peak_over_mean_squared_error():
    images, others = batches()
    error = (images.astype(float) - others) ** 2
    expected = 10 * np.log10(255**2 / error.mean((1, 2, 3)))
    assert expected[0] > expected[1] > expected[2] > 5
    np.testing.assert_allclose(image_metrics.psnr(images, others), expected, rtol=1e-5)


@pytest.mark.parametrize("data_range", [1, 2])
def test_ssim_is_the_mean_over_windows_and_channels(data_range):
    images, others = batches()
    expected = [ssim(x, y, data_range) for x, y in zip(images, others, strict=True)]
    assert expected[0] > 0.9 > 0.5 > expected[2]
    np.testing.assert_allclose(image_metrics.ssim(images, others, data_range), expected, atol=1e-5)


def test_references_data_range_gives_higher_ssim():
    assert np.all(image_metrics.ssim(*batches(), 2) > image_metrics.ssim(*batches()))


def test_equal_images_have_the_psnr_of_one_value_that_differs_by_one_and_ssim_one():
    images, _ = batches()
    nearly = np.array(images)
    nearly[:, 0, 0, 0] ^= 1
    expected = 10 * np.log10(255.0**2 * images[0].size)
    for others in (images, nearly):
        np.testing.assert_allclose(image_metrics.psnr(images, others), expected, rtol=1e-6)
    np.testing.assert_allclose(image_metrics.ssim(images, images), 1, rtol=1e-6)
