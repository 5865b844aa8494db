"""What users hit: odd names and pictures, data that changed, full disks, wrong places."""

import errno
import io
import json
import logging
import os
import pathlib
import subprocess
import zlib

import numpy as np
from PIL import Image
import pytest
import test_commands
import test_loop

from gigatok_jax import api, bundles
from gigatok_jax.commands.images import class_numbers
from gigatok_jax.data import crops
from gigatok_jax.data.folders import image_paths, open_folder
from gigatok_jax.data.pipeline import eval_batches
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import RunStopped, UserError
from gigatok_jax.evaluation import features, fid, generation, reconstruction
from gigatok_jax.models.generator import GeneratorConfig, param_shapes
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training import telemetry

import image_folders
import tiny

gigatok, refused = test_commands.gigatok, test_commands.refused

TOKENIZER = tiny.config(image_size=16, latents=4, channel_multipliers=(1, 1))
GENERATOR = GeneratorConfig(1, 2, 16, codes=4, codebook_size=64, classes=6)


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, str]:
    return tiny.save_networks(tmp_path_factory.mktemp("networks"), TOKENIZER, GENERATOR)


# Classes and data.


def test_only_trained_classes_are_drawn():
    made_by = {"data": {"class_names": ["ant", "bee", "cat"]}}
    weights = {"params": tiny.fill(param_shapes(GENERATOR))}
    generator = api.PretrainedGenerator(GENERATOR, weights, made_by=made_by)
    assert (generator.class_count, generator.class_names[2]) == (3, "cat")
    codes = np.zeros((1, 4), np.int32)
    generator.logits(codes, [2])
    generator.logits(codes)  # the null class
    with pytest.raises(ValueError, match=r"^classes: expected 0..2, or 6 for none, got 3$"):
        generator.logits(codes, [3])
    made_by["data"]["untrained"] = [1]  # by a run on some of the images
    generator = api.PretrainedGenerator(GENERATOR, weights, made_by=made_by)
    np.testing.assert_array_equal(generator.trained, [0, 2])
    with pytest.raises(ValueError, match=r"^classes: expected 0, 2, or 6 for none, got 1$"):
        generator.logits(codes, [1])
    with pytest.raises(UserError, match=r"^--classes: expected trained classes, 0, 2, got \[1\]$"):
        class_numbers(["0-2"], generator.trained, ())
    assert class_numbers(["all"], generator.trained, ()) == [0, 2]


def test_a_run_on_changed_data_says_so(tmp_path, caplog, monkeypatch):
    test_loop.run_toy(tmp_path, steps=10)
    monkeypatch.setattr(test_loop.ToyBatches, "version", lambda self: "another")
    with caplog.at_level(logging.WARNING, "gigatok_jax"):
        test_loop.run_toy(tmp_path, steps=20)
    assert "the data have changed since the checkpoint" in caplog.text


def test_fewer_steps_than_the_checkpoint_has_are_rejected(tmp_path):
    test_loop.run_toy(tmp_path, steps=20)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"config\.steps: expected at least 20, .* got 10"):
        test_loop.run_toy(tmp_path, steps=10)
    assert (tmp_path / "config.json").read_text() == before


def test_held_out_examples_are_of_all_classes_and_always_the_same(tmp_path):
    image_folders.make(tmp_path, {f"class{i}": 10 for i in range(4)})
    data = DataConfig(source="folder", path=str(tmp_path), holdout=0)

    def first():
        with eval_batches(data, 16, 12, shuffled=True) as batches:
            return next(batches)

    assert set(first()["label"]) == {0, 1, 2, 3}
    np.testing.assert_array_equal(first()["key"], first()["key"])


# Weights.


def test_changed_bytes_and_values_that_are_not_finite_are_rejected(tmp_path):
    weights = tiny.weights(TOKENIZER)
    bundles.save(tmp_path / "good", "tokenizer", TOKENIZER, weights, {})
    path = tmp_path / "good" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-64:] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(UserError, match="are not those saved"):
        bundles.load(tmp_path / "good", "tokenizer")
    weights["params"]["codebook"] = np.full_like(weights["params"]["codebook"], np.nan)
    bundles.save(tmp_path / "nan", "tokenizer", TOKENIZER, weights, {})
    with pytest.raises(UserError, match="params/codebook: expected finite values, found NaN"):
        bundles.load(tmp_path / "nan", "tokenizer")


