"""Distances between sets of images: parity with ADM's evaluator, and their properties."""

import jax
import numpy as np
import pytest
import scipy.linalg

from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import distribution
from gigatok_jax.evaluation.distribution import Gaussian, InceptionScore, Moments
from gigatok_jax.models import inception
from gigatok_jax.weights import convert

import synth


def moments(*parts: np.ndarray) -> Moments:
    found = Moments.empty(parts[0].shape[1])
    for part in parts:
        found.add(part)
    return found


def test_generation_metrics_match_reference():
    expected = synth.expected("generation_metrics.npz")
    reference, samples = expected["reference_features"], expected["sample_features"]
    distance = distribution.frechet_distance(
        moments(reference).gaussian(), moments(samples).gaussian()
    )
    assert distance == pytest.approx(float(expected["frechet_distance"]), rel=1e-6)
    found = distribution.precision_recall(reference, samples)
    assert found == pytest.approx((float(expected["precision"]), float(expected["recall"])))
    score = InceptionScore(split=250)
    for part in np.array_split(np.asarray(jax.nn.log_softmax(expected["logits"])), 7):
        score.add(part)
    assert score.result() == pytest.approx(float(expected["inception_score_split250"]), rel=1e-5)


def test_inception_matches_reference():
    params = convert.inception_from_torch(synth.checkpoint("inception_fid"))
    images = np.clip(127.5 * synth.images(2) + 128, 0, 255).astype(np.uint8)

    @jax.jit
    def features(params, images):
        return inception.Inception().apply({"params": params}, inception.preprocess(images))

    found, expected = features(params, images), synth.expected("inception_fid.npz")
    spatial = found["spatial"].reshape(2, 17, 17, 7).transpose(0, 3, 1, 2)
    for name, value in (("pool", found["pool"]), ("logits", found["logits"]), ("spatial", spatial)):
        error = np.abs(value - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 2e-4, name
    back = convert.inception_to_torch(params)
    for name, tensor in synth.checkpoint("inception_fid").items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(back[name], tensor, err_msg=name)


@pytest.mark.parametrize("count", [20, 400])  # fewer and more than dimensions
def test_a_set_is_at_no_distance_from_itself(count):
    gaussian = moments(np.random.default_rng(0).standard_normal((count, 128))).gaussian()
    assert 0 <= distribution.frechet_distance(gaussian, gaussian) < 1e-6


def test_distance_of_gaussians_is_that_of_a_matrix_root():
    rng = np.random.default_rng(0)
    a, b = (moments(rng.standard_normal((90, 30)) @ rng.standard_normal((30, 30))) for _ in "ab")
    a, b = a.gaussian(), b.gaussian()
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    difference = a.mean - b.mean
    expected = difference @ difference + np.trace(a.covariance + b.covariance - 2 * root)
    assert distribution.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert distribution.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_shift_of_the_mean_adds_its_square():
    gaussian = moments(np.random.default_rng(0).standard_normal((50, 6))).gaussian()
    shifted = Gaussian(gaussian.mean + 3, gaussian.covariance)
    assert distribution.frechet_distance(gaussian, shifted) == pytest.approx(6 * 9)


def test_statistics_depend_neither_on_order_nor_on_batches():
    features = np.random.default_rng(0).normal(2, 1, (1_000, 40)).astype(np.float32)
    one = moments(features).gaussian()
    other = moments(*np.array_split(features[::-1], 13)).gaussian()
    np.testing.assert_allclose(one.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(one.covariance, np.cov(features.astype(np.float64).T), atol=1e-11)
    np.testing.assert_allclose(other.mean, one.mean, rtol=1e-6)
    np.testing.assert_allclose(other.covariance, one.covariance, atol=1e-6)


def test_precision_and_recall_tell_quality_from_diversity():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((300, 8))
    copies = real[:5].repeat(20, 0) + 1e-3 * rng.standard_normal((100, 8))
    precision, recall = distribution.precision_recall(real, copies)
    assert precision == 1 and recall < 0.1
    precision, recall = distribution.precision_recall(real, real + 100)
    assert precision == recall == 0


def test_blocks_of_rows_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    sets = rng.standard_normal((200, 5)), rng.standard_normal((150, 5))
    whole = distribution.precision_recall(*sets)
    monkeypatch.setattr(distribution, "ROWS", 7)
    assert distribution.precision_recall(*sets) == whole


def test_inception_score_of_certain_and_even_classes_is_their_number():
    with np.errstate(divide="ignore"):
        certain = np.log(np.eye(10)[np.arange(40) % 10])
    score = InceptionScore(split=20)
    score.add(np.maximum(certain, -1e4))
    assert score.result() == pytest.approx(10)


@pytest.mark.parametrize(
    "features, message",
    [
        (np.zeros((1, 3)), "at least 2 images, got 1"),
        (np.array([[0.0, 1], [np.nan, 0]]), "features of image 1 are not finite"),
    ],
)
def test_sets_without_a_covariance_are_refused(features, message):
    with pytest.raises(UserError, match=message):
        moments(features).gaussian()


def test_too_few_images_for_neighbours_are_refused():
    with pytest.raises(UserError, match=r"more than 3 images, got 3 in the samples"):
        distribution.precision_recall(np.zeros((9, 2)), np.zeros((3, 2)))
