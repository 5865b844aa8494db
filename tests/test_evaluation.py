"""Evaluation of reconstruction and generation, and the search for guidance."""

import json
import pathlib

import jax
import numpy as np
import pytest

from gigatok_jax import api, bundles, cli, config
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import features, fid, generation
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.sampling import SamplingConfig

import tiny

CONFIG = pathlib.Path(__file__).parent / "train_config.py"
TOKENIZER = tiny.config(image_size=16, latents=4, channel_multipliers=(1, 1))
GENERATOR = GeneratorConfig(1, 2, 16, codes=4, codebook_size=64, classes=10)
DATA = DataConfig(source="embedded", length=64, eval_length=50)


@pytest.fixture(scope="module", autouse=True)
def fast_compilations():
    """Optimizing takes longer than what is run here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
    sizes = {"count": 40, "image_size": 16, "batch_size": 16}
    return fid.load_reference("", DATA, extractor, **sizes)


def test_generation_does_not_depend_on_batches(evaluate, reference, tmp_path):
    settings = SamplingConfig(guidance=2.0)
    found = [
        evaluate(reference, settings, tmp_path / str(size), batch_size=size) for size in (16, 9)
    ]
    assert found[0].pop("protocol") == found[1].pop("protocol")
    assert found[0].keys() == {"images", "guidance", "gfd_teacher", "precision", "recall"}
    for name, value in found[0].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5), name
    assert (tmp_path / "16" / "grid.png").exists()
    assert not (tmp_path / "16" / "features").exists()


def test_killed_generation_resumes(evaluate, extractor, reference, tmp_path, monkeypatch):
    settings = SamplingConfig(guidance=2.0)
    whole = evaluate(reference, settings, tmp_path / "whole")
    how = whole.pop("protocol")
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
    assert resumed["protocol"] == how
    assert how["images"] == 40 and how["seed"] == 0 and how["sampling"]["guidance"] == 2
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
    models = {kind: bundles.load(path, kind).fingerprint for kind, path in networks.items()}
    measured = json.loads((out / "evaluation.json").read_text())
    assert measured == {"measure": "generation", **models}
    out = tmp_path / "reconstruction"
    assert not cli.main(["evaluate", "reconstruction", arguments[0], *data, f"--out={out}"])
    assert json.loads((out / "metrics.json").read_text())["images"] == 20
    measured = json.loads((out / "evaluation.json").read_text())
    assert measured == {"measure": "reconstruction", "tokenizer": models["tokenizer"]}
    assert "rfd_teacher" in capsys.readouterr().out


@pytest.mark.parametrize("measure", ["reconstruction", "generation"])
def test_codes_are_no_images(measure, networks, tmp_path, capsys):
    arguments = [f"--{name}={path}" for name, path in networks.items()]
    run = f"--config={config.CONFIGS / 'generator.py'}:b"
    data = [run, "--config.data.source=codes", f"--config.data.path={tmp_path}"]
    command = ["evaluate", measure, *arguments, *data, "--features=embedded", f"--out={tmp_path}"]
    assert cli.main(command) == 2
    assert "config.data.source: expected images, got 'codes'" in capsys.readouterr().err


def test_too_few_samples_are_refused_before_they_are_drawn(networks, tmp_path, capsys):
    arguments = [f"--{name}={path}" for name, path in networks.items()]
    command = ["evaluate", "generation", *arguments, f"--config={CONFIG}", "--features=embedded"]
    assert cli.main([*command, "--count=3", f"--out={tmp_path / 'out'}"]) == 2
    assert "samples: expected at least 4 images, got 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
