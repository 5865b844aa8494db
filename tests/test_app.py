"""The app: what it computes, what it shows, and what it refuses."""

import os
import re
import runpy
import shutil
import socket
import threading
import types

import numpy as np
from PIL import Image
import pytest
import test_families

from gigatok_jax import api, bundles, cli
from gigatok_jax.app import explore, space
from gigatok_jax.errors import UserError
from gigatok_jax.models import families
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.sampling import SamplingConfig

import tiny

TOKENIZER = tiny.config(latents=16)
GENERATOR = GeneratorConfig(depth=1, heads=2, width=16, codes=16, codebook_size=64, classes=3)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    return tiny.save_networks(tmp_path_factory.mktemp("networks"), TOKENIZER, GENERATOR)


@pytest.fixture(scope="module")
def models(names):
    return explore.load([names["tokenizer"]], [names["generator"]])


class Blocks:
    """Sixteen codes of 4x4 pixels each, row by row; a code is a gray value."""

    family = "own"
    config = types.SimpleNamespace(latents=16, codebook_size=256, image_size=16, layout="2d")

    def decode(self, codes):
        gray = np.asarray(codes, np.float32).reshape(-1, 4, 4, 1) / 127.5 - 1
        return gray.repeat(4, 1).repeat(4, 2).repeat(3, 3)


def test_the_effect_of_a_code_is_where_its_pixels_are():
    result = explore.effect(Blocks(), np.full(16, 128), position=6)  # row 1, column 2
    changed = result.picture != result.picture[0, 0]
    assert changed[4:8, 8:12].all() and changed.any(-1).sum() == 16
    assert result.area == pytest.approx(15 / 256)  # 90 % of 16 equal pixels
    other = np.random.default_rng(6).integers(255, size=explore.OTHERS)
    moved = np.abs(np.where(other >= 128, other + 1, other) - 128).mean() / 16
    assert result.change == pytest.approx(moved, rel=0.02)  # decoded values are truncated


@pytest.mark.parametrize(("layout", "columns"), [("2d", 4), ("1d", 16)])
def test_a_code_is_found_where_it_is_drawn(layout, columns):
    tokenizer = Blocks()
    tokenizer.config = types.SimpleNamespace(latents=16, image_size=16, layout=layout)
    picture = explore.CodePicture(tokenizer)
    codes = np.arange(16)
    plain = picture.draw(codes)
    assert picture.columns == columns and plain.shape[1] == columns * picture.cell
    for position in range(16):
        row, column = divmod(position, columns)
        x, y = (int((i + 0.5) * picture.cell) for i in (column, row))
        assert picture.at(x, y) == position
        differing = (picture.draw(codes, position) != plain).any(-1)
        assert picture.at(*np.argwhere(differing).mean(0)[::-1].astype(int)) == position
    assert picture.at(columns * picture.cell, 0) is None
    equal = picture.draw(np.zeros(16, int))
    assert len(np.unique(equal.reshape(-1, 3), axis=0)) == 2  # one color, and white lines


def test_swapped_codes_include_the_last():
    codes, others = np.zeros(8, int), np.arange(8)
    assert explore.swap(codes, others, 2, 4).tolist() == [0, 0, 2, 3, 4, 0, 0, 0]
    with pytest.raises(UserError, match="the first code, 5, comes after the last, 4"):
        explore.swap(codes, others, 5, 4)


FSQ = tiny.config(layout="2d", latents=64, quantizer="fsq", fsq_levels=(4, 4, 4), code_dim=3)
CONFIGS = [TOKENIZER, FSQ, test_families.LLAMAGEN, test_families.TITOK]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_mean_of_the_codebook_replaces_the_last_codes(config):
    weights = {"params": tiny.fill(families.param_shapes(config))}
    tokenizer, n = api.PretrainedTokenizer(config, weights), config.latents
    codes = np.random.default_rng(0).integers(config.codebook_size, size=(2, n))
    other = np.where(np.arange(n) < 3, codes, (codes + 1) % config.codebook_size)
    np.testing.assert_allclose(tokenizer.decode_first(codes, n), tokenizer.decode(codes), atol=1e-6)
    np.testing.assert_array_equal(
        tokenizer.decode_first(codes, 3), tokenizer.decode_first(other, 3)
    )
    assert np.abs(tokenizer.decode_first(codes, 3) - tokenizer.decode(codes)).max() > 1e-3
    with pytest.raises(ValueError, match=rf"keep: expected 0\.\.{n}, got {n + 1}"):
        tokenizer.decode_first(codes, n + 1)


def test_samples_come_in_batches_and_do_not_depend_on_their_number(models):
    (drawer, own) = next(iter(models.generators.values()))
    tokenizer, settings = models.tokenizers[own], SamplingConfig(guidance=2.0)
    draw = [[*images] for images in explore.sample(drawer, tokenizer, 1, settings, count=6, seed=3)]
    assert [len(images) for images in draw] == [4, 6]
    (one,) = explore.sample(drawer, tokenizer, 1, settings, count=1, seed=3)
    np.testing.assert_array_equal(one[0], draw[-1][0])


