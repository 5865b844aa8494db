"""The embedded data set: reproducible, balanced, the same at every size, and learnable."""

import pickle

import numpy as np
from PIL import Image
import pytest

from gigatok_jax.data.drawings import CLASS_NAMES, EmbeddedSource, draw

QUARTERS = [
    [159.81, 172.43, 140.13, 151.73],
    [196.90, 204.99, 184.17, 199.04],
    [147.59, 142.17, 164.48, 153.00],
    [144.43, 148.89, 142.77, 150.08],
    [174.38, 177.24, 189.13, 191.00],
    [145.38, 144.24, 137.29, 132.15],
    [162.36, 173.19, 166.23, 179.21],
    [130.90, 149.99, 126.88, 117.13],
    [164.27, 141.66, 147.48, 138.13],
    [179.11, 181.74, 172.52, 163.62],
]


def _images(source: EmbeddedSource, count: int) -> np.ndarray:
    return np.stack([source[i]["image"] for i in range(count)])


def _silhouettes(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Low spatial frequencies of the masks, blind to position: [B, F], and labels [B]."""
    drawings = [draw(i, image_size=32, split=split) for i in range(count)]
    spectra = np.abs(np.fft.rfft2(np.stack([d.mask for d in drawings])))[..., :10]
    return np.log1p(spectra).reshape(count, -1), np.array([d.label for d in drawings])


def test_examples_are_identical_across_pickling_order_and_length():
    source = EmbeddedSource(40, 64, split="train", seed=3)
    copy = pickle.loads(pickle.dumps(source))
    longer = EmbeddedSource(1000, 64, split="train", seed=3)
    for i in reversed(range(20)):
        np.testing.assert_array_equal(source[i]["image"], copy[np.int64(i)]["image"])
        np.testing.assert_array_equal(source[i]["image"], longer[i]["image"])
        assert source[i]["key"] == longer[i]["key"]


def test_what_training_crops_are_taken_from_is_drawn_once():
    for size in (40, 80):  # of crops of 32 and 64 pixels
        source = EmbeddedSource(1, size)
        assert source[0]["image"] is source[0]["image"]


def test_drawings_look_as_they_always_did():
    # The weights of the embedded teacher belong to these pictures. Means, because the last bit of
    # a pixel may depend on the processor.
    grey = np.stack([draw(i, image_size=64).image @ (0.5, 0.3, 0.2) for i in range(10)])
    quarters = grey.reshape(10, 2, 32, 2, 32).mean((2, 4)).reshape(10, 4)
    np.testing.assert_allclose(quarters, QUARTERS, atol=0.02)


def test_no_drawing_is_repeated_within_or_between_splits_and_seeds():
    kinds = (("train", 0), ("validation", 0), ("train", 1))
    sources = [EmbeddedSource(200, 32, split, seed) for split, seed in kinds]
    images = np.concatenate([_images(source, 200) for source in sources])
    assert len({image.tobytes() for image in images}) == 600
    assert len({source[i]["key"] for source in sources[:2] for i in range(200)}) == 400


def test_labels_are_balanced_over_ten_classes():
    labels = [example["label"] for example in EmbeddedSource(50, 16)]
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 10
    np.testing.assert_array_equal(np.bincount(labels), [5] * 10)
    assert all(type(label) is int for label in labels)


@pytest.mark.parametrize("size", [32, 96, 256])
def test_size_changes_the_sampling_and_not_the_scene(size):
    for i in range(10):
        image, reference = draw(i, image_size=size).image, draw(i, image_size=64).image
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        small, other = (
            np.asarray(Image.fromarray(x).resize((32, 32), Image.Resampling.BOX), np.float32)
            for x in (image, reference)
        )
        assert np.abs(small - other).mean() < 2.5


def test_every_object_fills_a_sensible_share_of_its_frame_and_is_whole():
    masks = np.stack([draw(i).mask for i in range(300)])
    assert masks.dtype == np.float32 and masks.min() == 0 and masks.max() == 1
    share = masks.mean((1, 2))
    assert share.min() > 0.07 and share.max() < 0.45
    border = np.concatenate([masks[:, [0, -1]], masks[:, :, [0, -1]].swapaxes(1, 2)], 1)
    assert border.mean() < 0.01


def test_objects_stand_out_from_the_background():
    for i in range(100):
        drawing = draw(i)
        inside, outside = drawing.mask > 0.9, drawing.mask == 0
        colours = [drawing.image[where].mean(0) for where in (inside, outside)]
        assert np.abs(colours[0] - colours[1]).max() > 25, f"drawing {i}"


def test_a_linear_classifier_tells_the_silhouettes_apart():
    x, labels = _silhouettes("train", 800)
    mean, deviation = x.mean(0), x.std(0) + 1e-3
    x = (x - mean) / deviation
    weights = np.linalg.solve(x.T @ x + 30 * np.eye(x.shape[1]), x.T @ np.eye(10)[labels])
    x, labels = _silhouettes("validation", 200)
    accuracy = ((((x - mean) / deviation) @ weights).argmax(1) == labels).mean()
    assert accuracy > 0.75


def test_wrong_split_and_index_are_errors():
    with pytest.raises(ValueError, match=r"^split: expected .*, got 'test'"):
        EmbeddedSource(10, split="test")
    with pytest.raises(IndexError):
        EmbeddedSource(10)[10]
