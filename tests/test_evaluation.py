"""Evaluation of reconstruction and generation, and the search for guidance."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

from gigatok_jax import api, cli, recipes
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import features, generation, reconstruction, sets
from gigatok_jax.evaluation.generation import Draw
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.sampling import SamplingConfig

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
def draw(networks):
    tokenizer = api.load_tokenizer(networks["tokenizer"])
    generator = api.load_generator(networks["generator"])
    return Draw(generator, tokenizer, count=40, batch_size=16)


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


def test_generation_does_not_depend_on_batches(draw, extractor, reference, tmp_path):
    found = [
        generation.evaluate(
            dataclasses.replace(draw, batch_size=size),
            extractor,
            reference,
            SamplingConfig(guidance=2.0),
            tmp_path / str(size),
        )
        for size in (16, 9)
    ]
    assert found[0].keys() == {"images", "guidance", "gfd_teacher", "precision", "recall"}
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5), name
    assert (tmp_path / "16" / "grid.png").exists()
    assert not (tmp_path / "16" / "features").exists()


def test_killed_generation_goes_on(draw, extractor, reference, tmp_path, monkeypatch):
    settings = SamplingConfig()
    whole = generation.evaluate(draw, extractor, reference, settings, tmp_path / "whole")
    monkeypatch.setattr(generation, "CHUNK", 16)
    asked = []

    class Killed(Exception):
        pass

    def mortal(images):
        asked.append(len(images))
        if len(asked) == 2:
            raise Killed
        return extractor(images)

    mortal.distance, mortal.fingerprint = extractor.distance, extractor.fingerprint
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        generation.evaluate(draw, mortal, reference, settings, out)
    resumed = generation.evaluate(draw, mortal, reference, settings, out)
    assert asked == [16, 16, 16, 8]  # the first chunk was kept
    for name, value in whole.items():
        assert resumed[name] == pytest.approx(value, rel=1e-5), name
    with pytest.raises(UserError, match="holds results made with another sampling"):
        generation.evaluate(draw, extractor, reference, SamplingConfig(guidance=3.0), out)


@pytest.mark.parametrize("start, best", [(1.0, 1.0), (1.0, 2.5), (2.0, 1.25), (2.0, 3.75)])
def test_search_walks_down_to_the_least(start, best):
    asked = []

    def measure(scale):
        asked.append(scale)
        return (scale - best) ** 2

    found = generation.search_guidance(measure, start)
    assert min(found, key=found.get) == best
    assert len(asked) == len(set(asked))
    ends = (min(start, best) - 0.25, max(start, best) + 0.25)
    assert set(found) == {s for s in np.arange(ends[0], ends[1] + 0.1, 0.25) if s >= 1}


def test_search_samples_no_setting_twice(draw, extractor, reference, tmp_path, monkeypatch):
    distances = dict(zip((1.5, 1.75, 1.25, 1.0), itertools.count(), strict=False))
    drawn = []

    def evaluate(draw, extractor, reference, settings, out):
        drawn.append(settings.guidance)
        return {"gfd_teacher": distances[settings.guidance], "guidance": settings.guidance}

    monkeypatch.setattr(generation, "evaluate", evaluate)
    best = generation.evaluate_best(
        draw, extractor, reference, SamplingConfig(guidance=1.5), tmp_path
    )
    assert best["guidance"] == 1.5
    assert [row["guidance"] for row in best["search"]] == sorted(drawn) == [1.25, 1.5, 1.75]


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
    arguments = ["--decoders=s_b", "--generators=b", "--batch_size=2", f"--out={tmp_path}"]
    assert cli.main(["evaluate", "cost", *arguments]) == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert 0 < found["shares"]["s_b"]["b"] < 1
    assert "decoder / generator" in capsys.readouterr().out


def test_images_of_an_npz_serve_as_reference(networks, draw, extractor, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "real.npz", arr_0=images)
    reference = sets.reference_of_npz(tmp_path / "real.npz", extractor, 8)
    assert reference.members.shape == (20, 96)
    np.testing.assert_allclose(reference.gaussians["pool"].mean, reference.members.mean(0), 1e-4)
    np.savez(tmp_path / "wrong.npz", arr_0=images.astype(np.float32))
    with pytest.raises(UserError, match=r"wrong\.npz: expected arr_0 to be uint8 \[n, H, W, 3\]"):
        sets.reference_of_npz(tmp_path / "wrong.npz", extractor, 8)
    np.savez(tmp_path / "other.npz", mu=np.zeros(7), sigma=np.eye(7))
    other = sets.reference_of_npz(tmp_path / "other.npz", extractor, 8)
    with pytest.raises(UserError, match=r"other\.npz: features have .* 7 on the other"):
        generation.evaluate(draw, extractor, other, SamplingConfig(), tmp_path / "out")


def test_missing_inception_says_what_to_fetch_and_offers_a_teacher():
    with pytest.raises(UserError, match=r"weights fetch inception_fid.*--features=embedded"):
        features.load("inception")


def test_features_do_not_depend_on_the_batch(extractor):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    apart = np.concatenate([extractor(images[i : i + 1])["pool"] for i in range(5)])
    np.testing.assert_allclose(extractor(images)["pool"], apart, atol=1e-5)
