"""The embedded teacher: small, quick to load, and it sees what the drawings show."""

import itertools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageFilter
import pytest

from gigatok_jax import bundles, frozen_networks, locate
from gigatok_jax.data import drawings
from gigatok_jax.errors import UserError
from gigatok_jax.models import layers, vit
from gigatok_jax.training import losses
from tools import train_embedded_teacher

TAPS = (0, 2, 4, 6)
EMBEDDED = locate.INCLUDED["embedded"][1]


@pytest.fixture(scope="module")
def teacher():
    return frozen_networks.load_teacher("embedded")


@pytest.fixture(scope="module")
def features(teacher):
    """Function from uint8 images to the class token, patch tokens and taps."""
    config, params = teacher

    @jax.jit
    def apply(images):
        inputs = vit.preprocess(images / 127.5 - 1, config, config.grid)
        return vit.ViT(config).apply({"params": params}, inputs, taps=TAPS)

    return apply


def _drawings(split: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    drawn = [drawings.draw(i, split=split) for i in range(count)]
    fields = (np.stack([getattr(d, f) for d in drawn]) for f in ("image", "label", "mask"))
    return tuple(fields)


def _ridge_accuracy(x, labels, held_out, held_out_labels) -> float:
    """Accuracy on held-out features of a linear classifier fitted by ridge regression."""
    mean = x.mean(0)
    x, held_out = (np.c_[np.asarray(a) - mean, np.ones(len(a))] for a in (x, held_out))
    targets = np.eye(labels.max() + 1)[labels]
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ targets)
    return float(((held_out @ weights).argmax(1) == held_out_labels).mean())


def test_files_are_small_and_load_in_a_second(teacher):
    size = sum(file.stat().st_size for file in EMBEDDED.iterdir())
    assert size < 1.6e6
    start = time.perf_counter()
    frozen_networks.load_teacher("embedded")
    assert time.perf_counter() - start < 1


def test_parameters_are_those_of_the_vit(teacher):
    config, params = teacher
    expected = layers.param_shapes(vit.ViT(config), (1, 64, 64, 3))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, expected)


def test_class_tokens_tell_the_class(features):
    images, labels, _ = _drawings("train", 300)
    held_out, held_out_labels, _ = _drawings("validation", 200)
    tokens, held_out_tokens = features(images)[0], features(held_out)[0]
    assert _ridge_accuracy(tokens, labels, held_out_tokens, held_out_labels) >= 0.8


def test_patch_tokens_tell_what_a_patch_shows(features):
    """Among patches that lie wholly in an object or in the background."""

    def patches(split, count):
        images, labels, masks = _drawings(split, count)
        cover = masks.reshape(count, 8, 8, 8, 8).mean((2, 4)).reshape(count, 64)
        shown = np.where(cover > 0.5, labels[:, None] + 1, 0)
        clear = (cover < 0.02) | (cover > 0.98)
        return np.asarray(features(images)[1])[clear], shown[clear]

    assert _ridge_accuracy(*patches("train", 200), *patches("validation", 100)) >= 0.85


def test_final_tokens_have_unit_scale(features):
    tokens, patches, _ = features(_drawings("validation", 50)[0])
    for x in (tokens, patches):
        assert 0.3 < float(jnp.square(x).mean()) < 3


def test_distance_grows_with_blur_and_noise(features):
    images = _drawings("validation", 40)[0]
    taps = features(images)[2]

    def blurred(radius):
        kernel = ImageFilter.GaussianBlur(radius)
        return np.stack([np.asarray(Image.fromarray(i).filter(kernel)) for i in images])

    noise = np.random.default_rng(0).normal(size=images.shape)
    for changed in (
        [blurred(radius) for radius in (0, 0.5, 1, 2, 4)],
        [np.clip(images + 255 * share * noise, 0, 255) for share in (0, 0.02, 0.05, 0.1, 0.2)],
    ):
        distances = [float(losses.feature_distance(taps, features(x)[2]).mean()) for x in changed]
        assert distances[0] == pytest.approx(0, abs=1e-6)
        assert all(a < b for a, b in itertools.pairwise(distances)), distances


