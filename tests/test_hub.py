"""The Hugging Face Hub: what is pushed is loaded, and one line for whatever the Hub refuses."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

from huggingface_hub import constants
import jax
import numpy as np
import pytest
import test_commands

from gigatok_jax import api, bundles, locate
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import generation
from gigatok_jax.models import generator
from gigatok_jax.weights import convert, fetch, hub, torch_files

import image_folders
import stub_hub
import tiny

gigatok, refused = test_commands.gigatok, test_commands.refused

CONFIG = tiny.config()
REPO = "me/tokenizer"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A Hub, where `huggingface_hub` in this process looks for it."""
    with stub_hub.serve() as running:
        # What HF_ENDPOINT, HF_HOME and HF_HUB_DISABLE_XET set when the library is imported.
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", running.token)
        monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield running


@pytest.fixture
def bundle(tmp_path):
    directory = tmp_path / "bundle"
    bundles.save(directory, "tokenizer", CONFIG, tiny.weights(CONFIG), {})
    return directory


def assert_same(found: bundles.Bundle, expected: bundles.Bundle) -> None:
    assert (found.config, found.made_by) == (expected.config, expected.made_by)
    jax.tree.map(
        lambda *arrays: np.testing.assert_array_equal(*arrays, strict=True),
        found.weights,
        expected.weights,
    )


def load(name) -> bundles.Bundle:
    return bundles.load(name, "tokenizer", tiny.TokenizerConfig)


LOAD = """
import sys

import gigatok_jax as gt

print(*(gt.load_tokenizer(name).fingerprint for name in sys.argv[1:]))
"""


