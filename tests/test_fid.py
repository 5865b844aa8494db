"""Distances between sets of images: parity with ADM's evaluator, properties, and references."""

import tracemalloc

import jax
import numpy as np
from PIL import Image
import pytest
import scipy.linalg

from gigatok_jax.data.sources import DataConfig, open_source
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import fid
from gigatok_jax.evaluation.fid import FeatureSet, Gaussian, Moments
from gigatok_jax.files import cache_dir

import image_folders
import synth

DATA = DataConfig(source="embedded", length=64, eval_length=50)


class Projection:
    """An extractor that costs nothing: random projections of the pixels."""

    distance, fingerprint = "fid", "projection"
    widths = {"pool": 6, "spatial": 4, "log_probabilities": 5}  # noqa: RUF012

    def __call__(self, images):
        pixels = images.reshape(len(images), -1).astype(np.float32) / 255
        rng, found = np.random.default_rng(0), {}
        for name, width in self.widths.items():
            found[name] = pixels @ rng.standard_normal((pixels.shape[1], width), np.float32)
        found["log_probabilities"] = np.asarray(jax.nn.log_softmax(found["log_probabilities"]))
        return found


class Unused(Projection):
    def __call__(self, images):
        raise AssertionError("features were computed again")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path / "cache"))


def load(npz="", *, data=DATA, extractor=None, count=20, **options):
    sizes = {"count": count, "image_size": 16, "batch_size": 8}
    return fid.load_reference(str(npz), data, extractor or Projection(), **sizes, **options)


def noise(count, size=16):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def moments(*parts: np.ndarray) -> Moments:
    found = Moments(parts[0].shape[1])
    for part in parts:
        found.add(part)
    return found


def test_metrics_match_reference():
    expected = synth.expected("generation_metrics.npz")
    reference, samples = expected["reference_features"], expected["sample_features"]
    distance = fid.frechet_distance(moments(reference).gaussian(), moments(samples).gaussian())
    assert distance == pytest.approx(float(expected["frechet_distance"]), rel=1e-6)
    found = fid.precision_recall(reference, samples)
    assert found == pytest.approx((float(expected["precision"]), float(expected["recall"])))
    score = fid.inception_score(np.asarray(jax.nn.log_softmax(expected["logits"])), split=250)
    assert score == pytest.approx(float(expected["inception_score_split250"]), rel=1e-5)


@pytest.mark.parametrize("count", [20, 400])  # fewer and more than dimensions
def test_a_set_is_at_no_distance_from_itself(count):
    gaussian = moments(np.random.default_rng(0).standard_normal((count, 128))).gaussian()
    assert 0 <= fid.frechet_distance(gaussian, gaussian) < 1e-6


def test_distance_is_that_of_the_matrix_root():
    rng = np.random.default_rng(0)
    a, b = (moments(rng.standard_normal((90, 30)) @ rng.standard_normal((30, 30))) for _ in "ab")
    a, b = a.gaussian(), b.gaussian()
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    difference = a.mean - b.mean
    expected = difference @ difference + np.trace(a.covariance + b.covariance - 2 * root)
    assert fid.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert fid.frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_a_shift_of_the_mean_adds_its_square():
    gaussian = moments(np.random.default_rng(0).standard_normal((50, 6))).gaussian()
    shifted = Gaussian(gaussian.mean + 3, gaussian.covariance)
    assert fid.frechet_distance(gaussian, shifted) == pytest.approx(6 * 9)