def test_descending_the_distance_sharpens_a_blurred_image(features):
    sharp = _drawings("validation", 4)[0].astype(np.float32)
    kernel = ImageFilter.GaussianBlur(2)
    start = np.stack(
        [np.asarray(Image.fromarray(i.astype(np.uint8)).filter(kernel)) for i in sharp]
    )
    taps = features(sharp)[2]
    gradient = jax.jit(jax.grad(lambda x: losses.feature_distance(features(x)[2], taps).sum()))
    images = jnp.asarray(start, jnp.float32)
    assert np.isfinite(gradient(jnp.asarray(sharp))).all()  # where the distance is 0
    optimizer = optax.adam(2.5)
    moments = optimizer.init(images)
    for _ in range(60):
        updates, moments = optimizer.update(gradient(images), moments)
        images = optax.apply_updates(images, updates)
    before, after = (np.square(x - sharp).mean() for x in (start.astype(np.float32), images))
    assert after < 0.8 * before


def test_feature_distance_is_bounded_and_ignores_token_lengths():
    x, y = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float32)
    np.testing.assert_allclose(losses.feature_distance([x], [-x]), 4, rtol=1e-5)
    np.testing.assert_allclose(
        losses.feature_distance([x, y], [y, y]),
        losses.feature_distance([x], [3 * y]) / 2,
        rtol=1e-5,
    )


def test_teacher_loads_from_a_directory(teacher):
    config, params = frozen_networks.load_teacher(str(EMBEDDED))
    assert config == teacher[0] == frozen_networks.architecture("embedded")
    chex.assert_trees_all_equal(params, teacher[1])


def test_training_writes_a_bundle(tmp_path, monkeypatch, teacher):
    record = {"steps": 3, "validation": {"class_accuracy": 1.0}}
    monkeypatch.setattr(train_embedded_teacher, "train", lambda *_: (teacher[1], record))
    train_embedded_teacher.main([f"--out={tmp_path / 'new'}"])
    assert bundles.load(tmp_path / "new", "dinov2").made_by == record
    config, params = frozen_networks.load_teacher(str(tmp_path / "new"))
    assert config == teacher[0]
    chex.assert_trees_all_equal(params, teacher[1])


def test_unknown_names_and_foreign_directories_are_rejected(tmp_path):
    with pytest.raises(
        UserError,
        match=r"^config\.objective\.teacher: 'dinov9': .*known: embedded, dinov2_vits14, ",
    ):
        frozen_networks.load_teacher("dinov9")
    with pytest.raises(
        UserError, match=r"^config\.objective\.teacher: .*absent': no such folder; "
    ):
        frozen_networks.load_teacher(str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="not the config of a bundle"):
        frozen_networks.load_teacher(str(tmp_path))


def test_augmentation_keeps_the_mask_on_the_object():
    """The mask itself, augmented as an image, stays the mask."""
    mask = drawings.draw(4).mask
    image = np.repeat(2 * mask[..., None] - 1, 3, axis=-1)
    augment = jax.jit(jax.vmap(train_embedded_teacher.augment, in_axes=(0, None, None)))
    images, masks = augment(jax.random.split(jax.random.key(0), 16), image, mask)
    for changed, moved in zip(np.asarray(images).mean(-1), np.asarray(masks), strict=True):
        assert np.corrcoef(changed.ravel(), moved.ravel())[0, 1] > 0.9
    assert np.abs(masks - mask).mean(axis=(1, 2)).max() > 0.05


def test_part_labels_are_the_masks_shares():
    masks = np.zeros((1, 64, 64), np.float32)
    masks[0, :8, 8:12] = 1  # half of the second patch of the first row
    masks[0, -8:, -8:] = 1
    labels = np.asarray(train_embedded_teacher.part_labels(masks, np.array([3])))
    assert labels.shape == (1, 64, 11)
    np.testing.assert_allclose(labels[0, 1, [0, 4]], 0.5)
    np.testing.assert_allclose(labels[0, 63, [0, 4]], [0, 1])
    np.testing.assert_allclose(labels[0, 2:63, 0], 1)