def test_large_finite_values_are_no_fault():
    bundles.check_finite({"x": np.array([3e38, 3e38], np.float32)})
    with pytest.raises(ValueError, match=r"^y: expected finite"):
        bundles.check_finite({"y": np.array([np.inf, -np.inf], np.float32)})


# Paths and names.


@pytest.mark.parametrize(
    "arguments, where",
    [
        (["train", "--config=tokenizer:s_s", "--workdir=s3://bucket/run"], "--workdir"),
        (["train", "--config=s3://bucket/x.py:s_s", "--workdir=x"], "--config"),
        (["demo", "--probe=s3://bucket/x.py", "--workdir=x"], "--probe"),
        (["reconstruct", "--tokenizer=http://a/b", "--images=x", "--out=y"], "--tokenizer"),
        (["reconstruct", "--tokenizer=x", "--images=https://a/b", "--out=y"], "--images"),
        (["reconstruct", "--tokenizer=x", "--images=y", "--out=s3://b/x"], "--out"),
        (
            ["train", "--config=tokenizer:s_s", "--workdir=x", "--config.data.path=s3://b"],
            "config.data.path",
        ),
    ],
)
def test_urls_are_rejected_and_make_no_folder(gigatok, tmp_path, monkeypatch, arguments, where):
    monkeypatch.chdir(tmp_path)
    assert refused(gigatok(*arguments)).startswith(f"{where}: expected a local path or gs://")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("cache", "compilations")]


@pytest.mark.parametrize("name", ["GIGATOK_CACHE", "XDG_CACHE_HOME"])
def test_url_of_a_cache_is_rejected(gigatok, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GIGATOK_CACHE")
    monkeypatch.setenv(name, "s3://bucket/cache")
    message = f"{name}: expected a local path or gs://BUCKET/PATH, got 's3://bucket/cache'"
    assert refused(gigatok("weights", "fetch", "lpips_vgg16")) == message
    assert not (tmp_path / "s3:").exists()


@pytest.mark.parametrize("path", ["s3://bucket/x.pt", pathlib.Path("gs://bucket/x.pt")])
def test_url_of_a_checkpoint_is_rejected(path):
    with pytest.raises(
        UserError, match=r"^checkpoint: expected a local path or gs://BUCKET/PATH, got '(s3|gs):/"
    ):
        api.tokenizer_from_torch(path, "b_l")


def test_home_is_expanded(gigatok, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = gigatok("reconstruct", "--tokenizer=~/nothing", "--images=x", "--out=y")
    assert refused(result).startswith(f"--tokenizer: '{tmp_path}/nothing': no such folder")


def test_results_inside_the_images_are_rejected(gigatok, networks, tmp_path):
    image_folders.make(tmp_path, {"ant": 2})
    flags = [f"--tokenizer={networks['tokenizer']}", f"--images={tmp_path}"]
    assert "--out: expected a folder outside" in refused(
        gigatok("reconstruct", *flags, f"--out={tmp_path / 'out'}")
    )
    data = ["--config.data.source=folder", f"--config.data.path={tmp_path}"]
    result = gigatok("train", "--config=tokenizer:s_s", *data, f"--workdir={tmp_path / 'run'}")
    assert "--workdir: expected a folder outside" in refused(result)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["ant"]


def test_results_and_images_that_meet_by_links_or_the_other_way_are_rejected(
    gigatok, networks, tmp_path
):
    root, far, run = tmp_path / "root", tmp_path / "far", tmp_path / "run"
    for path in (far / "1.png", run / "images" / "a" / "1.png", run / "pictures" / "a" / "1.png"):
        image_folders.save(path, seed=1)
    root.mkdir()
    (root / "a").symlink_to(far)
    before = sorted(tmp_path.rglob("*"))

    def refusal(images, out):
        flags = [f"--tokenizer={networks['tokenizer']}", f"--images={images}", f"--out={out}"]
        return refused(gigatok("reconstruct", *flags))

    def training(data, workdir):
        data = ["--config.data.source=folder", f"--config.data.path={data}"]
        return refused(gigatok("train", "--config=tokenizer:s_s", *data, f"--workdir={workdir}"))

    outside = f"expected a folder outside of the images' {far}"
    assert refusal(root, far / "out") == f"--out: {outside}"
    assert training(root, far / "out") == f"--workdir: {outside}"
    for images in (run / "images", run / "images" / "a" / "1.png"):
        assert "--out: expected a folder whose 'images', which is" in refusal(images, run)
    assert "a folder whose 'pictures', which is written" in training(run / "pictures", run)
    (root / "a").unlink()
    (root / "a").symlink_to(run / "pictures")
    assert "a folder whose 'pictures', which is written" in training(root, run)
    made = set(tmp_path.rglob("*")) - set(before)
    assert not [path for path in made if path.relative_to(tmp_path).parts[0] in ("far", "run")]


def test_names_that_are_not_utf8_have_printable_keys(tmp_path):
    image_folders.save(tmp_path / "ant" / "1.png", seed=1)
    os.rename(tmp_path / "ant" / "1.png", os.fsencode(tmp_path / "ant") + b"/Mu\xf1oz.png")
    os.rename(tmp_path / "ant", os.fsencode(tmp_path) + b"/a\xf1o")
    source = open_folder(tmp_path, train=True, holdout=0)
    assert source.class_names == ("a\\xf1o",)
    assert source[0]["key"] == "a\\xf1o/Mu\\xf1oz.png"
    source[0]["key"].encode()  # as msgpack and JSON do


def test_a_dangling_link_is_an_unreadable_image(tmp_path):
    image_folders.make(tmp_path, {"ant": 2})
    (tmp_path / "ant" / "gone.png").symlink_to("/nowhere.png")
    source = open_folder(tmp_path, train=True, holdout=0)
    assert len(source) == 3 and len(source.version()) == 16
    with pytest.raises(crops.BadImage, match="No such file"):
        source[2]


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path / "file" / "cache"))
    data = DataConfig(source="embedded", length=8, eval_length=8)
    options = {"count": 8, "batch_size": 8, "image_size": 16}
    fid.load_reference("", data, features.load("embedded"), **options)
    assert "not kept for the next time" in caplog.text


