"""ADM's `.npz` files, whole and damaged."""

import tracemalloc
import zipfile

import numpy as np
import pytest

from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import archives
from gigatok_jax.evaluation.archives import Archive
from gigatok_jax.evaluation.distribution import Gaussian


def test_statistics_come_back(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.npz"
    written = {
        name: Gaussian(rng.random(n), np.cov(rng.random((n, 9)))) for name, n in SIZES.items()
    }
    archives.write_statistics(path, written, {})
    read = Archive(path).gaussians()
    assert read.keys() == written.keys()
    for name in SIZES:
        np.testing.assert_array_equal(read[name].mean, written[name].mean)
        np.testing.assert_array_equal(read[name].covariance, written[name].covariance)


SIZES = {"pool": 5, "spatial": 3}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_parts(save, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)
    save(tmp_path / "a.npz", arr_0=images, arr_1=np.zeros(300))
    archive = Archive(tmp_path / "a.npz")
    assert archive.images == 300
    tracemalloc.start()
    for start, batch in zip(range(0, 300, 7), archive.batches(7), strict=True):
        np.testing.assert_array_equal(batch, images[start : start + 7])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes / 4


def whole(path):
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    np.savez(path, arr_0=images, mu=np.zeros(2), sigma=np.eye(2))
    return path.read_bytes()


def no_extension(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0", b"")


def saved(**arrays):
    return lambda path: np.savez(path, **arrays)


@pytest.mark.parametrize(
    "write, message",
    [
        (saved(images=np.zeros(3)), "expected images as arr_0, or statistics .* found images"),
        (lambda path: path.write_text("text"), r"not an \.npz file"),
        (lambda path: None, "No such file"),
        (lambda path: path.write_bytes(whole(path)[:-100]), "damaged one"),
        (lambda path: path.write_bytes(whole(path).replace(b"NUMPY", b"NUMPI")), "damaged one"),
        (saved(arr_0=np.zeros((2, 4, 4, 3))), r"expected arr_0 to be uint8 .* float64 \[2, 4, 4"),
        (saved(arr_0=np.zeros((2, 4, 4), np.uint8)), r"to be uint8 .* uint8 \[2, 4, 4\]"),
        (saved(mu=np.zeros(3), sigma=np.eye(2)), r"mu \[D\] and sigma \[D, D\], got \[3\] and"),
        (saved(mu=np.array([np.nan]), sigma=np.eye(1)), "mu or sigma is not finite"),
        (saved(mu=np.zeros(1), sigma=np.full((1, 1), np.inf)), "mu or sigma is not finite"),
        (saved(mu=np.zeros(2), sigma=-np.eye(2)), "sigma to be a covariance"),
        (saved(mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0, 1]])), "sigma to be a covariance"),
        (saved(mu=np.zeros(1, complex), sigma=np.eye(1)), "not of real numbers"),
        (saved(arr_0=np.zeros((3, 0, 0, 3), np.uint8)), r"uint8 \[3, 0, 0, 3\]"),
        (no_extension, "expected images as arr_0, .* found nothing"),
    ],
)
def test_files_of_other_things_are_refused(write, message, tmp_path):
    write(tmp_path / "a.npz")
    with pytest.raises(UserError, match=rf"a\.npz: .*{message}"):
        archive = Archive(tmp_path / "a.npz")
        archive.gaussians()
        list(archive.batches(4))


def test_a_flipped_byte_in_images_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    content = bytearray(whole(path))
    content[1_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged one"):
        list(Archive(path).batches(4))