def test_what_is_pushed_is_loaded_from_a_mirror_then_offline(server, bundle, tmp_path, gigatok):
    code, out, _ = gigatok("push", bundle, f"hf://{REPO}")
    first = out.strip()
    assert code == 0 and first == f"hf://{REPO}@{server.commits[REPO][-1][0]}"
    pushed = server.commits[REPO][-1][1]
    for file in ("config.json", "model.safetensors"):
        assert pushed[file] == (bundle / file).read_bytes()
    assert_same(load(f"hf://{REPO}"), load(bundle))

    old, weights = load(bundle).fingerprint, tiny.weights(CONFIG)
    weights["params"]["codebook"] += 1
    bundles.save(bundle, "tokenizer", CONFIG, weights, {})
    assert gigatok("push", bundle, f"hf://{REPO}")[0] == 0
    new = load(bundle).fingerprint
    (tmp_path / "torch.py").write_text("raise ImportError")
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{pathlib.Path(__file__).parents[1]}",
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", LOAD, f"hf://{REPO}", first]
    server.requests.clear()
    for offline in ("0", "1"):
        result = subprocess.run(
            command,
            env=environment | {"HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
        )
        assert result.stdout.split() == [new, old], result.stderr
        assert bool(server.requests) == (offline == "0")
        server.requests.clear()


def test_sharded_bundle_comes_back_and_one_file_replaces_it(server, bundle, tmp_path, gigatok):
    sharded = tmp_path / "sharded"
    bundles.save(
        sharded, "tokenizer", CONFIG, tiny.weights(CONFIG), {"by": "me"}, file_bytes=99_999
    )
    assert len(list(sharded.iterdir())) > 4
    address = f"hf://{REPO}/large"
    assert gigatok("push", sharded, address)[0] == 0
    assert_same(load(address), load(sharded))
    assert gigatok("push", bundle, address)[0] == 0
    files = {"config.json", "model.safetensors", "README.md"}
    assert server.commits[REPO][-1][1].keys() == {".gitattributes", *(f"large/{f}" for f in files)}
    assert_same(load(address), load(bundle))


def test_only_the_config_is_downloaded_for_an_architecture(server, bundle, gigatok):
    assert gigatok("push", bundle, f"hf://{REPO}")[0] == 0
    server.requests.clear()
    config = bundles.load_config(f"hf://{REPO}", "tokenizer", tiny.TokenizerConfig)
    assert config == CONFIG
    assert {path for _, path in server.requests} == {f"/{REPO}/resolve/main/config.json"}


def test_architecture_of_a_conversion_is_that_of_an_address(server, bundle, tmp_path, gigatok):
    assert gigatok("push", bundle, f"hf://{REPO}")[0] == 0
    file, out = tmp_path / "file.safetensors", tmp_path / "out"
    torch_files.write(file, convert.to_torch("tokenizer", tiny.weights(CONFIG), CONFIG))
    command = ["convert", "tokenizer", f"--from={file}", f"--model=hf://{REPO}", f"--out={out}"]
    assert gigatok(*command)[0] == 0
    assert load(out).fingerprint == load(bundle).fingerprint


def test_card_has_what_was_measured_and_nothing_else(server, bundle, tmp_path, gigatok):
    metrics = tmp_path / "probe" / "results.json"
    metrics.parent.mkdir()
    metrics.write_text('{"psnr": 20.5, "lpips": "nan", "images": 50000, "sampled": true}')
    options = [f"--metrics={metrics}", "--license=apache-2.0"]
    assert gigatok("push", bundle, f"hf://{REPO}", *options)[0] == 0
    card = server.commits[REPO][-1][1]["README.md"].decode()
    front = card.split("---")[1]
    for line in ("library_name: gigatok_jax", "license: apache-2.0", "- tokenizer", "- psnr"):
        assert f"{line}\n" in front
    assert "| psnr | 20.5 | of reconstructions, dB |" in card and "| images | 50,000 |" in card
    assert f'gt.load_tokenizer("hf://{REPO}")' in card
    assert "lpips" not in card and "sampled" not in card
    assert gigatok("push", bundle, f"hf://{REPO}")[0] == 0
    card = server.commits[REPO][-1][1]["README.md"].decode()
    assert "license" not in card and "metric" not in card


def test_card_of_a_run_has_its_last_evaluation(server, bundle, gigatok):
    run = bundle.with_name("run")
    run.mkdir()
    bundle.rename(run / "bundle")
    rows = [{"step": 5, "held_out/psnr": 9.5}, {"step": 9, "held_out/psnr": 20.5}]
    rows.append({"step": 10, "total": 1.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert gigatok("push", run, f"hf://{REPO}")[0] == 0
    card = server.commits[REPO][-1][1]["README.md"].decode()
    assert "step 9\n" in card and "| psnr | 20.5 | of reconstructions, dB |" in card


def test_metrics_of_another_model_are_refused(server, bundle, tmp_path, gigatok):
    metrics = tmp_path / "results.json"
    metrics.write_text('{"psnr": 20.5}')
    ours = load(bundle).fingerprint
    for record, named in (
        ("probe.json", {"tokenizer": "0123456789abcdef"}),
        ("probe.json", {"tokenizer": "0123456789abcdef", "codes_of": ours}),  # another decoder
        ("evaluation.json", {"measure": "reconstruction", "tokenizer": "0123456789abcdef"}),
        ("evaluation.json", {"measure": "cost"}),
    ):
        (tmp_path / record).write_text(json.dumps(named))
        message = refused(gigatok("push", bundle, f"hf://{REPO}", f"--metrics={metrics}"))
        text = f"expected metrics of this model, but {record} beside it does not name it"
        assert message == f"{metrics}: {text}"
        (tmp_path / record).unlink()
    assert REPO not in server.commits


def test_generator_has_the_metrics_of_the_probe_of_a_tuned_decoder(server, tmp_path, gigatok):
    made_by = {"tokenizer": "1111111111111111"}
    params = {"params": tiny.fill(MODEL_SHAPES)}
    bundles.save(tmp_path / "generator" / "bundle", "generator", MODEL, params, made_by)
    (tmp_path / "results.json").write_text('{"loss": 2.5}')
    record = {"tokenizer": "2222222222222222"}
    (tmp_path / "probe.json").write_text(json.dumps(record))
    message = refused(gigatok("push", tmp_path / "generator", f"hf://{REPO}"))
    assert message.endswith("but probe.json beside it does not name its tokenizer")
    (tmp_path / "probe.json").write_text(json.dumps(record | {"codes_of": "1111111111111111"}))
    assert gigatok("push", tmp_path / "generator", f"hf://{REPO}")[0] == 0
    assert "| loss | 2.5 |" in server.commits[REPO][-1][1]["README.md"].decode()


def test_new_repository_is_private_if_asked(server, bundle, gigatok):
    assert gigatok("push", bundle, f"hf://{REPO}", "--private")[0] == 0
    assert server.private == {REPO}
    server.private.clear()
    message = refused(gigatok("push", bundle, f"hf://{REPO}", "--private"))
    assert message == f"hf://{REPO}: --private: expected a private repository, this one is public"


@pytest.mark.parametrize(
    "theirs, message",
    [
        ({"config.json": b'{"model_type": "vit"}'}, "no model or a bundle to replace"),
        ({"model.safetensors": b"x"}, "no model or a bundle to replace, found model.safetensors"),
        ({"README.md": b"---\nlicense: mit\n---\nMine."}, "expected no README.md, or one of an"),
    ],
)
def test_files_of_others_are_not_replaced(server, bundle, gigatok, theirs, message):
    server.commits[REPO] = []
    server.commit(REPO, theirs)
    assert message in refused(gigatok("push", bundle, f"hf://{REPO}"))
    server.commit(REPO, {"notes.txt": b"mine"})
    assert gigatok("push", bundle, f"hf://{REPO}")[0] == 0
    assert server.commits[REPO][-1][1]["notes.txt"] == b"mine"


def test_damaged_bundle_is_not_pushed(server, bundle, gigatok):
    (bundle / "model.safetensors").write_bytes(b"x")
    assert "unreadable weights" in refused(gigatok("push", bundle, f"hf://{REPO}"))
    assert not server.commits


REFUSALS = {
    "unknown repository": (f"hf://{REPO}x", f"hf://{REPO}x: no such repository on http://127"),
    "unknown revision": (f"hf://{REPO}@v9", f"hf://{REPO}@v9: no such revision"),
    "no bundle": (f"hf://{REPO}/below", f"hf://{REPO}/below: not a bundle: it has no config.json"),
    "no owner": (
        "hf://tokenizer",
        "--tokenizer: 'hf://tokenizer': expected hf://OWNER/REPO[/FOLDER]",
    ),
    "outside": ("hf://me/../x", "--tokenizer: 'hf://me/../x': expected hf://OWNER/REPO[/FOLDER]"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_hub_does_not_have_is_one_line(server, bundle, gigatok, tmp_path, case):
    address, message = REFUSALS[case]
    assert gigatok("push", bundle, f"hf://{REPO}")[0] == 0
    command = ["reconstruct", f"--tokenizer={address}", "--images=x", f"--out={tmp_path / 'out'}"]
    assert refused(gigatok(*command)).startswith(message)
    assert not (tmp_path / "out").exists()


def test_private_repository_needs_the_token(server, bundle, gigatok, monkeypatch):
    assert gigatok("push", bundle, f"hf://{REPO}", "--private")[0] == 0
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=f"^hf://{REPO}: no such repository on .* a private one"):
        load(f"hf://{REPO}")
    message = refused(gigatok("push", bundle, "hf://me/other"))
    assert message.startswith("hf://me/other: access refused (HTTP 401); check the token (HF_TOKEN")


def test_offline_without_a_copy_is_one_line(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=f"^hf://{REPO}: not in the Hub's cache, and HF_HUB_OFF"):
        load(f"hf://{REPO}")


def test_hub_that_cannot_be_reached_is_one_line(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between attempts
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(UserError, match=f"^hf://{REPO}: no connection to http://127.0.0.1:9 ") as e:
        load(f"hf://{REPO}")
    assert "\n" not in str(e.value)


FLAGS = ("tokenizer", "images", "out")


@pytest.mark.parametrize(
    "flag, where",
    [
        ("--out", "--out: expected a local path"),
        ("--images", "--images: expected a local path"),
        ("--tokenizer", "hf://a/b: not in the Hub's cache"),
    ],
)
def test_flags_of_models_take_addresses_and_others_do_not(gigatok, tmp_path, flag, where):
    command = ["reconstruct", *(f"--{name}={tmp_path / name}" for name in FLAGS)]
    assert refused(gigatok(*command, f"{flag}=hf://a/b")).startswith(where)


@pytest.mark.parametrize(
    "field, where",
    [
        ("config.data.path", "config.data.path: expected a local path"),
        ("workdir", "--workdir: expected a local path"),
        ("config.tokenizer", "hf://a/b: not in the Hub's cache"),
    ],
)
def test_fields_of_models_take_addresses_and_others_do_not(gigatok, tmp_path, field, where):
    command = ["train", "--config=generator:tiny", f"--workdir={tmp_path / 'run'}"]
    code, _, lines = gigatok(*command, "--config.tokenizer=x", f"--{field}=hf://a/b")
    assert code == 2 and lines[-1].removeprefix("gigatok: error: ").startswith(where)
    assert not (tmp_path / "run").exists()


MODEL = generator.GeneratorConfig(1, 2, 16, codes=16, codebook_size=64, classes=3)
MODEL_SHAPES = generator.param_shapes(MODEL)
AUTHORS = "authors/weights"


@pytest.fixture
def published(monkeypatch, server, tmp_path):
    """A tiny tokenizer and its generator, as safetensors of the authors on the Hub."""
    made = {"it": tiny.weights(CONFIG), "its_gpt": {"params": tiny.fill(MODEL_SHAPES)}}
    its = {"tokenizer": "it", "class_names": ("ant", "bee", "cat")}
    its["sampling"] = {"guidance": 2.5, "schedule": "step", "schedule_start": 0.18}
    for name, kind, config, more in (
        ("it", "tokenizer", CONFIG, {}),
        ("its_gpt", "generator", MODEL, its),
    ):
        rule = convert.KINDS[kind]
        changed = dataclasses.replace(rule, model=lambda _, config=config: config)
        monkeypatch.setitem(convert.KINDS, kind, changed)
        path = tmp_path / f"{name}.safetensors"
        torch_files.write(path, convert.to_torch(kind, made[name], config))
        server.commits.setdefault(AUTHORS, [("0" * 40, {})])[0][1][path.name] = path.read_bytes()
        file = fetch.File(f"https://huggingface.co/{AUTHORS}/resolve/main/{path.name}")
        entry = fetch.Published(kind, "tiny", (file,), **more)
        monkeypatch.setitem(fetch.PUBLISHED, name, entry)
    monkeypatch.setattr(torch_files, "import_torch", None)  # safetensors do not need it
    return made


def test_published_generator_brings_its_tokenizer_and_guidance(published, gigatok, tmp_path):
    command = ["sample", "--generator=its_gpt", "--classes=cat", "--count=2", "--batch_size=2"]
    code, _, lines = gigatok(*command, f"--out={tmp_path / 'out'}")
    assert code == 0, lines
    record = json.loads((tmp_path / "out" / "images" / "sampling.json").read_text())
    assert record["tokenizer"] == bundles.fingerprint(published["it"]["params"])
    assert record["sampling"]["guidance"] == 2.5 and record["sampling"]["schedule"] == "step"
    loaded = bundles.load("its_gpt", "generator")
    assert loaded.made_by["tokenizer"] == record["tokenizer"]
    assert gigatok(*command, "--guidance=3", f"--out={tmp_path / 'own'}")[0] == 0
    record = json.loads((tmp_path / "own" / "images" / "sampling.json").read_text())
    assert record["sampling"]["guidance"] == 3 and record["sampling"]["schedule"] == "constant"


def test_data_may_name_the_classes_of_a_published_generator_otherwise(published, tmp_path):
    image_folders.make(tmp_path / "photos", {"a": 1, "b": 1, "c": 1})
    model, tokenizer = api.load_generator("its_gpt"), api.load_tokenizer("it")
    assert model.class_names == ("ant", "bee", "cat")
    data = DataConfig(source="folder", path=str(tmp_path / "photos"), holdout=0)
    assert generation.evaluate_loss(model, tokenizer, data, 3)["images"] == 3
    model.made_by.pop("published")
    with pytest.raises(UserError, match=r"expected class 0 to be 'ant', .* got 'a'"):
        generation.evaluate_loss(model, tokenizer, data, 3)


def test_published_file_is_downloaded_once_and_its_hash_remembered(published, server, tmp_path):
    assert_equal_params(load("it"), published["it"])
    server.requests.clear()
    assert_equal_params(load("it"), published["it"])
    assert not server.requests
    directory = fetch.bundle_path("it")
    directory.rename(directory.with_name("away"))
    server.commit(AUTHORS, {"it.safetensors": b"changed"})
    with pytest.raises(UserError, match=r"it\.safetensors: SHA-256 is .*discarded the download"):
        load("it")
    assert all(blob.read_bytes() != b"changed" for blob in (tmp_path / "hub").rglob("blobs/*"))


def assert_equal_params(found: bundles.Bundle, expected: dict) -> None:
    assert found.fingerprint == bundles.fingerprint(expected["params"])


def test_published_file_that_is_gone_is_one_line(published, server):
    server.commit(AUTHORS, {})
    with pytest.raises(UserError, match=r"/it\.safetensors: no such file in the repository; downl"):
        load("it")


def test_file_put_into_the_cache_by_hand_needs_no_hub(published, server, tmp_path, monkeypatch):
    content = server.commits[AUTHORS][-1][1]["it.safetensors"]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "it.safetensors").write_bytes(content)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_equal_params(load("it"), published["it"])
    assert not server.requests
    with pytest.raises(UserError) as error:
        locate.find("its_gpt", ["generator"])
    path = tmp_path / "cache" / "its_gpt.safetensors"
    assert str(error.value) == (
        f"https://huggingface.co/{AUTHORS}/resolve/main/its_gpt.safetensors: not in the Hub's "
        f"cache, and HF_HUB_OFFLINE forbids connections; download it elsewhere and put it at {path}"
    )


def test_folder_precedes_published_weights_of_its_name(published, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("it").mkdir()  # without a model, it is not meant
    assert locate.find("it", ["tokenizer"]) == fetch.bundle_path("it")
    pathlib.Path("it").rmdir()
    bundle.rename("it")
    assert locate.find("it", ["tokenizer"]) == pathlib.Path("it")


def test_architecture_of_published_weights_needs_no_download(published, server):
    assert bundles.load_config("it", "tokenizer", tiny.TokenizerConfig) == CONFIG
    assert not server.requests


def test_names_are_checked_before_anything_is_downloaded(published, server, gigatok):
    with pytest.raises(UserError, match=r"^it: holds a tokenizer, expected a generator"):
        bundles.load("it", "generator")
    message = refused(gigatok("reconstruct", "--tokenizer=gigatok_b", "--images=x", "--out=y"))
    start = "--tokenizer: 'gigatok_b': no such folder; is it 'gigatok_s_b'; known: drawings, "
    assert message.startswith(start)
    assert message.endswith("it; or give hf://OWNER/REPO[/FOLDER][@REVISION]")
    assert "gigatok_gpt" not in message and not server.requests


PROBE = f"--config={pathlib.Path(__file__).parent / 'probe_config.py'}"
MISNAMED = {
    "--tokenizer": ["encode", "--tokenizer=typo", "--config=tokenizer:tiny_tiny", "--out=out"],
    "--tokenizer ": ["probe", "--tokenizer=typo", PROBE, "--workdir=out"],
    "--generator": ["sample", "--generator=typo", "--out=out"],
    "--from": ["convert", "generator", "--to-torch", "--from=typo", "--out=out"],
    "config.tokenizer": ["train", "--config=generator:tiny", "--workdir=out"],
    "config.tokenizer ": ["plan", "--config=generator:tiny", "--topology=h100:8"],
    "config.objective.teacher": ["plan", "--config=tokenizer:tiny_tiny", "--topology=h100:8"],
}


@pytest.mark.parametrize("where", MISNAMED)
def test_unknown_model_is_one_line_that_names_the_flag_or_field(gigatok, where):
    command, where = MISNAMED[where], where.strip()
    field = [f"--{where}=typo"] if where.startswith("config") else []
    code, _, lines = gigatok(*command, *field)
    assert code == 2
    assert lines[-1].startswith(f"gigatok: error: {where}: 'typo': no such folder; known: ")


def test_all_names_are_known_where_any_model_may_be_named(gigatok):
    message = refused(gigatok("push", "typo", f"hf://{REPO}"))
    assert message.startswith("'typo': no such folder; known: embedded, drawings, drawings_gpt, ")
    assert "gigatok_s_s" in message and "gigatok_gpt_b_s_s" in message


def test_processes_at_once_download_published_weights_once(published, server):
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(load, ["it"] * 4))
    assert len({bundle.fingerprint for bundle in found}) == 1
    assert [path for verb, path in server.requests if verb == "GET"] == [
        f"/{AUTHORS}/resolve/main/it.safetensors"
    ]


def test_address_has_a_form():
    parse = hub.parse
    assert parse("hf://a/b") == ("a/b", "", None)
    assert parse("hf://a/b/c/d@refs/pr/1") == ("a/b", "c/d", "refs/pr/1")
    assert str(parse("hf://a/b/c@v1")) == "hf://a/b/c@v1"
