"""Metrics of stored images from anywhere: `gigatok evaluate samples` and `gt.compare`."""

import json

import numpy as np
from PIL import Image
import pytest

import gigatok_jax as gt
from gigatok_jax import cli
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import samples
from gigatok_jax.evaluation.fid import describe

import synth


class Table:
    """An extractor that reads the number of a row from the pixels, and looks the features up."""

    distance, fingerprint = "fid", "table"

    def __init__(self, **features):
        self._features = features
        self.widths = {name: rows.shape[1] for name, rows in features.items()}

    def __call__(self, images):
        rows = images[:, 0, 0].astype(int) @ (1, 256, 0)
        return {name: table[rows] for name, table in self._features.items()}


def numbered(first, last):
    """Images of 4 pixels that hold their numbers."""
    images = np.zeros((last - first, 4, 4, 3), np.uint8)
    numbers = np.arange(first, last)
    images[..., 0], images[..., 1] = (n[:, None, None] for n in (numbers % 256, numbers // 256))
    return images


def folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    return path


def npz(path, images):
    np.savez(path, arr_0=images)
    return path


def test_files_and_folders_give_the_numbers_of_the_reference(tmp_path):
    kit = synth.expected("generation_metrics.npz")
    real, made = kit["reference_features"], kit["sample_features"]
    extractor = Table(pool=np.concatenate([real, made]))
    images = numbered(0, len(real)), numbered(len(real), len(real) + len(made))
    for write, ending in ((npz, ".npz"), (folder, "")):
        reference, drawn = (
            write(tmp_path / f"{name}{ending}", part)
            for name, part in zip(("real", "made"), images, strict=True)
        )
        found = samples.evaluate(drawn, str(reference), extractor, batch_size=64)
        assert found.pop("images") == len(made) and found.pop("reference_images") == len(real)
        assert found.pop("remark") == "500 images: published numbers have 50,000"
        how = found.pop("protocol")
        assert (how["images"], how["image_size"], how["crop"]) == (500, 4, "none")
        name, digest = describe(reference).split()
        assert how["reference"] == {"name": name, "digest": digest, "members": len(real)}
        assert how["features"] == {"distance": "fid", "weights": "table"}
        assert found == pytest.approx(
            {
                "gfid": float(kit["frechet_distance"]),
                "precision": float(kit["precision"]),
                "recall": float(kit["recall"]),
            },
            rel=1e-6,
        )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder of real drawings, and one of noise."""
    path = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(0)
    for name in ("real", "made"):
        folder(path / name, rng.integers(0, 256, (6, 20, 20, 3), np.uint8))
    return path


def test_command_and_function_measure_the_same(drawn, tmp_path, capsys):
    flags = [f"--samples={drawn / 'made'}", f"--reference={drawn / 'real'}", "--features=embedded"]
    assert cli.main(["evaluate", "samples", *flags, f"--out={tmp_path / 'out'}"]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    images = np.stack([np.asarray(Image.open(p)) for p in sorted((drawn / "made").iterdir())])
    remark = found.pop("remark")
    again = gt.compare(images, drawn / "real", features="embedded")
    assert again.pop("remark") == remark and again.pop("protocol") == found.pop("protocol")
    assert again == pytest.approx(found)
    assert found["gfd_teacher"] > 0 and found["images"] == 6
    assert remark.startswith("6 images: a covariance of full rank needs more than ")
    assert remark in capsys.readouterr().out


def broken(path):
    (path / "000002.png").write_bytes((path / "000002.png").read_bytes()[:60])


def mixed(path):
    Image.new("RGB", (9, 20)).save(path / "000002.png")


def two(path):
    for image in sorted(path.iterdir())[2:]:
        image.unlink()


def empty(path):
    for image in path.iterdir():
        image.unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (broken, r"000002\.png: "),
        (mixed, r"000002\.png: expected 20x20 pixels, as in 000000\.png, got 20x9$"),
        (two, r"^samples: expected at least 4 images, got 2$"),
        (empty, r"mine: no images$"),
    ],
)
def test_images_that_cannot_be_measured_are_one_line(drawn, tmp_path, damage, message):
    rng = np.random.default_rng(0)
    mine = folder(tmp_path / "mine", rng.integers(0, 256, (6, 20, 20, 3), np.uint8))
    damage(mine)
    with pytest.raises(UserError, match=message) as caught:
        gt.compare(mine, drawn / "real", features="embedded")
    assert "\n" not in str(caught.value)


def test_flags_that_are_missing_are_named(capsys, tmp_path):
    assert cli.main(["evaluate", "samples", "--samples=x", f"--out={tmp_path / 'out'}"]) == 2
    assert "--reference: missing, expected an .npz file or a folder" in capsys.readouterr().err


def test_arrays_of_other_types_are_refused():
    with pytest.raises(UserError, match=r"^images: expected uint8 \[n, H, W, 3\], got float64 "):
        gt.compare(np.zeros((4, 8, 8, 3)), "real", features="embedded")
