"""Evaluation of reconstruction and generation, and the search for guidance."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from gigatok_jax import api, cli, files, recipes
from gigatok_jax.data.sources import DataConfig, open_source
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import cost, features, generation, reconstruction, sets
from gigatok_jax.evaluation.sets import FeatureSet
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.sampling import SamplingConfig

import image_folders
import tiny

CONFIG = pathlib.Path(__file__).parent / "train_config.py"
TOKENIZER = tiny.config(image_size=16, latents=4, channel_multipliers=(1, 1))
GENERATOR = GeneratorConfig(1, 2, 16, codes=4, codebook_size=64, classes=10)
DATA = DataConfig(source="embedded", length=64, eval_length=50)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, str]:
    """Bundles of a tokenizer and a generator with random weights."""
    return tiny.save_networks(tmp_path_factory.mktemp("networks"), TOKENIZER, GENERATOR)


@pytest.fixture(scope="module")
def extractor():
    return features.load("embedded")


@pytest.fixture(scope="module")
def evaluate(networks, extractor):
    """`generation.evaluate` of 40 samples."""
    tokenizer = api.load_tokenizer(networks["tokenizer"])
    generator = api.load_generator(networks["generator"])

    def evaluate(reference, settings, out, extractor=extractor, batch_size=16):
        options = {"count": 40, "seed": 0, "batch_size": batch_size}
        models = (generator, tokenizer, extractor)
        return generation.evaluate(*models, reference, settings, out, **options)

    return evaluate


@pytest.fixture
def reference(extractor):
    return sets.reference_of_data(DATA, extractor, image_size=16, batch_size=16, train=False)


def test_reconstruction_measures_every_image_once(networks, extractor, tmp_path):
    tokenizer = api.load_tokenizer(networks["tokenizer"])
    found = [
        reconstruction.evaluate(tokenizer, extractor, DATA, tmp_path, batch_size=size)
        for size in (16, 25)
    ]
    assert found[0]["images"] == found[1]["images"] == 50
    for name in ("psnr", "ssim", "codebook_usage", "rfd_teacher"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4), name
    counts = np.load(tmp_path / "code_counts.npy")
    assert counts.sum() == 50 * TOKENIZER.latents
    assert np.mean(counts > 0) == found[0]["codebook_usage"]
    assert (tmp_path / "grid.png").exists()


def test_reference_is_computed_once(extractor, reference, monkeypatch):
    monkeypatch.setattr(extractor, "_apply", None)
    again = sets.reference_of_data(DATA, extractor, image_size=16, batch_size=16, train=False)
    np.testing.assert_array_equal(again.members, reference.members)
    assert len(reference.members) == 50


def test_a_damaged_cached_reference_is_named(extractor, reference):
    path = files.cache_dir() / "references" / f"{reference.name}.npz"
    path.write_bytes(path.read_bytes()[:2_000])
    with pytest.raises(UserError, match=rf"{path}: not an \.npz file, or a damaged one"):
        sets.reference_of_data(DATA, extractor, image_size=16, batch_size=16, train=False)


def test_generation_does_not_depend_on_batches(evaluate, reference, tmp_path):
    settings = SamplingConfig(guidance=2.0)
    found = [
        evaluate(reference, settings, tmp_path / str(size), batch_size=size) for size in (16, 9)
    ]
    assert found[0].keys() == {"images", "guidance", "gfd_teacher", "precision", "recall"}
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5), name
    assert (tmp_path / "16" / "grid.png").exists()
    assert not (tmp_path / "16" / "features").exists()


def test_killed_generation_resumes(evaluate, extractor, reference, tmp_path, monkeypatch):
    settings = SamplingConfig(guidance=2.0)
    whole = evaluate(reference, settings, tmp_path / "whole")
    monkeypatch.setattr(generation, "CHUNK", 16)
    extracted = []

    class Killed(Exception):
        pass

    def mortal(images):
        extracted.append(len(images))
        if len(extracted) == 2:
            raise Killed
        return extractor(images)

    for name in ("distance", "fingerprint", "widths"):
        setattr(mortal, name, getattr(extractor, name))
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        evaluate(reference, settings, out, mortal)
    resumed = evaluate(reference, settings, out, mortal)
    assert extracted == [16, 16, 16, 8]  # the first chunk was kept
    for name, value in whole.items():
        assert resumed[name] == pytest.approx(value, rel=1e-5), name
    with pytest.raises(UserError, match="holds results made with another sampling"):
        evaluate(reference, SamplingConfig(guidance=3.0), out)


@pytest.mark.parametrize("start, best", [(1.0, 1.0), (1.0, 2.5), (2.0, 1.25), (2.0, 3.75)])
def test_search_finds_the_least_distance(start, best):
    asked = []

    def measure(scale):
        asked.append(scale)
        return (scale - best) ** 2

    found = generation.search_guidance(measure, start)
    assert min(found, key=found.get) == best
    assert len(asked) == len(set(asked))
    ends = (min(start, best) - 0.25, max(start, best) + 0.25)
    assert set(found) == {s for s in np.arange(ends[0], ends[1] + 0.1, 0.25) if s >= 1}


def test_search_samples_each_guidance_once(extractor, tmp_path, monkeypatch):
    distances = {1.5: 0, 1.75: 1, 1.25: 2}
    sampled = []

    def evaluate(generator, tokenizer, extractor, reference, settings, out, **options):
        sampled.append(settings.guidance)
        return {"gfd_teacher": distances[settings.guidance], "guidance": settings.guidance}

    monkeypatch.setattr(generation, "evaluate", evaluate)
    settings = SamplingConfig(guidance=1.5)
    best = generation.evaluate_best(None, None, extractor, None, settings, tmp_path)
    assert best["guidance"] == 1.5 and len(sampled) == 3
    assert [row["guidance"] for row in best["search"]] == sorted(distances)


def test_commands_write_metrics(networks, tmp_path, capsys):
    data = [f"--config={CONFIG}", "--config.data.eval_length=20", "--features=embedded"]
    arguments = [f"--{name}={path}" for name, path in networks.items()]
    out = tmp_path / "generation"
    assert not cli.main(
        ["evaluate", "generation", *arguments, *data, "--count=12", f"--out={out}", "--search"]
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["images"] == 12 and len(metrics["search"]) >= 2
    assert metrics["gfd_teacher"] == min(row["gfd_teacher"] for row in metrics["search"])
    out = tmp_path / "reconstruction"
    assert not cli.main(["evaluate", "reconstruction", arguments[0], *data, f"--out={out}"])
    assert json.loads((out / "metrics.json").read_text())["images"] == 20
    assert "rfd_teacher" in capsys.readouterr().out


def test_cost_is_a_share_of_the_time(tmp_path, capsys, monkeypatch):
    models = {"s_b": TOKENIZER, "b": GENERATOR}
    monkeypatch.setattr(recipes, "tokenizer_model", models.get)
    monkeypatch.setattr(recipes, "generator_model", models.get)
    ticks = itertools.accumulate([0, 1] * cost.REPEATS + [0, 3] * cost.REPEATS)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    arguments = ["--decoders=s_b", "--generators=b", "--batch_size=2", f"--out={tmp_path}"]
    assert cli.main(["evaluate", "cost", *arguments]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["shares"]["s_b"]["b"] == 0.25
    assert "decoder / generator" in capsys.readouterr().out


def test_images_of_an_npz_serve_as_reference(extractor, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=images)
    reference = sets.reference_of_npz(tmp_path / "real.npz", extractor, 8, 16)
    assert reference.members.shape == (20, 96)
    np.testing.assert_allclose(reference.gaussians["pool"].mean, reference.members.mean(0), 1e-4)
    np.savez(tmp_path / "wrong.npz", arr_0=images.astype(np.float32))
    with pytest.raises(UserError, match=r"wrong\.npz: expected arr_0 to be uint8 \[n, H, W, 3\]"):
        sets.reference_of_npz(tmp_path / "wrong.npz", extractor, 8, 16)
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    other, size = str(tmp_path / "other.npz"), {"image_size": 16, "batch_size": 8}
    with pytest.raises(UserError, match=r"other\.npz .*: statistics of 7 features, but .* 96"):
        sets.load_reference(other, None, extractor, count=20, **size)


def test_stored_statistics_go_before_those_of_images_if_they_fit(extractor, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    for width, taken in ((96, True), (2048, False)):
        path = tmp_path / f"{width}.npz"
        np.savez(path, arr_0=images, mu=np.full(width, 7.0), sigma=np.eye(width))
        mean = sets.reference_of_npz(path, extractor, 8, 16).gaussians["pool"].mean
        assert mean.shape == (96,) and (mean[0] == 7) == taken


def test_references_are_told_by_their_content(extractor, tmp_path):
    rng, names = np.random.default_rng(0), []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "real.npz", mu=rng.random(96), sigma=np.eye(96))
        names.append(sets.reference_of_npz(tmp_path / folder / "real.npz", extractor, 8, 16).name)
    assert names[0] != names[1]


def test_a_changed_folder_is_another_reference(extractor, tmp_path):
    data = DataConfig(source="folder", path=str(tmp_path), holdout=0)
    image_folders.make(tmp_path, {"a": 3, "b": 3})

    def reference():
        return sets.reference_of_data(data, extractor, image_size=16, batch_size=4, train=False)

    before = reference()
    assert reference().name == before.name
    path = next((tmp_path / "a").iterdir())
    Image.effect_noise((20, 20), 90).convert("RGB").save(path)
    after = reference()
    assert after.name != before.name
    assert np.abs(after.gaussians["pool"].mean - before.gaussians["pool"].mean).max() > 1e-3


def test_members_of_a_reference_are_of_all_classes(extractor, monkeypatch):
    monkeypatch.setattr(sets, "MEMBERS", 20)  # of 50 drawings, whose 10 classes come in turn
    reference = sets.reference_of_data(DATA, extractor, image_size=16, batch_size=16, train=False)
    source = open_source(DATA, train=False, image_size=16)
    pool = extractor(np.stack([source[i]["image"] for i in range(50)]))["pool"]
    found = [np.abs(pool - member).max(axis=1).argmin() for member in reference.members]
    assert len(set(found)) == 20 and len({index % 10 for index in found}) >= 7


@pytest.mark.parametrize("measure", ["reconstruction", "generation"])
def test_codes_are_no_images(measure, networks, tmp_path, capsys):
    arguments = [f"--{name}={path}" for name, path in networks.items()]
    data = [f"--config={CONFIG}", "--config.data.source=codes", f"--config.data.path={tmp_path}"]
    command = ["evaluate", measure, *arguments, *data, "--features=embedded", f"--out={tmp_path}"]
    assert cli.main(command) == 2
    assert "config.data.source: expected images, got 'codes'" in capsys.readouterr().err


def test_too_few_samples_are_refused_before_they_are_drawn(networks, tmp_path, capsys):
    arguments = [f"--{name}={path}" for name, path in networks.items()]
    command = ["evaluate", "generation", *arguments, f"--config={CONFIG}", "--features=embedded"]
    assert cli.main([*command, "--count=3", f"--out={tmp_path / 'out'}"]) == 2
    assert "samples: expected at least 4 images, got 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_inception_says_what_to_fetch_and_offers_a_teacher():
    with pytest.raises(UserError, match=r"weights fetch inception_fid.*--features=embedded"):
        features.load("inception")


def test_features_do_not_depend_on_the_number_of_devices(extractor, tmp_path):
    script = """if True:
        import sys
        import jax, numpy as np
        from gigatok_jax.evaluation import features
        from gigatok_jax.evaluation.sets import FeatureSet
        assert len(jax.devices()) == 4
        found = FeatureSet(features.load("embedded"), members=True)
        for batch in np.split(np.load(sys.argv[1]), [3, 7]):
            found.add(batch)
        np.savez(sys.argv[2], members=found.members(), mean=found.gaussians()["pool"].mean)
    """
    images = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "images.npy", tmp_path / "out.npz"],
        check=True,
        env=os.environ | devices,
    )
    found = FeatureSet(extractor, members=True)
    found.add(images)
    with np.load(tmp_path / "out.npz") as four:
        np.testing.assert_allclose(four["members"], found.members(), atol=1e-5)
        np.testing.assert_allclose(four["mean"], found.gaussians()["pool"].mean, atol=1e-6)


def test_features_do_not_depend_on_the_batch(extractor):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    apart = np.concatenate([extractor(images[i : i + 1])["pool"] for i in range(5)])
    np.testing.assert_allclose(extractor(images)["pool"], apart, atol=1e-5)