def test_statistics_do_not_depend_on_order_or_batches():
    features = np.random.default_rng(0).normal(2, 1, (1_000, 40)).astype(np.float32)
    one = moments(features).gaussian()
    other = moments(*np.array_split(features[::-1], 13)).gaussian()
    np.testing.assert_allclose(one.mean, features.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(one.covariance, np.cov(features.astype(np.float64).T), atol=1e-11)
    np.testing.assert_allclose(other.mean, one.mean, rtol=1e-6)
    np.testing.assert_allclose(other.covariance, one.covariance, atol=1e-6)


@pytest.mark.parametrize(
    "features, message",
    [
        (np.zeros((1, 3)), r"images: expected at least 2 images .*, got 1"),
        (np.array([[0.0, 1], [np.nan, 0]]), "image 1: expected finite features"),
    ],
)
def test_sets_without_a_covariance_are_rejected(features, message):
    with pytest.raises(UserError, match=message):
        moments(features).gaussian()


def test_precision_measures_quality_and_recall_diversity():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((300, 8))
    copies = real[:5].repeat(20, 0) + 1e-3 * rng.standard_normal((100, 8))
    precision, recall = fid.precision_recall(real, copies)
    assert precision == 1 and recall < 0.1
    precision, recall = fid.precision_recall(real, real + 100)
    assert precision == recall == 0


def test_precision_and_recall_do_not_depend_on_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    sets = rng.standard_normal((30, 5)), rng.standard_normal((25, 5))
    whole = fid.precision_recall(*sets)
    monkeypatch.setattr(fid, "ROWS", 7)
    assert fid.precision_recall(*sets) == whole


def test_inception_score_of_certain_and_even_predictions_is_their_number():
    with np.errstate(divide="ignore"):
        certain = np.log(np.eye(10)[np.arange(40) % 10])
    assert fid.inception_score(np.maximum(certain, -1e4), split=20) == pytest.approx(10)


def test_samples_like_the_reference_score_best():
    samples, reference = FeatureSet(Projection(), members=True), load()
    source = open_source(DATA, train=False, image_size=16)
    images = np.stack([source[i]["image"] for i in range(50)])
    for batch in np.array_split(images, 4):
        samples.add(batch)
    found = fid.compare(samples, reference, "fid")
    assert list(found) == ["gfid", "sfid", "inception_score", "precision", "recall"]
    assert found["gfid"] < 1e-6 and found["sfid"] < 1e-6
    assert found["precision"] == found["recall"] == 1
    others = FeatureSet(Projection(), members=True)
    others.add(noise(50))
    assert fid.compare(others, reference, "fid")["gfid"] > 1


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_of_an_npz_are_read_one_batch_at_a_time(save, tmp_path):
    images = noise(300, 32)
    save(tmp_path / "a.npz", arr_0=images, arr_1=np.zeros(300))
    batches = fid.read_images(tmp_path / "a.npz", 7)
    tracemalloc.start()
    for start, batch in zip(range(0, 300, 7), batches, strict=True):
        np.testing.assert_array_equal(batch, images[start : start + 7])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes / 4


def saved(**arrays):
    return lambda path: np.savez(path, **arrays)


def whole(path):
    np.savez(path, arr_0=noise(9, 8), mu=np.zeros(6), sigma=np.eye(6))
    return path.read_bytes()


@pytest.mark.parametrize(
    "write, message",
    [
        (saved(images=np.zeros(3)), "expected images as arr_0, or statistics .* found images"),
        (lambda path: path.write_text("text"), "not a zip file"),
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(whole(path)[:-100]), "not a zip file"),
        (lambda path: path.write_bytes(whole(path).replace(b"NUMPY", b"NUMPI")), "Bad CRC-32"),
        (lambda path: path.write_bytes(flipped(whole(path), 1_000)), "Bad CRC-32"),
        (saved(arr_0=np.zeros((2, 4, 4, 3))), r"expected arr_0 to be uint8 .* float64 \[2, 4, 4"),
        (saved(arr_0=np.zeros((2, 4, 4), np.uint8)), r"to be uint8 .* uint8 \[2, 4, 4\]"),
        (saved(arr_0=np.zeros((3, 0, 0, 3), np.uint8)), r"uint8 \[3, 0, 0, 3\]"),
        (saved(mu=np.zeros(3), sigma=np.eye(2)), r"mu \[D\] and sigma \[D, D\], got \[3\] and"),
        (saved(mu=np.array([np.nan]), sigma=np.eye(1)), "mu or sigma is not finite"),
        (saved(mu=np.zeros(1), sigma=np.full((1, 1), np.inf)), "mu or sigma is not finite"),
        (saved(mu=np.zeros(2), sigma=-np.eye(2)), "without negative eigenvalues"),
        (saved(mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0, 1]])), "to be symmetric"),
        (saved(mu=np.zeros(1, complex), sigma=np.eye(1)), "Cannot cast .*complex"),
        (saved(mu=np.zeros(7), sigma=np.eye(7)), "statistics of the 6 features of fid, got 7"),
        (saved(arr_0=noise(1)), "expected at least 2 images .*, got 1"),
        (saved(arr_0=noise(3)), "expected at least 4 images, got 3"),
    ],
)
def test_a_file_that_is_no_reference_is_named_in_one_line(write, message, tmp_path):
    write(tmp_path / "a.npz")
    with pytest.raises(UserError, match=rf"a\.npz.*: .*{message}") as raised:
        load(tmp_path / "a.npz")
    assert "\n" not in str(raised.value)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_images_of_an_npz_serve_as_reference(tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=noise(20))
    reference = load(tmp_path / "real.npz")
    features = Projection()(noise(20))
    np.testing.assert_allclose(reference.members, features["pool"], rtol=1e-4, atol=1e-4)
    assert reference.gaussians.keys() == {"pool", "spatial"}
    for name, gaussian in reference.gaussians.items():
        np.testing.assert_allclose(gaussian.mean, features[name].mean(0), rtol=1e-3, atol=1e-4)


