"""Tokenizers of other families, and of a user's own, wherever a tokenizer is named."""

import dataclasses
import json
import pathlib
import re
import shutil

import numpy as np
from PIL import Image
import pytest

import gigatok_jax as gt
from gigatok_jax import api, bundles, cli
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import report
from gigatok_jax.models import families
from gigatok_jax.models.titok import TitokConfig
from gigatok_jax.models.tokenizer import TransformerSize
from gigatok_jax.models.vqgan import VqganConfig
from gigatok_jax.training.generator import GeneratorRun
from gigatok_jax.weights import convert, fetch

import tiny

PROBE = pathlib.Path(__file__).parent / "probe_config.py"
CNN = {"base_channels": 4, "residual_blocks": 1, "channel_multipliers": (1, 1, 2)}
SIZES = CNN | {"image_size": 16, "codebook_size": 64}
LLAMAGEN = VqganConfig("llamagen", code_dim=8, z_channels=8, normalize_codes=True, **SIZES)
NARROW = TransformerSize(1, 2, 16)
TITOK = TitokConfig(NARROW, NARROW, latents=8, codebook_size=64, code_dim=4)
# A drawing of 256 pixels takes a fifth of a second.
FEW = {"data.length": 8, "data.eval_length": 4, "samples": 4}
FEW |= {f"{run}.evaluation_images": 4 for run in ("generator", "linear_probe")}
CODES = {"llamagen": 16, "titok": 8, "own": 16}  # test_probe has GigaTok's
OWN = "python:own_tokenizer:Mean"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Names of tokenizers, by family."""
    folder = tmp_path_factory.mktemp("names")
    for name, kind, config in (("llamagen", "vqgan", LLAMAGEN), ("titok", "titok", TITOK)):
        weights = {"params": tiny.fill(families.param_shapes(config))}
        bundles.save(folder / name, kind, config, weights, {})
    return {name: str(folder / name) for name in CODES} | {"own": OWN}


@pytest.fixture(scope="module")
def probes(names, tmp_path_factory):
    """Workdirs of probes, by family."""
    folder = tmp_path_factory.mktemp("probes")
    for family, name in names.items():
        flags = [f"--tokenizer={name}", f"--workdir={folder / family}", f"--config={PROBE}"]
        few = [f"--config.{field}={count}" for field, count in FEW.items()]
        assert cli.main(["probe", *flags, *few * (family == "titok")]) == 0
    return {family: folder / family for family in names}


@pytest.mark.parametrize("family", CODES)
def test_probe_measures_any_tokenizer(names, probes, family):
    results = json.loads((probes[family] / "results.json").read_text())
    assert results.keys() >= {"psnr", "rfd_teacher", "loss", "gfd_teacher", "linear_accuracy"}
    assert results["encode_ms"] > 0 and results["decode_ms"] > 0
    generator = gt.load_generator(probes[family] / "generator")
    tokenizer = gt.load_tokenizer(names[family])
    assert generator.made_by["tokenizer"] == tokenizer.fingerprint
    assert generator.config.codes == tokenizer.config.latents == CODES[family]


def test_report_compares_families_by_bits(probes, tmp_path):
    report.write(list(probes.values()), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    rows = dict(re.findall(r"<span>\((\w+)\)</span></td>\s*<td>(.*?)</td>", html))
    assert rows.keys() == CODES.keys()
    assert rows["own"] == "-" and all(rows[name].endswith(" M") for name in CODES if name != "own")
    assert "Reconstruction against generation" in html
    for workdir in (probes["llamagen"], probes["own"]):
        loss = json.loads((workdir / "results.json").read_text())["loss"]
        bits = 16 * loss / np.log(2)  # of 16 codes
        assert f"<td>{bits:,.0f}</td>" in html and f"<td>{bits / 256:.4f}</td>" in html
    assert "<td>96</td>" in html  # 16 codes of 6 bits


def test_probes_of_another_protocol_stand_apart(probes, tmp_path):
    other = shutil.copytree(probes["own"], tmp_path / "other")
    results = json.loads((other / "results.json").read_text())
    results["protocol"]["generation"]["images"] = 400
    results["protocol"]["generation"]["seed"] = 1  # keeps no numbers apart
    (other / "results.json").write_text(json.dumps(results))
    report.write([probes["llamagen"], probes["own"], other], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    glance, _, all_numbers = html.partition("<h2>All numbers</h2>")
    assert glance.count("of 96 bits") == 2  # those of one protocol
    table, _, rest = all_numbers.partition("</table>")
    above, _, below = table.partition("Not comparable with the first rows.")
    assert "(llamagen)" in above and above.count("(own)") == 1 and below.count("(own)") == 1
    assert "The protocol differs: generation.images 400, not 16</td>" in below
    assert "16 samples\nof seed 0" in rest and "400 samples\nof seed 1" in rest


@pytest.mark.parametrize("family", ["llamagen", "own"])
def test_photos_are_reconstructed(names, tmp_path, family):
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    flags = [f"--tokenizer={names[family]}", f"--images={tmp_path / 'photo.png'}"]
    assert cli.main(["reconstruct", *flags, f"--out={tmp_path / 'out'}"]) == 0
    tokenizer = gt.load_tokenizer(names[family])
    images = np.asarray(tokenizer.decode(tokenizer.encode(photo[None])))
    expected = np.clip(np.round((images[0] + 1) * 127.5), 0, 255)
    found = np.asarray(Image.open(tmp_path / "out" / "images" / "photo.png"), float)
    assert np.abs(found - expected).max() <= 1


def test_own_tokenizer_gives_what_its_functions_do():
    tokenizer = gt.load_tokenizer(OWN)
    white = np.full((2, 16, 16, 3), 255, np.uint8)
    np.testing.assert_array_equal(tokenizer.encode(white), np.full((2, 16), 63))
    np.testing.assert_array_equal(tokenizer.decode(np.full((2, 16), 63)), np.float32(white / 340))
    assert tokenizer.fingerprint == gt.load_tokenizer(OWN).fingerprint
    assert tokenizer.codes_of == tokenizer.fingerprint


@pytest.mark.parametrize(
    "function, message",
    [
        ("fails", r"got RuntimeError: no weights \(own_tokenizer\.py, line \d+\)$"),
        ("nothing", r"got AttributeError: module 'own_tokenizer' has no attribute 'nothing'"),
        ("Without", r"fingerprint, found no encode$"),
        ("", r"python:MODULE:FUNCTION$"),
    ],
)
def test_own_tokenizer_that_cannot_be_made_is_one_line(function, message):
    with pytest.raises(
        UserError, match=rf"^--tokenizer: python:own_tokenizer:{function}: expected.*{message}"
    ):
        api.load_tokenizer(f"python:own_tokenizer:{function}", where="--tokenizer")


def test_faults_of_an_own_tokenizer_are_one_line():
    tokenizer = gt.load_tokenizer("python:own_tokenizer:Faulty")
    images, codes = np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 16), int)
    place = (
        r"python:own_tokenizer:Faulty: encode: MemoryError: full \(own_tokenizer\.py, line \d+\)$"
    )
    with pytest.raises(UserError, match=place):
        tokenizer.encode(images)
    with pytest.raises(UserError, match=r"Faulty: decode: expected finite values, got NaN or inf$"):
        tokenizer.decode(codes)


def test_codes_out_of_range_are_one_line():
    tokenizer = gt.load_tokenizer("python:own_tokenizer:Wrong")
    white = np.full((2, 16, 16, 3), 255, np.uint8)
    expected = (
        r"encode: expected integers \[2, 16\] from 0 to 63, got int64 \[2, 16\] from 64 to 64"
    )
    with pytest.raises(UserError, match=expected):
        tokenizer.encode(white)


def test_own_tokenizer_does_not_encode_while_training():
    run = GeneratorRun(model=tiny.GeneratorConfig(1, 2, 16, codes=16, codebook_size=64, classes=3))
    with pytest.raises(UserError, match=r"^config\.tokenizer: a tokenizer of your own cannot"):
        dataclasses.replace(run, tokenizer=OWN).open_task()


@pytest.mark.parametrize(
    "family, features, expected",
    [("llamagen", "encoder", "generator or latents"), ("own", "latents", "generator")],
)
def test_what_a_later_step_would_reject_ends_a_probe_at_once(
    names, tmp_path, capsys, family, features, expected
):
    flags = [f"--config={PROBE}", f"--tokenizer={names[family]}", f"--workdir={tmp_path / 'p'}"]
    assert cli.main(["probe", *flags, f"--config.linear_probe.features={features}"]) == 2
    message = f"error: config.linear_probe.features: expected {expected} with a tokenizer of the"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p" / "probe.json").exists()


def test_tokenizer_that_a_generator_does_not_fit_is_refused_with_both_numbers(names):
    model = tiny.GeneratorConfig(1, 2, 16, codes=16, codebook_size=32, classes=3)
    with pytest.raises(UserError, match=r"expected codebook_size=32, as in the .*, got 64$"):
        GeneratorRun(model=model, tokenizer=names["llamagen"]).open_task()


GPT = tiny.GeneratorConfig(
    1, 2, 16, codes=16, codebook_size=64, classes=3, positions="rotary_2d", dropout=0.0
)


@pytest.mark.parametrize("wrapper", ["model", None])
def test_published_generator_of_llamagen_brings_its_tokenizer(tmp_path, monkeypatch, wrapper):
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path / "cache"))
    its = {"tokenizer": "its_vq", "class_names": ("ant", "bee", "cat")}
    its["sampling"] = {"guidance": 1.75}
    files = {}
    for name, kind, config, more in (
        ("its_vq", "vqgan", LLAMAGEN, {}),
        ("its_gpt", "generator", GPT, its),
    ):
        rule = dataclasses.replace(convert.KINDS[kind], model=lambda _, config=config: config)
        monkeypatch.setitem(convert.KINDS, kind, rule)
        params = tiny.fill(rule.shapes(config))
        files[name] = convert.to_torch(kind, {"params": params}, config)
        saved = {n: torch.from_numpy(np.array(tensor)) for n, tensor in files[name].items()}
        if kind == "generator":
            saved["freqs_cis"] = torch.zeros(17, 4, 2)
        path = fetch.local_cache_dir() / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({wrapper: saved, "steps": 7} if wrapper else saved, path)
        entry = fetch.Published(kind, "tiny", (fetch.File(f"https://none/{name}.pt"),), **more)
        monkeypatch.setitem(fetch.PUBLISHED, name, entry)

    found = bundles.load("its_gpt", "generator", tiny.GeneratorConfig)
    back = convert.to_torch("generator", found.weights, found.config)
    assert back.keys() == files["its_gpt"].keys()
    assert all(back[name].tobytes() == x.tobytes() for name, x in files["its_gpt"].items())
    assert found.made_by["tokenizer"] == gt.load_tokenizer("its_vq").fingerprint
    if wrapper == "model":
        out = tmp_path / "out"
        command = ["sample", "--generator=its_gpt", "--classes=cat", "--count=2", "--batch_size=2"]
        assert cli.main([*command, f"--out={out}"]) == 0
        record = json.loads((out / "images" / "sampling.json").read_text())
        assert record["tokenizer"] == found.made_by["tokenizer"]
        assert record["sampling"]["guidance"] == 1.75
        assert record["sampling"]["schedule"] == "constant"


def test_titok_is_a_tokenizer(names):
    tokenizer = gt.load_tokenizer(names["titok"])
    codes = tokenizer.encode(np.zeros((1, 256, 256, 3), np.uint8))
    assert codes.shape == (1, 8) and tokenizer.family == "titok"
    assert tokenizer.decode(codes).shape == (1, 256, 256, 3)


def test_what_only_gigatok_has_is_refused(names):
    tokenizer = gt.load_tokenizer(names["llamagen"])
    codes = np.zeros((1, 16), int)
    for call in (
        lambda: tokenizer.decoder_features(codes, layer=1),
        lambda: tokenizer.semantic_features(codes),
        tokenizer.codebook_usage,
    ):
        with pytest.raises(ValueError, match=r"^this tokenizer"):
            call()
    assert tokenizer.latents(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 16, 8)