@pytest.mark.parametrize(
    "folders, message",
    [
        (("Train/ant/1.png", "Val/ant/2.png"), r"has Train/, Val/, expected train/ and val/ or "),
        (("train/ant/1.png", "val/2.png"), r"val: holds no class folders, expected those of "),
        (("train/1.png", "val/ant/2.png"), r"train: holds no class folders, expected those of "),
        (("training/ant/1.png", "validation/ant/2.png"), r"has training/, validation/, expected "),
        (("train/1.png", "valid/2.png"), r"has train/, valid/, expected train/ and val/ or "),
        (("train/ant/1.png", "val/ant/2.png", "validation/ant/3.png"), r"val/, validation/, exp"),
        (("val/ant/1.png",), r"has val/, expected train/ and val/ or .*path=.*/val would hold"),
        (("test/1.png",), r"has test/, expected train/ and val/ or validation/"),
    ],
)
def test_other_layouts_of_splits_say_what_is_expected(tmp_path, folders, message):
    for seed, name in enumerate(folders):
        image_folders.save(tmp_path / name, seed)
    for train in (True, False):
        with pytest.raises(UserError, match=message):
            open_folder(tmp_path, train=train, holdout=20)


def test_splits_of_loose_photos_are_one_class_of_one_name(tmp_path):
    for seed, name in enumerate(("train/1.png", "val/2.png")):
        image_folders.save(tmp_path / "photos" / name, seed)
    found = [open_folder(tmp_path / "photos", train, holdout=20) for train in (True, False)]
    assert [source.class_names for source in found] == [("photos",)] * 2


def test_samples_of_an_earlier_call_do_not_stay(networks, tmp_path):
    generator = api.load_generator(networks["generator"])
    tokenizer = generation.load_matching_tokenizer(networks["tokenizer"], generator)
    options = {"settings": SamplingConfig(), "out": tmp_path, "seed": 0, "batch_size": 4}
    for classes in (np.array([0, 1, 2, 3]), np.array([0, 1])):
        generation.sample(generator, tokenizer, classes, **options)
    names = sorted(path.name for path in (tmp_path / "images").glob("*.png"))
    assert names == ["000000_class0000.png", "000001_class0001.png"]


