"""Reports of training runs, and what they share with reports of probes."""

import base64
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from gigatok_jax import cli
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.evaluation import report
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.training.generator import GeneratorRun
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.task import LoopConfig, RunConfig
from gigatok_jax.training.telemetry import Telemetry
from gigatok_jax.training.tokenizer import ObjectiveConfig, TokenizerRun

import tiny

RUN = TokenizerRun(
    model=tiny.config(),
    objective=ObjectiveConfig(teacher="embedded", perceptual=0.0),
    data=DataConfig(source="embedded", length=8, eval_length=8),
    optimizer=OptimizerConfig(rate=3e-4),
    loop=LoopConfig(log_every=2),
    steps=6,
    batch_size=8,
)
SPEED = {"images_per_second": 40.0, "input_wait": 0.125, "mfu": 0.4, "peak_memory_gb": 9.5}


def train(workdir: pathlib.Path, run: RunConfig = RUN, *, steps: int = 6) -> pathlib.Path:
    """The workdir of a run after `steps` steps."""
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(run)))
    telemetry = Telemetry(workdir, 0)
    for step in range(2, steps + 1, 2):
        row = {"total": 9.0 / step, "l2": 1.0 / step, "learning_rate": 1e-4 * step}
        telemetry.row(step, row | SPEED | {"never": float("nan")})
    for step in (2, steps):
        picture = np.full((8, 8, 3), 10 * step, np.uint8)
        values = {"held_out/psnr": 17.0 + step, "held_out/l2": 0.25}
        telemetry.row(step, values, {"reconstruction": picture})
        if run.task == "generator":
            telemetry.row(step, {"held_out/loss": 2.0})
    telemetry.close()
    return workdir


def html_of(*workdirs: pathlib.Path) -> str:
    out = workdirs[0] / "report.html"
    assert cli.main(["report", *map(str, workdirs)]) == 0
    return out.read_text()


def charts(html: str) -> dict[str, str]:
    """Title to SVG of each chart."""
    found = re.findall(r'data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', html)
    return {title: base64.b64decode(content).decode() for content, title in found}


def text(html: str) -> str:
    """What a reader sees."""
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def test_report_shows_everything_a_run_logged(tmp_path):
    workdir = train(tmp_path / "run")
    html = html_of(workdir)
    assert not re.findall(r'(?:src|href)="(?!data:)', html)  # nothing outside the file
    assert charts(html).keys() == {
        "Total loss",
        "PSNR, dB",
        "L2",
        "Learning rate",
        "Images per second",
        "Time spent waiting for input",
        "Model FLOPs, of the peak",
        "Peak memory of a device, GB",
    }
    both = charts(html)["L2"]
    assert "training" in both and "held out" in both
    seen = text(html)
    assert "PSNR, dB, held out 23 " in seen and "time spent waiting for input 12.5%" in seen
    assert "optimizer.rate 0.0003" in seen and "objective.teacher embedded" in seen
    assert "6, finished" in seen


def test_generator_loss_and_held_out_loss_share_a_chart(tmp_path):
    run = GeneratorRun(
        model=GeneratorConfig(1, 2, 16), optimizer=OptimizerConfig(), tokenizer="tok", steps=6
    )
    html = html_of(train(tmp_path / "run", run))
    loss = charts(html)["Cross-entropy per code, nats"]
    assert "training" in loss and "held out" in loss
    assert html.count('alt="Cross-entropy per code, nats"') == 1
    assert "Generator training: run" in html


def test_report_shows_only_the_newest_picture(tmp_path):
    workdir = train(tmp_path / "run")
    pictures = re.findall(r'data:image/png;base64,([^"]*)"', html_of(workdir))
    newest = workdir / "pictures" / "reconstruction_00000006.png"
    assert [base64.b64decode(picture) for picture in pictures] == [newest.read_bytes()]


def test_report_of_an_unfinished_run(tmp_path):
    workdir = train(tmp_path / "run", steps=4)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tot')  # being written
    assert "run 4 of 6 " in text(html_of(workdir))


def test_report_of_several_runs_overlays_their_curves(tmp_path):
    other = dataclasses.replace(RUN, optimizer=OptimizerConfig(rate=7e-4))
    html = html_of(train(tmp_path / "a" / "run"), train(tmp_path / "b" / "run", other, steps=4))
    assert len(charts(html)) == 8
    for svg in charts(html).values():
        assert all(color in svg for color in report.COLORS[:2])
        assert report.COLORS[2] not in svg
    seen = text(html)
    assert "a/run" in seen and "b/run" in seen
    assert "Settings: optimizer.rate 0.0003 0.0007" in seen
    assert "Settings: steps" not in seen


def test_report_rejects_mixed_kinds_and_runs_without_results(tmp_path, capsys):
    run, probe, fresh = train(tmp_path / "run"), tmp_path / "probe", tmp_path / "fresh"
    for folder, name in ((probe, "probe.json"), (fresh, "config.json")):
        folder.mkdir()
        (folder / name).write_text((run / "config.json").read_text())
    for folders, expected in (
        ((run, probe), f"{probe}: expected a tokenizer training run like {run}, got a probe"),
        ((probe,), f"{probe}: expected a finished probe"),
        ((fresh,), "nothing logged yet; the first row comes at step 2"),
        ((tmp_path,), f"{tmp_path}: expected the workdir of `gigatok probe` or `gigatok train`"),
    ):
        assert cli.main(["report", *map(str, folders)]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1


def test_labels_are_the_shortest_distinct_path_tails(tmp_path):
    def labels(*paths):
        return report.labels([tmp_path / path for path in paths])

    assert labels("x/a/probe") == ["probe"]
    assert labels("a/probe", "b/probe", "b/other") == ["a/probe", "b/probe", "other"]
    assert labels("a/x/probe", "b/x/probe") == ["a/x/probe", "b/x/probe"]
    assert labels("probe", "a/probe") == [f"{tmp_path.name}/probe", "a/probe"]
    assert labels("a", "a") == ["a", "a"]


def test_long_curves_are_averaged():
    rows = [
        {"step": step, "total": float(step % 2)} for step in range(1, 10 * report.MAX_POINTS + 1)
    ]
    steps, values = report.series([*rows, {"step": 9, "total": None}], "total")
    assert len(steps) == len(values) == report.MAX_POINTS
    np.testing.assert_allclose(values[:-1], 0.5)
    assert steps[0] == np.mean(np.arange(1, 11))


@pytest.mark.parametrize("count", [1, 8, 9, 30])
def test_each_run_has_its_own_color(count):
    assert len(set(report.colors(count))) == count