def test_kept_codes_stay_and_a_generator_draws_the_others(models):
    (drawer, own) = next(iter(models.generators.values()))
    tokenizer, codes = models.tokenizers[own], np.arange(16)
    whole = explore.decode(tokenizer, codes)
    np.testing.assert_array_equal(explore.keep_first(tokenizer, codes, 16, drawer), whole)
    assert (explore.keep_first(tokenizer, codes, 8, drawer) != whole).any()


def test_a_generator_needs_its_tokenizer(names, tmp_path):
    weights = tiny.weights(TOKENIZER)
    weights["params"] = {**weights["params"], "codebook": 2 * weights["params"]["codebook"]}
    bundles.save(tmp_path / "other", "tokenizer", TOKENIZER, weights, {})
    with pytest.raises(UserError, match=r"--generator: .*: expected its tokenizer as --tokenizer"):
        explore.load([str(tmp_path / "other")], [names["generator"]])


def test_reports_outside_of_the_folder_are_not_read(tmp_path):
    root = tmp_path / "runs"
    for place in ("a/probe", ".hidden", "a/b/c/d/e/f"):
        (root / place).mkdir(parents=True)
        (root / place / "report.html").write_text(f"<p>{place}</p>")
    outside = tmp_path / "secret"
    outside.mkdir()
    (outside / "report.html").write_text("secret")
    (root / "link").symlink_to(outside)
    (root / "report-link.html").symlink_to(outside / "report.html")
    assert explore.find_reports(root) == ["a/probe/report.html"]
    assert explore.read_report(root, "a/probe/report.html") == "<p>a/probe</p>"
    for name in ("../secret/report.html", "link/report.html", "/etc/passwd"):
        with pytest.raises(UserError, match="no report of the folder"):
            explore.read_report(root, name)


def test_a_space_has_the_models_and_serves_them(names, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "report.html").write_text("<p>probe</p>")
    flags = [f"--{kind}={name}" for kind, name in names.items()]
    flags += [f"--reports={tmp_path / 'runs'}", f"--space={tmp_path / 'space'}"]
    for _ in range(2):  # the second call replaces the first one's files
        assert cli.main(["app", *flags]) == 0
    written = sorted(
        path.relative_to(tmp_path / "space").as_posix()
        for path in (tmp_path / "space").rglob("*")
        if path.is_file()
    )
    models = [f"models/{kind}/{file}" for kind in ("generator", "tokenizer") for file in MODEL]
    assert written == ["README.md", "app.py", *models, "reports/report.html", "requirements.txt"]
    assert "sdk: gradio" in (tmp_path / "space" / "README.md").read_text()
    requirement = (tmp_path / "space" / "requirements.txt").read_text()
    assert re.fullmatch(r"gigatok_jax\[app\]==[\d.]+\n", requirement)
    server, called = types.ModuleType("server"), []
    server.serve = lambda **options: called.append(options)
    monkeypatch.setitem(__import__("sys").modules, "gigatok_jax.app.server", server)
    monkeypatch.setattr("gigatok_jax.app.server", server, raising=False)
    monkeypatch.chdir(tmp_path / "space")
    runpy.run_path("app.py")
    assert called[0]["tokenizers"] == ["models/tokenizer"]
    assert explore.load(called[0]["tokenizers"], called[0]["generators"]).generators
    (tmp_path / "space" / "app.py").write_text("print()")
    assert cli.main(["app", *flags]) == 2
    assert "app.py is not of this program" in capsys.readouterr().err


MODEL = ("config.json", "model.safetensors")


def test_a_space_names_what_need_not_be_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(explore, "load", lambda *_: explore.Models({"drawings": None}, {}))
    space.write(tmp_path / "space", ["drawings"], [], tmp_path / "no")
    assert "tokenizers=['drawings']" in (tmp_path / "space" / "app.py").read_text()
    assert "gigatok_jax[app]==" in (tmp_path / "space" / "requirements.txt").read_text()
    published = explore.Models({"gigatok_s_s": None}, {})
    monkeypatch.setattr(explore, "load", lambda *_: published)
    space.write(tmp_path / "space", [], ["hf://owner/generator"], tmp_path / "no")
    assert "gigatok_jax[app,torch]==" in (tmp_path / "space" / "requirements.txt").read_text()