def test_samples_go_to_no_folder_of_other_pictures(networks, tmp_path):
    generator = api.load_generator(networks["generator"])
    tokenizer = generation.load_matching_tokenizer(networks["tokenizer"], generator)
    options = {"out": tmp_path / "out", "seed": 0, "batch_size": 2}
    image_folders.save(tmp_path / "photos" / "a.png", seed=1)
    reconstruction.reconstruct(tokenizer, tmp_path / "photos", tmp_path / "out", batch_size=1)
    with pytest.raises(UserError, match=r"images: expected the pictures of an earlier call of sa"):
        generation.sample(generator, tokenizer, np.arange(2), SamplingConfig(), **options)
    names = {path.name for path in (tmp_path / "out" / "images").iterdir()}
    assert names == {"a.png", "reconstruction.json"}


def test_pictures_of_many_classes_and_samples_are_an_earlier_calls(tmp_path):
    for name in ("sampling.json", "000003_class12345.png", "1000000_class0001.png", ".DS_Store"):
        (tmp_path / name).touch()
    generation._check_own(tmp_path)
    (tmp_path / "cat.png").touch()
    with pytest.raises(UserError, match=r"earlier call of sample, or an empty folder, found cat"):
        generation._check_own(tmp_path)


def test_damaged_features_are_not_whole(tmp_path):
    file = tmp_path / "features.npz"
    np.savez(file, x=np.arange(100))
    assert generation._is_whole(file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert not generation._is_whole(file)
    file.write_bytes(content[:100])
    assert not generation._is_whole(file) and not generation._is_whole(tmp_path / "none.npz")


def test_guidance_by_a_null_class_that_was_not_trained_is_a_warning(networks, tmp_path, caplog):
    generator = api.load_generator(networks["generator"])
    tokenizer = generation.load_matching_tokenizer(networks["tokenizer"], generator)
    generator.made_by["run"] = {"class_dropout": 0.0}
    options = {"out": tmp_path, "seed": 0, "batch_size": 2}
    generation.sample(generator, tokenizer, np.arange(2), SamplingConfig(guidance=2.0), **options)
    assert "which this generator was not trained on" in caplog.text


def test_an_archive_in_fortran_order_says_what_to_do(tmp_path):
    images = np.zeros((6, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "real.npz", np.asfortranarray(images))
    options = {"count": 6, "batch_size": 6, "image_size": 16}
    with pytest.raises(UserError, match=r"expected arr_0 in C order, got Fortran order: np\.asc"):
        fid.load_reference(str(tmp_path / "real.npz"), None, features.load("embedded"), **options)


# Pictures.


def test_long_texts_and_profiles_of_valid_pictures_are_read():
    picture = Image.fromarray(np.full((8, 8, 3), 90, np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    raw = buffer.getvalue()
    data = b"note\0\0" + zlib.compress(b"a" * 2_000_000)
    chunk = b"zTXt" + data
    piece = len(data).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    at = raw.index(b"IDAT") - 4
    assert np.all(np.asarray(crops.load(raw[:at] + piece + raw[at:])) == 90)


def test_pictures_that_cannot_be_read_are_counted_by_kind(tmp_path, caplog):
    image_folders.save(tmp_path / "1.png", seed=1)
    for name in ("a.cr2", "b.CR2", "c.jxl", "d.jxr", "e.raw", ".hidden.cr2"):
        (tmp_path / name).touch()
    assert [path.name for path in image_paths(tmp_path)] == ["1.png"]
    assert "2 .cr2, 1 .jxl, 1 .jxr, 1 .raw" in caplog.text


KINDS = {"tga": "TGA", "ico": "ICO", "icns": "ICNS", "pcx": "PCX", "dds": "DDS", "sgi": "SGI"}
KINDS |= {"apng": "PNG", "mpo": "MPO", "dib": "DIB", "j2k": "JPEG2000", "jpx": "JPEG2000"}


@pytest.mark.parametrize("suffix", KINDS)
def test_rarer_kinds_of_pictures_are_read(suffix, tmp_path):
    image = Image.new("RGB", (64, 64), (200, 40, 90))
    path = tmp_path / f"1.{suffix}"
    image.save(path, KINDS[suffix])
    assert image_paths(tmp_path) == [path]
    assert np.abs(np.asarray(crops.load(path), int) - (200, 40, 90)).max() <= 3


def test_qoi_is_read(tmp_path):
    header = b"qoif" + (8).to_bytes(4, "big") * 2 + bytes([3, 0])
    data = header + bytes([0xFE, 200, 40, 90, 0xC0 | 61, 0xC0]) + bytes(7) + b"\1"
    (tmp_path / "1.qoi").write_bytes(data)
    (path,) = image_paths(tmp_path)
    np.testing.assert_array_equal(crops.load(path), np.full((8, 8, 3), (200, 40, 90)))


SHAPES = [(1, 900), (2, 901), (5, 300), (7, 1000), (31, 333), (32, 3300), (33, 400), (40, 400)]
SHAPES += [(45, 1300), (63, 640), (64, 700), (67, 999), (130, 5001)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_crop_of_an_elongated_picture_is_that_of_pillows_resize(shape):
    rng = np.random.default_rng(0)
    for height, width in (shape, shape[::-1]):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        halved, size = crops._halve(image, 32)
        assert max(size) > crops.ELONGATED * 32  # only the crop is computed
        top, left = (size[1] - 32) // 2, (size[0] - 32) // 2
        whole = np.asarray(halved.resize(size, Image.Resampling.BICUBIC))
        found = crops.center_crop(image, 32)
        np.testing.assert_array_equal(found, whole[top : top + 32, left : left + 32])


def test_photos_that_are_stored_turned_are_mentioned_once(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("1.jpg", "2.jpg"):
        (tmp_path / "ant").mkdir(exist_ok=True)
        image = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
        image.save(tmp_path / "ant" / name, exif=exif)
    data = DataConfig(source="folder", path=str(tmp_path), holdout=0)
    with eval_batches(data, 16, 1) as batches:
        assert len(list(batches)) == 2
    assert caplog.text.count("EXIF orientation that is ignored") == 1


# Machines that fail.


def test_a_full_disk_ends_a_run_in_one_line_and_it_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def full(self, step, values, pictures=None):
            if step == 10:
                raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

        patch.setattr(telemetry.Telemetry, "row", full)
        message = r"^metrics\.jsonl: the disk is full; last good checkpoint: step 7\. "
        with pytest.raises(RunStopped, match=message):
            test_loop.run_toy(tmp_path)
    assert not (tmp_path / ".lock").exists()
    assert len(test_loop.run_toy(tmp_path)) == 1


def test_a_checkpoint_that_cannot_be_written_ends_a_run_in_one_line(tmp_path, monkeypatch):
    def full(self, step, args, force):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing local file\nand more")

    monkeypatch.setattr(
        test_loop.loop.Checkpoints.__init__.__globals__["ocp"].CheckpointManager, "save", full
    )
    with pytest.raises(
        RunStopped, match=r"cannot be written \(the disk is full\); last good .*: none yet"
    ):
        test_loop.run_toy(tmp_path)


def test_an_evaluation_whose_picture_was_not_written_is_made_again(tmp_path, monkeypatch):
    def evaluate(state, frozen):
        return {"held_out/psnr": 1.0}, {"reconstruction": np.zeros((3, 3, 3), np.uint8)}

    with monkeypatch.context() as patch:

        def full(path, picture):
            raise OSError(errno.ENOSPC, "No space left on device", "x.png")

        patch.setattr(telemetry.png, "save_png", full)
        with pytest.raises(RunStopped, match=r"^x\.png: the disk is full; .* step 20\. "):
            test_loop.run_toy(tmp_path, evaluate=evaluate)
    test_loop.run_toy(tmp_path, evaluate=evaluate)
    assert (tmp_path / "pictures" / "reconstruction_00000020.png").exists()
    assert len([row for row in test_loop.rows(tmp_path) if "held_out/psnr" in row]) == 1


def test_metrics_that_are_not_finite_are_valid_json_and_come_back(tmp_path):
    log = telemetry.Telemetry(tmp_path, 0)
    log.row(1, {"total": float("nan"), "psnr": float("inf")})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "total": "nan",
        "psnr": "inf",
    }
    (row,) = telemetry.read_metrics(tmp_path / "metrics.jsonl")
    assert np.isnan(row["total"]) and row["psnr"] == float("inf")


def test_a_killed_worker_of_the_tests_fails_them(tmp_path):
    for name in ("one", "two"):
        body = "import os\ndef test_it():\n    os.kill(os.getpid(), 9)\n"
        (tmp_path / f"test_{name}.py").write_text(body)
    script = pathlib.Path(__file__).parents[1] / "launch" / "test.sh"
    command = ["bash", script, "-p", "no:cacheprovider", f"--rootdir={tmp_path}", tmp_path]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode not in (0, 2) and "crashed" in found.stdout
