"""Reconstruction of data sets and of image files, and what decoding costs."""

import itertools
import json

import numpy as np
from PIL import Image
import pytest

from gigatok_jax import api, cli, distributed, recipes
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import cost, reconstruction
from gigatok_jax.models.generator import GeneratorConfig

import image_folders
import tiny

TOKENIZER = tiny.config(image_size=16, latents=4, channel_multipliers=(1, 1))
DATA = DataConfig(source="embedded", length=64, eval_length=50)


@pytest.fixture(scope="module")
def tokenizer():
    return api.PretrainedTokenizer(TOKENIZER, tiny.weights(TOKENIZER))


class Pixels:
    """An extractor that costs nothing: the first pixels."""

    distance, fingerprint, widths = "fd_teacher", "pixels", {"pool": 6}

    def __call__(self, images):
        return {"pool": images.reshape(len(images), -1)[:, :6].astype(np.float32)}


def test_every_image_counts_once_whatever_the_batch_size(tokenizer, tmp_path):
    found = [
        reconstruction.evaluate(tokenizer, Pixels(), DATA, tmp_path, batch_size=size)
        for size in (16, 25)
    ]
    assert found[0]["images"] == found[1]["images"] == 50
    for name in ("psnr", "ssim", "codebook_usage", "rfd_teacher"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name
    how = found[0]["protocol"]
    assert how == found[1]["protocol"] and how["images"] == 50
    assert how["data"] == "drawings, version 1" and how["lpips"] is None
    counts = np.load(tmp_path / "code_counts.npy")
    assert counts.sum() == 50 * TOKENIZER.latents
    assert np.mean(counts > 0) == found[0]["codebook_usage"]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (8 * 100 + 4, 8 * 100 + 4)  # 32 images over their reconstructions


def test_each_of_two_processes_measures_its_part(tokenizer, tmp_path, monkeypatch):
    grids, counts, images, pixels = [], [], [], []
    monkeypatch.setattr(reconstruction, "_save_grid", lambda path, shown: grids.append(len(shown)))
    for process in range(2):
        monkeypatch.setattr(distributed, "place", lambda process=process: (process, 2))
        found = reconstruction.evaluate(tokenizer, Pixels(), DATA, tmp_path, batch_size=32)
        images.append(found["images"])
        pixels.append(int(found["protocol"]["pixels"], 16))
        counts.append(np.load(tmp_path / "code_counts.npy"))
    assert images == [32, 18]
    assert grids == [32]  # process 0 shows its own images and no others
    monkeypatch.undo()
    whole = reconstruction.evaluate(tokenizer, Pixels(), DATA, tmp_path, batch_size=16)
    assert f"{sum(pixels) % 2**64:016x}" == whole["protocol"]["pixels"]
    np.testing.assert_array_equal(sum(counts), np.load(tmp_path / "code_counts.npy"))


def test_a_folder_gives_the_same_numbers_as_file_by_file(tokenizer, tmp_path):
    folder = tmp_path / "images"
    image_folders.make(folder, {"a": 10, "b": 9})
    image_folders.spoil(folder / "a" / "a_004.png")
    Image.open(folder / "b" / "b_003.png").save(folder / "b" / "b_003.bmp")
    found = reconstruction.reconstruct(tokenizer, folder, tmp_path / "out", batch_size=16)
    data = DataConfig(source="folder", path=str(folder), holdout=0)
    other = reconstruction.evaluate(tokenizer, Pixels(), data, tmp_path / "set", batch_size=16)
    assert found == json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["skipped"] == 1 and found["images"] == other["images"] == 19
    for name in ("psnr", "ssim", "codebook_usage"):
        assert found[name] == pytest.approx(other[name], rel=1e-6), name
    assert np.mean([row["psnr"] for row in found["each"]]) == pytest.approx(found["psnr"])
    names = {f"{row['image']}" for row in found["each"]}
    assert {"b/b_003.png", "b/b_003.bmp"} <= names and "a/a_004.png" not in names
    saved = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")}
    assert {"images/b/b_003.png", "images/b/b_003.bmp.png", "grid.png"} <= saved
    assert len(saved) == 20


def test_one_image_can_be_reconstructed(tokenizer, tmp_path):
    image_folders.save(tmp_path / "a.png", seed=0)
    found = reconstruction.reconstruct(
        tokenizer, tmp_path / "a.png", tmp_path / "out", batch_size=16
    )
    assert [row["image"] for row in found["each"]] == ["a.png"]
    assert (tmp_path / "out" / "images" / "a.png").exists()


def test_nothing_is_written_if_no_image_can_be_read(tokenizer, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_text("text")
    with pytest.raises(UserError, match="images: none of its 1 images can be read"):
        reconstruction.reconstruct(tokenizer, tmp_path / "images", tmp_path / "out", batch_size=16)
    assert not any((tmp_path / "out").iterdir())


def test_images_of_an_earlier_call_are_replaced_and_other_ones_are_not(tokenizer, tmp_path):
    source, out = tmp_path / "photos", tmp_path / "out"
    long = "n" * 251 + ".jpg"
    for name in ("a.jpg", "a.jpg.png", long):
        image_folders.save(source / name, seed=len(name))
    reconstruction.reconstruct(tokenizer, source, out, batch_size=16)
    rows = json.loads((out / "metrics.json").read_text())["each"]
    names = {row["image"]: row["output"] for row in rows}
    assert names["a.jpg"] == "a.jpg.1.png" and names["a.jpg.png"] == "a.jpg.png"
    own = {"reconstruction.json"}
    assert {path.name for path in (out / "images").iterdir()} == own | set(names.values())
    assert len(names) == len(set(names.values())) == 3

    (source / "a.jpg").unlink()
    reconstruction.reconstruct(tokenizer, source, out, batch_size=16)
    assert len(list((out / "images").glob("*.png"))) == 2

    (out / "images" / "mine.png").touch()
    with pytest.raises(UserError, match=r"images: expected the pictures of .*, found mine\.png"):
        reconstruction.reconstruct(tokenizer, source, out, batch_size=16)
    (out / "images" / "mine.png").unlink()
    (out / "images" / "reconstruction.json").unlink()
    with pytest.raises(UserError, match=r"images: expected .*, found a\.jpg\.png"):
        reconstruction.reconstruct(tokenizer, source, out, batch_size=16)
    assert len(list((out / "images").iterdir())) == 2


def test_a_folder_may_have_the_name_that_an_output_would_get(tokenizer, tmp_path):
    for name in ("x/a.jpg", "x/a.jpg.png/b.png"):
        image_folders.save(tmp_path / "photos" / name, seed=len(name))
    reconstruction.reconstruct(tokenizer, tmp_path / "photos", tmp_path / "out", batch_size=16)
    saved = tmp_path / "out" / "images" / "x"
    assert (saved / "a.jpg.1.png").is_file() and (saved / "a.jpg.png" / "b.png").is_file()


def test_an_exact_copy_leaves_the_mean_and_the_file_valid(tokenizer, tmp_path, monkeypatch):
    image_folders.save(tmp_path / "photos" / "a.png", seed=1)
    monkeypatch.setattr(reconstruction.pictures, "to_uint8", lambda images: blank)
    # Not the program that earlier tests have compiled.
    monkeypatch.setattr(reconstruction, "_compare", reconstruction._compare.__wrapped__)
    blank = np.zeros((16, 16, 16, 3), np.uint8)
    Image.fromarray(blank[0]).save(tmp_path / "photos" / "a.png")
    reconstruction.reconstruct(tokenizer, tmp_path / "photos", tmp_path / "out", batch_size=16)
    metrics = json.loads(
        (tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail
    )
    assert metrics["psnr"] == pytest.approx(10 * np.log10(255.0**2 * 16 * 16 * 3), rel=1e-6)


def test_reconstructions_that_are_not_finite_are_rejected(tmp_path):
    weights = tiny.weights(TOKENIZER)
    weights["params"]["cnn_decoder"]["conv_out"]["bias"] = np.full(3, np.nan, np.float32)
    broken = api.PretrainedTokenizer(TOKENIZER, weights)
    image_folders.save(tmp_path / "photos" / "a.png", seed=1)
    with pytest.raises(UserError, match="reconstructions: expected finite values, got NaN"):
        reconstruction.reconstruct(broken, tmp_path / "photos", tmp_path / "out", batch_size=16)
    assert not any((tmp_path / "out").iterdir())


def test_cost_is_a_share_of_the_time(tmp_path, capsys, monkeypatch):
    generator = GeneratorConfig(1, 2, 16, codes=4, codebook_size=64, classes=10)
    monkeypatch.setattr(recipes, "tokenizer_model", {"s_b": TOKENIZER}.get)
    monkeypatch.setattr(recipes, "generator_model", {"b": generator}.get)
    ticks = itertools.accumulate([0, 1] * cost.REPEATS + [0, 3] * cost.REPEATS)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    arguments = ["--decoders=s_b", "--generators=b", "--batch_size=2", f"--out={tmp_path}"]
    assert cli.main(["evaluate", "cost", *arguments]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["shares"]["s_b"]["b"] == 0.25
    assert "decoder / generator" in capsys.readouterr().out