def test_a_folder_named_like_an_included_model_is_copied(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(names["tokenizer"], "drawings")
    space.write(tmp_path / "space", ["drawings"], [], tmp_path / "no")
    assert "tokenizers=['models/drawings']" in (tmp_path / "space" / "app.py").read_text()
    assert (tmp_path / "space" / "models" / "drawings" / "config.json").exists()


def test_a_space_cannot_copy_a_users_own_tokenizer(tmp_path):
    with pytest.raises(UserError, match="expected a tokenizer that can be copied"):
        space.write(tmp_path, ["python:mine:Mine"], [], tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def page(models, tmp_path_factory):
    """A client of a served page, its address, and a drawing."""
    pytest.importorskip("gradio")
    from gradio_client import Client

    from gigatok_jax.app import components, server

    folder = tmp_path_factory.mktemp("app")
    reports = folder / "reports"
    reports.mkdir()
    (reports / "report.html").write_text("<p>a probe</p>")
    uploads = folder / "uploads"
    uploads.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(components, "VISIBLE", 32)  # drawings of 256 pixels take a fifth of a second
        blocks = server.build(models, reports, uploads)
        patch.setattr(server, "MAX_UPLOADS", 3 * 2**20)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        address = server.launch(blocks, str(uploads), host="127.0.0.1", port=port)
        pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
        image = folder / "image.png"
        Image.fromarray(pixels).save(image)
        yield types.SimpleNamespace(
            client=Client(address, verbose=False), address=address, image=image, folder=folder
        )
        blocks.close(verbose=False)


def upload(path):
    from gradio_client import handle_file

    return handle_file(str(path))


def test_the_page_reconstructs_shows_codes_swaps_samples_and_completes(page, names):
    client, image = page.client, upload(page.image)
    shown = client.predict(image, [names["tokenizer"]], api_name="/reconstruct")
    assert shown.count("<img") == 3 and "16 codes, PSNR" in shown
    _, changes, text = client.predict(image, names["tokenizer"], 5, api_name="/code")
    assert Image.open(changes).size == (32, 32) and text.startswith("Code 5 is ")
    swapped = client.predict(names["tokenizer"], image, image, 2, 6, api_name="/swap")
    assert "B with codes 2 to 6 of A" in swapped
    for fill in ("the mean of the codebook", "codes that the generator draws"):
        kept = client.predict(names["tokenizer"], image, 4, fill, api_name="/keep")
        assert "the first 4" in kept
    settings = [2.0, "constant", 1.0, 0, 1.0]
    drawn, state = client.predict(
        names["generator"], "class 2", 5, 0, *settings, api_name="/sample"
    )
    assert len(drawn) == 5 and state == "5 of 5 images"
    done = client.predict(names["generator"], image, 8, "(no class)", 1, 1, 0, api_name="/complete")
    assert done.count("<img") == 6 and "The first 8 of 16 codes kept" in done
    assert "a probe" in client.predict("report.html", api_name="/report")


def test_the_page_refuses_in_one_line_and_goes_on(page, names):
    import httpx

    text, large = page.folder / "text.png", page.folder / "large.png"
    text.write_text("no image")
    large.write_bytes(os.urandom(11 * 2**20))
    calls = f"{page.address}gradio_api/call/reconstruct"

    def answer(photo):
        event = httpx.post(calls, json={"data": [photo, [names["tokenizer"]]]}).json()["event_id"]
        return httpx.get(f"{calls}/{event}", timeout=60).text

    def uploaded(file):
        files = {"files": file.open("rb")}
        return httpx.post(f"{page.address}gradio_api/upload", files=files)

    (path,) = uploaded(text).json()
    meta = {"meta": {"_type": "gradio.FileData"}}
    assert "not an image, or in a format unknown to Pillow" in answer({"path": path} | meta)
    for outside in (str(page.image), "../image.png"):
        assert "was not uploaded" in answer({"path": outside} | meta)
        assert "expected an uploaded image, got another path" in answer({"path": outside})
        shown = httpx.get(f"{page.address}gradio_api/file={outside}")
        assert shown.status_code in (403, 404)
    url = "http://127.0.0.1/image.png"
    assert "expected an uploaded image, got an address" in answer({"path": url} | meta)
    refused = uploaded(large)
    assert (refused.status_code, refused.text) == (
        413,
        "expected a file of at most 10 MB, got 11 MB",
    )
    page.folder.joinpath("uploads", "much").write_bytes(bytes(3 * 2**20))
    assert "too many uploads at a time" in uploaded(text).text
    page.folder.joinpath("uploads", "much").unlink()
    bad = page.client.predict
    with pytest.raises(Exception, match="the first code, 7, comes after the last, 2"):
        bad(names["tokenizer"], upload(page.image), upload(page.image), 7, 2, api_name="/swap")
    with pytest.raises(Exception, match="guidance: expected more than 1 with schedule=step"):
        bad(names["generator"], "class 0", 1, 0, 1, "step", 1, 0, 1, api_name="/sample")
    assert "PSNR" in bad(upload(page.image), [names["tokenizer"]], api_name="/reconstruct")


def test_two_visitors_get_their_own_samples(page, names, models):
    from gradio_client import Client

    answers = {}

    def visit(seed):
        settings = [1.0, "constant", 1.0, 0, 1.0]
        client = Client(page.address, verbose=False)
        drawn, _ = client.predict(
            names["generator"], "class 1", 4, seed, *settings, api_name="/sample"
        )
        answers[seed] = [np.asarray(Image.open(each["image"])) for each in drawn]

    visitors = [threading.Thread(target=visit, args=(seed,)) for seed in (1, 2)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    drawer, own = models.generators[names["generator"]]
    tokenizer, settings = models.tokenizers[own], SamplingConfig()
    for seed in (1, 2):
        (drawn,) = explore.sample(drawer, tokenizer, 1, settings, count=4, seed=seed)
        np.testing.assert_array_equal(answers[seed], drawn)
    assert (np.array(answers[1]) != np.array(answers[2])).any()
