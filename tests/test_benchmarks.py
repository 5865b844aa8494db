"""Benchmarks: their cases run and are counted, their files compare, and PyTorch agrees."""

import dataclasses
import importlib.util
import json
import sys

import matplotlib
import numpy as np
from PIL import Image
import pytest

from benchmarks import cases, compare, dilemma, host, leaderboard, probes, run
from gigatok_jax import cli, recipes
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import report
from gigatok_jax.models.generator import GeneratorConfig

import tiny

TOKENIZER = tiny.config(codebook_size=128, semantic_dim=16)
GENERATOR = GeneratorConfig(2, 2, 16, codes=8, codebook_size=64, classes=10)
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the yardstick is written in it"
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Models of seconds, under the names of large ones."""
    monkeypatch.setattr(recipes, "tokenizer_model", lambda name: TOKENIZER)
    monkeypatch.setattr(recipes, "generator_model", lambda name: GENERATOR)
    monkeypatch.setattr(run, "_product_rate", lambda dtype: 1e12)
    monkeypatch.setattr(run, "_copy_rate", lambda: 1e10)


def main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    run.main()


def test_a_run_writes_what_it_measures_and_keeps_what_was_there(monkeypatch, tmp_path):
    out = tmp_path / "report.json"
    flags = [f"--out={out}", "--repeats=2", "--no-yardstick"]
    main(monkeypatch, "encode:s_s:2", *flags)
    main(monkeypatch, "sample_guided:b:2", "code_search:s_s:1", *flags)
    results = json.loads(out.read_text())["results"]
    assert list(results) == ["encode:s_s:2", "sample_guided:b:2", "code_search:s_s:1"]
    for name, result in results.items():
        assert result["least"] <= result["seconds"] <= result["most"], name
        assert result["images_per_second"] > 0 and result["flops"] > 0, name
        assert result["limit_seconds"] > 0 and result["limit"] in ("FLOPs", "bytes"), name
    table = compare.table(*(json.loads(out.read_text()) for _ in range(2)))
    assert len(table) == 3 + len(results) and table[3].startswith("encode:s_s:2")
    assert "1.00" in table[3]


def test_training_step_of_an_installed_configuration_runs():
    assert np.isfinite(cases.generator_step("tiny", 1).call()["total"])


@needs_torch
@pytest.mark.parametrize(
    "prepare, arguments",
    [
        (cases.encode, {}),
        (cases.decode, {}),
        (cases.sample, {"guidance": 2.0}),
    ],
)
def test_the_yardstick_computes_what_is_ours(prepare, arguments):
    case = prepare("any", 2, **arguments)
    yardstick = run.Yardstick(case.rival)  # raises where results differ
    assert yardstick.seconds() > 0
    yardstick.close()


@needs_torch
def test_a_yardstick_that_computes_something_else_is_an_error():
    case = cases.decode("any", 1)
    ours = np.asarray(case.rival.expected())
    case.rival.expected = lambda: ours + 1
    with pytest.raises(RuntimeError, match="decode: the yardstick computes something else"):
        run.Yardstick(case.rival)


def test_augmentation_is_timed_beside_plain_pillow():
    case = host.augmentation("linear", 2)
    assert case.images >= 2 and case.limit > 0
    case.call()
    case.rival()


@pytest.mark.parametrize(
    "name, message",
    [
        ("flying", "'flying': no such benchmark; known: encode"),
        ("encode:s_s:none", "expected NAME"),
        ("encode:s_s:0", "expected NAME"),
        ("encode:s_s:1:2", "expected NAME"),
    ],
)
def test_unknown_benchmarks_are_refused(monkeypatch, capsys, tmp_path, name, message):
    with pytest.raises(SystemExit):
        main(monkeypatch, name, f"--out={tmp_path / 'x.json'}")
    assert message in capsys.readouterr().err


def test_a_report_of_another_machine_is_not_mixed_in(monkeypatch, capsys, tmp_path):
    out = tmp_path / "x.json"
    out.write_text(json.dumps({"machine": {"device": "abacus"}, "results": {}}))
    with pytest.raises(SystemExit):
        main(monkeypatch, "encode", f"--out={out}")
    assert "is of abacus" in capsys.readouterr().err


def test_finished_probes_are_skipped_and_failed_ones_named(tmp_path, capsys):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "results.json").touch()
    with pytest.raises(RuntimeError, match=r"done: expected results of this program, found others"):
        probes.measure(tmp_path, [("done", (), ())])
    (tmp_path / "done" / "flags.json").write_text('{"train": ["--a"], "probe": []}')
    with pytest.raises(UserError, match=r"another train: \['--a'\], not \[\]"):
        probes.measure(tmp_path, [("done", (), ())])
    (tmp_path / "done" / "flags.json").write_text('{"train": [], "probe": []}')
    assert probes.measure(tmp_path, [("done", (), ())]) == [tmp_path / "done"]
    with pytest.raises(RuntimeError, match=r"^broken: train ended with status 2, see .*broken.log"):
        probes.measure(tmp_path, [("done", (), ()), ("broken", (), ())])
    assert "--config: missing" in (tmp_path / "broken.log").read_text()
    assert not capsys.readouterr().out


def test_leaderboard_trains_and_probes_each_quantizer(tmp_path, monkeypatch):
    def measure(workdir, runs):
        for name, train, probe in runs:
            for file, *flags in (train, probe):
                assert cli.main(["config", "show", file.removeprefix("--config="), *flags]) == 0
            assert f"--config.model.quantizer={name}" in train
        return [workdir / name for name, _, _ in runs]

    monkeypatch.setattr(probes, "measure", measure)
    monkeypatch.setattr(leaderboard.report, "write", lambda folders, path: found.extend(folders))
    found = []
    leaderboard.main([f"--workdir={tmp_path}"])
    assert found == [tmp_path / name for name in leaderboard.QUANTIZERS]


def test_leaderboard_keeps_the_settings_of_its_published_table():
    run, probe = leaderboard.get_config("tokenizer"), leaderboard.get_config("probe")
    model, generator = run.model, probe.generator
    assert (model.image_size, model.latents, model.codebook_size) == (32, 64, 1024)
    assert (model.channels, model.z_channels, model.decoder.width) == ((16, 16, 32), 32, 64)
    assert (run.steps, run.batch_size, run.optimizer.rate, run.data.length) == (
        800,
        8,
        2e-3,
        20_000,
    )
    assert (generator.model.depth, generator.model.width, generator.model.adaln) == (
        4,
        128,
        "block",
    )
    assert (generator.steps, generator.batch_size, generator.optimizer.rate) == (600, 16, 2e-3)
    assert (probe.data.length, probe.linear_probe.steps, probe.samples) == (6_000, 200, 400)
    assert (probe.sampling.guidance, probe.sampling.temperature) == (3.0, 0.8)


def test_dilemma_scales_only_the_transformers():
    small, large = (dilemma.get_config(f"tokenizer,{size},semantic,1") for size in ("S", "L"))
    assert small.model.decoder.width < large.model.decoder.width
    same = {"encoder": large.model.encoder, "decoder": large.model.decoder}
    assert dataclasses.replace(small.model, **same) == large.model
    assert dilemma.get_config("tokenizer,S,vanilla,2").objective.semantic == 0
    assert dilemma.get_config("probe,2").generator.seed == 2


def test_dilemma_shows_means_and_seeds(tmp_path):
    results = {
        f"{size} {arm}": [
            {"parameters": 1e5 * (1 + i)} | {name: seed + i + 5 * j for name in dilemma.METRICS}
            for seed in dilemma.SEEDS
        ]
        for i, size in enumerate(dilemma.SIZES)
        for j, arm in enumerate(dilemma.ARMS)
    }
    lines = dilemma.table(results)
    assert lines[2].startswith("| S vanilla | 0.10 | 1.000 (0.000, 1.000, 2.000) |")
    dilemma.plot(results, tmp_path / "dilemma.png")
    pixels = np.asarray(Image.open(tmp_path / "dilemma.png").convert("RGB"))
    lines = (matplotlib.colors.to_rgb(color) for color in report.colors(2))
    for color in lines:  # of both arms
        assert (np.abs(pixels / 255 - color).max(-1) < 0.02).sum() > 100