def test_stored_statistics_replace_those_of_images_if_the_features_are_as_many(tmp_path):
    for width, taken in ((6, True), (64, False)):
        path = tmp_path / f"{width}.npz"
        np.savez(path, arr_0=noise(20), mu=np.full(width, 7.0), sigma=np.eye(width))
        mean = load(path).gaussians["pool"].mean
        assert mean.shape == (6,) and (mean[0] == 7) == taken


def test_images_of_another_size_are_a_warning(tmp_path, caplog):
    np.savez(tmp_path / "real.npz", arr_0=noise(8, 24))
    load(tmp_path / "real.npz")
    assert "images of 24x24 pixels, but samples of 16" in caplog.text


def test_content_names_a_reference(tmp_path):
    names = set()
    for seed, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        mean = np.random.default_rng(seed).random(6)
        np.savez(tmp_path / folder / "real.npz", mu=mean, sigma=np.eye(6))
        names.add(load(tmp_path / folder / "real.npz").name)
    assert len(names) == 2


def test_reference_of_a_data_set_is_computed_once():
    first, again = load(), load(extractor=Unused())
    np.testing.assert_array_equal(again.members, first.members)
    assert len(first.members) == 50 and again.name == first.name
    for name, gaussian in first.gaussians.items():
        np.testing.assert_array_equal(again.gaussians[name].mean, gaussian.mean)
        np.testing.assert_array_equal(again.gaussians[name].covariance, gaussian.covariance)


def test_a_damaged_cached_reference_is_named():
    path = cache_dir() / "references" / f"{load().name}.npz"
    path.write_bytes(path.read_bytes()[:2_000])
    with pytest.raises(UserError, match=rf"{path}: not a usable \.npz file: "):
        load()


def test_training_images_are_another_reference():
    assert len(load(train=True).members) == 64


def test_a_changed_folder_is_another_reference(tmp_path):
    data = DataConfig(source="folder", path=str(tmp_path / "data"), holdout=0)
    image_folders.make(tmp_path / "data", {"a": 3, "b": 3})
    before = load(data=data)
    assert load(data=data, extractor=Unused()).name == before.name
    path = next((tmp_path / "data" / "a").iterdir())
    Image.effect_noise((20, 20), 90).convert("RGB").save(path)
    after = load(data=data)
    assert after.name != before.name
    assert np.abs(after.gaussians["pool"].mean - before.gaussians["pool"].mean).max() > 1e-3


def test_members_of_a_reference_are_of_all_classes(monkeypatch):
    monkeypatch.setattr(fid, "MEMBERS", 20)  # of 50 drawings, whose 10 classes come in turn
    members = load().members
    source = open_source(DATA, train=False, image_size=16)
    pool = Projection()(np.stack([source[i]["image"] for i in range(50)]))["pool"]
    found = [np.abs(pool - member).max(axis=1).argmin() for member in members]
    assert len(set(found)) == 20 and len({index % 10 for index in found}) >= 7


def test_too_few_samples_are_rejected_before_they_are_drawn():
    with pytest.raises(UserError, match="samples: expected at least 4 images, got 3"):
        load(count=3)


def test_data_of_one_readable_image_are_named(tmp_path):
    image_folders.make(tmp_path / "photos", {"ant": 2})
    image_folders.spoil(tmp_path / "photos" / "ant" / "ant_001.png")
    data = DataConfig(source="folder", path=str(tmp_path / "photos"), holdout=0)
    with pytest.raises(UserError, match=r"photos: expected at least 2 images .*, got 1$"):
        load(data=data)


def test_data_of_one_image_are_rejected():
    one = DataConfig(source="embedded", length=1, eval_length=1)
    with pytest.raises(UserError, match=r"config\.data\.eval_length: expected at least 2 images"):
        load(data=one)
