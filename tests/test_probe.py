"""AR probing from beginning to end, interrupted and not, and its report."""

import dataclasses
import itertools
import json
import math
import pathlib
import re
import shutil

import numpy as np
from PIL import Image
from probe_config import CONFIG
import pytest

from gigatok_jax import bundles, cli, pictures
from gigatok_jax.data import codes
from gigatok_jax.data.drawings import EmbeddedSource
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import fid, generation, probing, report
from gigatok_jax.training.checkpoints import Checkpoints

import tiny

TOKENIZER = tiny.config(image_size=16, latents=4, channel_multipliers=(1, 1))


@pytest.fixture(scope="module", autouse=True)
def small_chunks(tmp_path_factory):
    """Chunks of half the samples, and a cache of references of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "CHUNK", 8)
        patch.setenv("GIGATOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    made_by = {"run": {"batch_size": 7, "model": {}}, "step": 3}
    bundles.save(directory, "tokenizer", TOKENIZER, tiny.weights(TOKENIZER), made_by)
    return str(directory)


@pytest.fixture(scope="module")
def whole(tokenizer, tmp_path_factory) -> pathlib.Path:
    """The workdir of an unbroken probe."""
    workdir = tmp_path_factory.mktemp("whole")
    probing.probe(tokenizer, CONFIG, workdir)
    return workdir


def results(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "results.json").read_text())


def lasting(workdir: pathlib.Path) -> dict:
    """All results but times."""
    return {name: value for name, value in results(workdir).items() if not name.endswith("_ms")}


def test_probe_measures_all(whole):
    found = results(whole)
    assert found["encode_ms"] > 0 and found["decode_ms"] > 0
    expected = {"psnr", "ssim", "codebook_usage", "rfd_teacher", "loss", "guidance", "gfd_teacher"}
    assert expected | {"precision", "recall", "linear_accuracy", "parameters"} <= found.keys()
    assert found["gfd_teacher"] == min(row["gfd_teacher"] for row in found["search"])
    images = {name: found[name] for name in found if "images" in name}
    assert images == {"reconstruction_images": 24, "loss_images": 24, "generation_images": 16}
    assert found["loss"] > 0 and 0 <= found["linear_accuracy"] <= 1
    generator = bundles.load(whole / "generator", "generator")
    assert generator.config["codes"] == TOKENIZER.latents
    record = json.loads((whole / "probe.json").read_text())
    assert record["tokenizer"] == record["codes_of"] == generator.made_by["tokenizer"]


class Killed(Exception):
    pass


def dies_after(function, calls: int):
    """`function`, but for the exception that follows its last call."""
    count = itertools.count(1)

    def dying(*args, **kwargs):
        result = function(*args, **kwargs)
        if next(count) == calls:
            raise Killed
        return result

    return dying


def test_probe_killed_in_every_step_resumes_to_the_same_results(
    tokenizer, whole, tmp_path, monkeypatch
):
    for place, name, calls in (
        (fid.Moments, "add", 3),  # in the middle of reconstruction
        (codes, "write_shard", 2),
        (Checkpoints, "save", 1),  # of the generator
        (generation, "held_out_means", 1),
        (generation, "write_npz", 1),
        (fid, "compare", 1),
        (Checkpoints, "save", 2),  # the linear probe's last
        (pictures, "save_png", 3),  # of the samples
        (probing, "component_maps", 1),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, dies_after(getattr(place, name), calls))
            with pytest.raises(Killed):
                probing.probe(tokenizer, CONFIG, tmp_path)
    probing.probe(tokenizer, CONFIG, tmp_path)
    assert lasting(tmp_path) == lasting(whole)


def test_finished_probe_accepts_other_batches_and_workers(tokenizer, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "probe")
    data = dataclasses.replace(CONFIG.data, workers=1, prefetch=3)
    other = dataclasses.replace(CONFIG, data=data, sample_batch_size=4, batch_size=4)
    probing.probe(tokenizer, other, tmp_path / "probe")
    assert results(tmp_path / "probe") == results(whole)


def test_finished_probe_runs_no_step_again(tokenizer, whole, monkeypatch):
    found = results(whole)
    monkeypatch.setattr(probing, "STEPS", dict.fromkeys(probing.STEPS))
    probing.probe(tokenizer, CONFIG, whole)
    assert results(whole) == found


def test_workdir_of_another_probe_is_rejected(tokenizer, whole):
    other = dataclasses.replace(CONFIG, samples=20)
    with pytest.raises(UserError, match=r"made with another config\.samples: 16, not 20"):
        probing.probe(tokenizer, other, whole)


def test_probe_of_other_images_is_rejected(tokenizer, whole, monkeypatch):
    monkeypatch.setattr(EmbeddedSource, "version", lambda self: "redrawn")
    message = "made with another set of training images: .*, not '48 images, version redrawn'"
    with pytest.raises(UserError, match=message):
        probing.probe(tokenizer, CONFIG, whole)


def test_probe_that_cannot_start_leaves_nothing(tokenizer, tmp_path, offline):
    missing = dataclasses.replace(CONFIG, features="inception")
    with pytest.raises(UserError, match="pt_inception-"):
        probing.probe(tokenizer, missing, tmp_path)
    assert not any(tmp_path.iterdir())


def test_probe_rejects_a_reference_before_it_trains(tokenizer, tmp_path):
    np.savez(tmp_path / "real.npz", mu=np.zeros(7), sigma=np.eye(7))
    other = dataclasses.replace(CONFIG, reference=str(tmp_path / "real.npz"))
    with pytest.raises(UserError, match="statistics of the 96 features of fd_teacher, got 7"):
        probing.probe(tokenizer, other, tmp_path / "probe")
    assert not (tmp_path / "probe").exists()


def test_probe_with_a_changed_reference_is_rejected(tokenizer, tmp_path, monkeypatch):
    def die(probe, out):
        raise Killed

    monkeypatch.setattr(probing, "STEPS", {"reconstruction": die})
    file = tmp_path / "real.npz"
    other = dataclasses.replace(CONFIG, reference=str(file))
    np.savez(file, mu=np.zeros(96), sigma=np.eye(96))
    for _ in range(2):  # the second time as the first
        with pytest.raises(Killed):
            probing.probe(tokenizer, other, tmp_path / "probe")
    np.savez(file, mu=np.ones(96), sigma=np.eye(96))
    message = r"made with another config\.reference: 'real.npz \w{16}', not 'real.npz \w{16}'$"
    with pytest.raises(UserError, match=message):
        probing.probe(tokenizer, other, tmp_path / "probe")


def test_report_holds_charts_pictures_and_settings(whole):
    html = (whole / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)  # nothing outside the file
    assert html.count("data:image/svg+xml") == 4 and html.count("data:image/png") == 3
    assert f"{results(whole)['loss']:.4f}" in html
    assert "generator, output of layer 1 of 1, width 16" in html
    assert "linear_probe.steps" in html
    for name, value in (("model.codebook_size", 64), ("run.batch_size", 7), ("step", 3)):
        assert f"<div><span>{name}</span><span>{value}</span></div>" in html


def test_samples_have_their_classes_names_before_them(whole):
    with Image.open(whole / "samples" / "grid.png") as grid:
        margin = grid.width - (probing.PER_CLASS * 100 + 4)
    assert margin > 60  # 40 with numbers alone


def table(*workdirs: pathlib.Path) -> dict[str, dict[str, str]]:
    """First cell to the other cells by heading, of the report's first table."""
    report.write(workdirs, workdirs[0] / "table.html")
    html = (workdirs[0] / "table.html").read_text()
    found = re.search(r"<table>(.*?)</table>", html, re.DOTALL)[1]
    headings, *rows = (
        [
            re.sub("<[^>]*>", "", cell).strip()
            for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)
        ]
        for row in re.findall(r"<tr.*?</tr>", found, re.DOTALL)
    )
    return {row[0]: dict(zip(headings, row, strict=True)) for row in rows}


