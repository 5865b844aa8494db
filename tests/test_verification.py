"""`gigatok verify`: a model gives the numbers that were measured before, or that are published."""

import json
import pathlib

import numpy as np
import pytest
import test_commands

from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import verification
from gigatok_jax.models.generator import GeneratorConfig

import tiny

gigatok = test_commands.gigatok

PROBE = pathlib.Path(__file__).parent / "probe_config.py"
DATA = (f"--config={PROBE}", "--config.data.eval_length=30", "--features=embedded")
TOKENIZER = tiny.config(image_size=16, latents=4, channel_multipliers=(1,), semantic_dim=0)
GENERATOR = GeneratorConfig(1, 2, 16, codes=4, codebook_size=64, classes=10)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.save_networks(tmp_path_factory.mktemp("models"), TOKENIZER, GENERATOR)


@pytest.fixture
def verified(gigatok, tmp_path):
    """Output of a `verify` that passes, by metric."""

    def run(*arguments):
        code, out, lines = gigatok("verify", *arguments, f"--out={tmp_path / 'verified'}")
        assert code == 0, lines
        return {line.split()[0]: line.split()[1:] for line in out.splitlines()[:-1]}

    return run


@pytest.fixture
def refused(gigatok, tmp_path):
    """The last line of a `verify` that does not pass."""

    def run(*arguments, code=2):
        found, _, lines = gigatok("verify", *arguments, f"--out={tmp_path / 'verified'}")
        assert found == code, lines
        return lines[-1]

    return run


@pytest.fixture
def measured(gigatok, models, tmp_path):
    """Measures reconstruction, or generation, with these flags; returns the metrics' file."""

    def measure(kind, *flags):
        out = tmp_path / kind
        assert gigatok("evaluate", kind, f"--out={out}", *DATA, *flags)[0] == 0
        return next(out.rglob("metrics.json"))

    return measure


def move(path, name, by):
    metrics = json.loads(path.read_text())
    metrics[name] += by
    path.write_text(json.dumps(metrics))


def test_numbers_of_a_tokenizer_are_found_again(verified, refused, models, measured):
    expected = measured("reconstruction", f"--tokenizer={models['tokenizer']}")
    flags = [models["tokenizer"], f"--expected={expected}", *DATA]
    beside = pathlib.Path(models["tokenizer"]) / "metrics.json"
    beside.write_bytes(expected.read_bytes())
    rows = verified(flags[0], *DATA)
    beside.unlink()
    assert rows["psnr"][0] == rows["psnr"][1] and rows["psnr"][2] == "0.0200"
    assert rows["rfd_teacher"][0] == rows["rfd_teacher"][1]
    move(expected, "psnr", 0.1)
    found = float(rows["psnr"][0])
    message = f"psnr: expected {found + 0.1:.4f} within 0.0200, got {found:.4f}"
    assert message in refused(*flags, code=1)


def test_another_protocol_is_told(refused, models, measured):
    expected = measured("reconstruction", f"--tokenizer={models['tokenizer']}")
    flags = [models["tokenizer"], f"--expected={expected}", *DATA]
    message = refused(*flags, "--config.data.eval_length=20")
    assert "--config.data: expected 30 evaluation images, as in the protocol, got 20" in message
    message = refused(*flags, "--config.data.eval_length=31", code=1)
    assert "protocol: expected the same, got images 31, not 30" in message
    metrics = json.loads(expected.read_text()) | {"lpips": 0.1}
    expected.write_text(json.dumps(metrics))
    assert "lpips: cannot be measured; first: gigatok weights fetch lpips_vgg16" in refused(*flags)


def test_numbers_of_a_generator_are_found_again(verified, refused, models, measured, tmp_path):
    real = tmp_path / "real.npz"
    np.savez(real, arr_0=np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8))
    names = [f"--{kind}={models[kind]}" for kind in ("generator", "tokenizer")]
    expected = measured("generation", *names, "--count=24", "--guidance=2", "--top_k=5")
    flags = [models["generator"], names[1], f"--expected={expected}", *DATA]
    verified(*flags)
    move(expected, "gfd_teacher", 1e6)
    assert "gfd_teacher: expected" in refused(*flags, code=1)
    message = refused(*flags, f"--reference={real}")
    assert "--reference: expected members 30, as in the protocol, got 8" in message


def test_published_figures_have_protocols():
    found = verification.expectations("gigatok_b_l")
    assert found["rfid"] == 0.81
    how = {"measure": "reconstruction", "images": 50_000, "crop": "adm"}
    assert found["protocol"] == how | {"features": {"distance": "fid"}}
    assert verification.expectations("titok_l32")["protocol"]["crop"] == "bicubic"
    assert verification.expectations("ibq_1024")["protocol"]["crop"] == "linear"
    found = verification.expectations("gigatok_gpt_b_xl_xxl")
    assert found["gfid"] == 3.15 and found["protocol"]["sampling"]["guidance"] == 1.75
    assert found["protocol"]["searched"]
    assert not verification.expectations("llamagen_gpt_b")["protocol"]["searched"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("llamagen_vq16_384", "cannot be verified: it is of images that were resized from 384"),
        ("maskgit_vqgan", "its authors do not say how they resized images"),
        ("dinov2_vitb14", "dinov2_vitb14: its figure cannot be verified: none is published"),
        ("nowhere", "'nowhere': no such folder"),
    ],
)
def test_what_cannot_be_verified_is_one_line(name, message):
    with pytest.raises(UserError, match=message):
        verification.expectations(name)


def test_a_generator_needs_the_reference_of_its_figure(refused, models, tmp_path):
    expected = verification.expectations("gigatok_gpt_b_b_l")
    expected["protocol"] |= {"features": {"distance": "fd_teacher"}, "image_size": 16}
    path = tmp_path / "expected.json"
    path.write_text(json.dumps(expected))
    flags = [models["generator"], f"--tokenizer={models['tokenizer']}", f"--expected={path}"]
    message = refused(*flags, *DATA)
    assert "--reference: missing, expected ADM's VIRTUAL_imagenet256_labeled.npz" in message


def test_pixels_that_differ_are_a_warning(caplog):
    def measured(pixels):
        how = {"images": 2, "pixels": pixels, "versions": {"pillow": pixels}}
        return {"psnr": 20.0, "protocol": {"measure": "reconstruction", **how}}

    rows = [verification.Row("psnr", 20.0, 20.01, 0.02)]
    verification.check(measured("a"), measured("b"), rows)
    assert "pixels b, not a; versions then {'pillow': 'a'}, now {'pillow': 'b'}" in caplog.text


@pytest.mark.parametrize("found", [19.97, 20.03, float("nan")])
def test_numbers_outside_of_the_tolerance_fail(found):
    how = {"protocol": {"measure": "reconstruction"}}
    rows = [verification.Row("psnr", 20.0, found, 0.02)]
    message = rf"^psnr: expected 20\.0000 within 0\.0200, got {found:.4f}$"
    with pytest.raises(verification.Deviation, match=message):
        verification.check(how, how, rows)


def test_tolerances_are_relative_where_numbers_are_large():
    assert verification.tolerance("rfid", 0.5) == 0.02
    assert verification.tolerance("gfid", 60.0) == pytest.approx(1.2)
    assert verification.tolerance("inception_score", 4.0) == pytest.approx(0.08)
    assert verification.tolerance("psnr", 40.0) == 0.02
