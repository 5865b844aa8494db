"""The models of drawings that the package includes, and the demo that uses them."""

import json

import numpy as np
import pytest

import gigatok_jax as gt
from gigatok_jax import cli, demo, image_metrics, locate, pictures
from gigatok_jax.commands.verbs import as_published
from gigatok_jax.data.drawings import CLASS_NAMES
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import generation
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.weights import fetch
from tools import train_drawings

FOLDERS = [locate.INCLUDED[name][1] for name in (demo.TOKENIZER, demo.GENERATOR)]


@pytest.fixture(scope="module")
def generator():
    return gt.load_generator("drawings_gpt")


@pytest.fixture(scope="module")
def tokenizer(generator):
    return generation.load_matching_tokenizer("", generator)  # refuses another tokenizer


def test_generator_brings_the_tokenizer_of_its_codes(generator, tokenizer):
    assert tokenizer.fingerprint == gt.load_tokenizer("drawings").fingerprint
    assert generator.class_names == CLASS_NAMES


def test_included_tokenizer_reconstructs_drawings(tokenizer):
    images, _ = demo._all(demo._real_drawings(20, tokenizer.config.image_size))
    decoded = pictures.to_uint8(tokenizer.decode(tokenizer.encode(images)))
    assert image_metrics.psnr(images, decoded).mean() > 23
    assert tokenizer.codebook_usage() > 0.8


def test_included_models_are_small_and_name_no_folder_of_a_machine():
    for folder in FOLDERS:
        assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
        made_by = json.loads((folder / "config.json").read_text())["made_by"]
        assert made_by["run"]["data"]["path"] == ""
        assert made_by["run"].get("tokenizer", "drawings") == "drawings"


def test_a_flag_precedes_the_setting_of_a_published_generator(generator):
    published = generator.made_by["sampling"]
    assert published.keys() == {"guidance", "temperature"}

    def settings(**given):
        return as_published(SamplingConfig(**given), {*given}, generator)

    assert settings() == SamplingConfig(**published)
    assert settings(temperature=0.5) == SamplingConfig(**published | {"temperature": 0.5})
    assert settings(guidance=1.5) == SamplingConfig(**published | {"guidance": 1.5})


def test_quick_demo_uses_the_included_models(tmp_path, monkeypatch, capsys):
    for name, value in (("HELD_OUT", 8), ("QUICK_PER_CLASS", 3), ("REAL", 200)):
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "BATCH_SIZE", 10)
    assert cli.main(["demo", "--quick", f"--workdir={tmp_path}"]) == 0
    printed = capsys.readouterr().out.splitlines()
    grids = [tmp_path / name / "grid.png" for name in ("reconstructions", "samples")]
    for grid in (*grids, tmp_path / "completions.png"):
        assert str(grid) in printed and pictures.read(grid).ndim == 3
    (share,) = (float(line.split()[-4].strip("%")) for line in printed if "intended class" in line)
    assert share > 60
    assert not (tmp_path / "tokenizer").exists() and not (tmp_path / "probe").exists()


@pytest.mark.parametrize("flag", ["--tokenizer.batch_size=9", "--probe.samples=9"])
def test_quick_demo_refuses_settings_of_training(tmp_path, capsys, flag):
    assert cli.main(["demo", "--quick", f"--workdir={tmp_path / 'out'}", flag]) == 2
    name = flag.partition(".")[0]
    line = f"gigatok: error: {name}: --quick trains nothing, so expected no settings\n"
    assert capsys.readouterr().err.endswith(line)
    assert not (tmp_path / "out").exists()


def test_list_of_weights_has_the_included_models(capsys, monkeypatch):
    monkeypatch.setattr(fetch, "PUBLISHED", {})  # counting their parameters takes seconds
    assert cli.main(["weights", "list"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    included = {row[0]: row[1] for row in rows if row[-1] == "included"}
    kinds = {"embedded": "dinov2", "drawings": "tokenizer", "drawings_gpt": "generator"}
    assert included == kinds
    assert cli.main(["weights", "fetch", "drawings"]) == 0
    assert capsys.readouterr().out == f"{FOLDERS[0]}\n"


def test_kind_of_an_included_model_is_checked():
    with pytest.raises(UserError, match=r"^drawings_gpt: holds a generator, expected a tokenizer"):
        gt.load_tokenizer("drawings_gpt")


def test_models_are_included_with_16_bits_and_without_paths(tmp_path, monkeypatch):
    monkeypatch.setitem(locate.INCLUDED, "drawings", ("tokenizer", tmp_path / "drawings"))
    train_drawings.include("drawings", FOLDERS[0], published_tokenizer="x")
    loaded = gt.load_tokenizer("drawings")
    assert loaded.made_by["published_tokenizer"] == "x"
    assert (tmp_path / "drawings" / "model.safetensors").stat().st_size == (
        FOLDERS[0] / "model.safetensors"
    ).stat().st_size
    assert np.isfinite(loaded.decode(np.zeros((1, loaded.config.latents), int))).all()