def with_fid(probe: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A copy of a probe, as if it had measured FID."""
    text = (shutil.copytree(probe, out) / "results.json").read_text()
    text = text.replace('"rfd_teacher"', '"rfid"').replace('"gfd_teacher"', '"gfid"')
    (out / "results.json").write_text(text)
    return out


def test_first_screen_says_what_was_measured(whole):
    report.write([whole], whole / "table.html")
    found = re.sub(r"<[^>]*>", " ", text(whole).split("<body>")[1].split("All numbers")[0])
    seen, numbers = re.sub(r"\s+", " ", found), results(whole)
    assert f"Is the image kept? {numbers['psnr']:.1f} dB PSNR rFD teacher" in seen
    bits = TOKENIZER.latents * math.log2(TOKENIZER.codebook_size)
    loss = TOKENIZER.latents * numbers["loss"] / math.log(2)
    assert f"{loss:,.0f} of {bits:,.0f} bits" in seen
    assert f"{numbers['linear_accuracy']:.1%}" in seen and "A guess would find 10.0%" in seen
    assert "Samples by class" in seen
    assert "(Table" not in text(whole)  # the paper's numbers are FIDs


def test_table_names_the_source_and_setting_of_the_papers_rows(whole, tmp_path):
    whole = with_fid(whole, tmp_path / "probe")
    rows = table(whole)
    assert rows[f"{whole.name} (gigatok)"]["parameters"].endswith(" M")
    settings = {name: (row["generator trained"], row["guidance"]) for name, row in rows.items()}
    assert settings.pop(f"{whole.name} (gigatok)") == (
        "6 steps",
        f"{results(whole)['guidance']:.2f}, constant",
    )
    assert settings["B-L (Table 2)"] == ("50 epochs", "constant")
    assert settings["B-L (Tables 3, 10)"] == ("300 epochs", "step")
    assert settings["LlamaGen-Tok. (Table 10)"] == ("-", "-")
    assert all("(Table" in name for name in settings)
    assert "system-level comparison" in text(whole) and "set ssim_range to 2" in text(whole)


def test_ssim_of_each_range_has_its_own_column(whole, tmp_path):
    ssim = f"{results(whole)['ssim']:.3f}"
    whole = with_fid(whole, tmp_path / "whole")
    other = shutil.copytree(whole, tmp_path / "probe")
    record = json.loads((other / "probe.json").read_text())
    (other / "probe.json").write_text(json.dumps(record | {"config.ssim_range": 2}))
    rows, names = table(whole, other), ("SSIM, range 1", "SSIM, range 2")
    assert [rows[f"{whole.name} (gigatok)"][name] for name in names] == [ssim, "-"]
    assert [rows["probe (gigatok)"][name] for name in names] == ["-", ssim]
    assert [rows["B-L (Tables 3, 10)"][name] for name in names] == ["-", "0.685"]


def text(workdir: pathlib.Path) -> str:
    """The report that `table` has written."""
    return re.sub(r"\s+", " ", (workdir / "table.html").read_text())


def test_times_name_the_hardware_and_do_not_set_probes_apart(whole, tmp_path):
    other = shutil.copytree(whole, tmp_path / "probe")
    found = results(other)
    found["protocol"]["time"] |= {"hardware": "4 x TPU v4", "batch_size": 32}
    found["decode_ms"] = 1_234.567
    (other / "results.json").write_text(json.dumps(found))
    assert table(other)["probe (gigatok)"]["decode, ms"] == "1,234.57"
    note = "milliseconds per image, measured on"
    assert f"{note} 4 x TPU v4, batch 32. </p>" in text(other)
    table(whole, other)
    both = rf"{note} \d+ CPU cores?, batch 8: {whole.name}; 4 x TPU v4, batch 32: probe\. Only"
    assert re.search(both, text(whole))
    assert "Not comparable" not in text(whole)


def test_probe_measures_ssim_of_the_range_asked_for(tokenizer, tmp_path, monkeypatch):
    def evaluate(*args, ssim_range, **kwargs):
        raise InterruptedError(ssim_range)

    monkeypatch.setattr(probing.reconstruction, "evaluate", evaluate)
    with pytest.raises(InterruptedError, match="2"):
        probing.probe(tokenizer, dataclasses.replace(CONFIG, ssim_range=2), tmp_path)


def test_report_compares_probes_side_by_side(whole, tmp_path):
    out = tmp_path / "both.html"
    assert cli.main(["report", str(whole), str(whole), f"--out={out}"]) == 0
    html = out.read_text()
    assert "against the tokenizer" in html and "2 side by side" in html
    assert html.count("data:image/svg+xml") == 2 * 4 + 5


def test_maps_show_equal_features_in_equal_colours():
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((3, 8))
    kind = rng.integers(3, size=(2, 16))
    colours = probing.component_maps(kinds[kind]).reshape(2, 16, 3)
    for k in range(3):
        assert len(np.unique(colours[kind == k], axis=0)) == 1
    assert len(np.unique(colours.reshape(-1, 3), axis=0)) == 3


def test_wrong_field_of_the_config_is_named(tokenizer, tmp_path, capsys):
    config = pathlib.Path(__file__).parents[1] / "configs" / "probe.py"
    arguments = ["probe", f"--config={config}", f"--tokenizer={tokenizer}", "--config.samples=1"]
    assert cli.main([*arguments, f"--workdir={tmp_path}"]) == 2
    assert "config.samples: expected greater than or equal to 2, got 1" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
