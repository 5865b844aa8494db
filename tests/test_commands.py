"""The command line: what it writes, and one line for whatever cannot work."""

import dataclasses
import importlib.metadata
import json
import logging
import pathlib
import re
import shlex
import shutil
import sys

import jax
import numpy as np
from PIL import Image
import pytest

from gigatok_jax import bundles, cli, commands, frozen_networks, locks
from gigatok_jax.errors import UserError
from gigatok_jax.models import vit
from gigatok_jax.training import loop
from gigatok_jax.weights import convert, fetch, torch_files

import image_folders
import synth
import tiny
import train_config

TOKENIZER = f"{pathlib.Path(__file__).parent.parent / 'configs' / 'tokenizer.py'}:s_s"


@pytest.fixture
def gigatok(capsys, monkeypatch, tmp_path):
    """Runs a command as the shell would; returns exit code, standard output, error lines."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compilations"))
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path / "cache"))
    logger = logging.getLogger("gigatok_jax")
    before = logger.handlers, logger.level, logger.propagate

    def run(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    yield run
    logger.handlers, level, logger.propagate = before
    logger.setLevel(level)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer") / "bundle"
    bundles.save(directory, "tokenizer", tiny.config(), tiny.weights(tiny.config()), {})
    return directory


def refused(result) -> str:
    """The message of a command that ended as wrong input does."""
    code, out, lines = result
    assert code == 2 and out == "", (code, out, lines)
    assert len(lines) == 1 and lines[0].startswith("gigatok: error: "), lines
    return lines[0].removeprefix("gigatok: error: ")


def test_help_lists_every_verb_and_each_has_its_own(gigatok):
    code, out, lines = gigatok("--help")
    assert code == 0 and not lines
    assert all(f"  {verb} " in out for verb in commands.VERBS)
    for verb in commands.VERBS:
        code, out, lines = gigatok(verb, "--help")
        assert code == 0 and re.match(rf"gigatok {verb}\b", out) and not lines


def test_converted_tokenizer_comes_back_bit_for_bit(gigatok, tmp_path):
    tensors = synth.checkpoint("tokenizer_tiny_tiny")
    source, back = tmp_path / "reference.safetensors", tmp_path / "back.safetensors"
    torch_files.write(source, tensors)
    directory = tmp_path / "bundle"
    code, out, _ = gigatok(
        "convert", "tokenizer", f"--from={source}", "--model=tiny_tiny", f"--out={directory}"
    )
    assert (code, out) == (0, f"{directory}\n")
    code, out, _ = gigatok(
        "convert", "tokenizer", "--to_torch", f"--from={directory}", f"--out={back}"
    )
    assert (code, out) == (0, f"{back}\n")
    returned = torch_files.read(back)
    assert returned.keys() == tensors.keys()
    assert all(returned[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())


def test_conversion_replaces_a_bundle_that_is_free_and_nothing_else(gigatok, bundle, tmp_path):
    source, out, photos = tmp_path / "b.safetensors", tmp_path / "bundle", tmp_path / "photos"
    torch_files.write(source, synth.checkpoint("tokenizer_tiny_tiny"))
    shutil.copytree(bundle, out)
    image_folders.save(photos / "a.png", seed=1)
    command = ["convert", "tokenizer", f"--from={source}", "--model=tiny_tiny"]
    message = refused(gigatok(*command, f"--out={photos}"))
    assert message.startswith(f"{photos}: expected a bundle to replace, or an empty folder, found ")
    with locks.hold(out):
        assert refused(gigatok(*command, f"--out={out}")).startswith(f"{out}: in use by process ")
        assert (out / ".lock").exists()
    assert [path.name for path in photos.iterdir()] == ["a.png"]
    before = (out / "config.json").read_text()
    assert gigatok(*command, f"--out={out}")[0] == 0
    assert (out / "config.json").read_text() != before


def test_reconstruction_skips_a_broken_image(gigatok, bundle, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out"
    for i in range(3):
        image_folders.save(folder / "class" / f"{i}.png", seed=i)
    image_folders.spoil(folder / "class" / "1.png")
    code, text, lines = gigatok(
        "reconstruct", f"--tokenizer={bundle}", f"--images={folder}", f"--out={out}"
    )
    assert code == 0
    assert "2 images (1 skipped)" in text
    assert any("1.png" in line for line in lines)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    pngs = ["images/class/0.png", "images/class/2.png"]
    assert names == ["grid.png", *pngs, "images/reconstruction.json", "metrics.json"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["images"], metrics["skipped"]) == (2, 1)
    assert [row["image"] for row in metrics["each"]] == ["class/0.png", "class/2.png"]
    assert metrics["psnr"] == pytest.approx(np.mean([row["psnr"] for row in metrics["each"]]))
    assert 0 < metrics["codebook_usage"] <= 32 / 64 and -1 <= metrics["ssim"] <= 1
    with Image.open(out / "images/class/0.png") as image:
        assert image.size == (32, 32)
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (2 * 100 + 4, 2 * 100 + 4)


def test_unknown_verb(gigatok):
    assert refused(gigatok("trian")).startswith("'trian': no such verb; known: train, ")


def test_converted_dino_is_what_training_reads_but_for_the_biases_of_keys(
    gigatok, tmp_path, offline
):
    with pytest.raises(UserError, match=r"dino_deitsmall16_pretrain\.pth"):
        frozen_networks.load_dino()
    source, back = tmp_path / "dino.safetensors", tmp_path / "back.safetensors"
    tensors = synth.checkpoint("dino_vits16")
    torch_files.write(source, tensors)
    out = f"--out={fetch.bundle_path('dino_vits16')}"
    code, _, _ = gigatok("convert", "dino", f"--from={source}", "--model=dino_vits16", out)
    assert code == 0
    params = frozen_networks.load_dino()
    torch_files.write(back, convert.to_torch("dino", {"params": params}, vit.DINO["dino_vits16"]))
    for name, returned in torch_files.read(back).items():
        expected = tensors[name].copy()
        if name.endswith("qkv.bias"):
            expected[384:768] = 0
        np.testing.assert_array_equal(returned, expected)


def test_accelerator_that_is_not_there_is_an_error(gigatok, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")  # the tests themselves run on the CPU
    command = ["train", f"--config={TOKENIZER}", f"--workdir={tmp_path}"]
    assert "JAX finds no cuda device" in refused(gigatok(*command))


@pytest.mark.parametrize(
    "arguments, culprit",
    [
        (["train", f"--config={TOKENIZER}"], "--workdir"),
        (["train", "--workdir=DIR"], "--config"),
        (["convert", "tokenizer", "--from=FILE"], "--out"),
        (["reconstruct", "--tokenizer=DIR", "--out=DIR"], "--images"),
    ],
)
def test_missing_flag(gigatok, arguments, culprit):
    assert culprit in refused(gigatok(*arguments))


def test_flags_of_an_earlier_call_are_forgotten(gigatok, tmp_path):
    missing = tmp_path / "missing"
    everything = [f"--{name}={missing}" for name in ("tokenizer", "images", "out")]
    assert str(missing) in refused(gigatok("reconstruct", *everything))
    assert "--images" in refused(gigatok("reconstruct", *everything[:1], *everything[2:]))
    for _ in range(2):  # --from may be repeated: it must not pile up
        arguments = ["convert", "lpips", "--to_torch", f"--from={missing}", "--out=x.pt"]
        assert refused(gigatok(*arguments)).startswith(f"--from: '{missing}': no such folder")


def test_command_line_of_the_process_is_left_alone(gigatok):
    before = list(sys.argv)
    gigatok("train", f"--config={TOKENIZER}", "--config.seed=3", "--workdir")
    assert sys.argv == before


@pytest.mark.parametrize(
    "override, culprit",
    [
        ("--config.optimiser.rate=1", "optimiser"),
        ("--config.optimizer.rat=1", "rat"),
        ("--config.batch_size=many", "batch_size"),
        ("--config.batch_size=0", "config.batch_size: expected greater than 0, got 0"),
        ("--config.model.latents=100", "config.model.latents: expected a power of two"),
        ("--config.task=classifier", "config.task"),
        ("--config.teacher=x", "--config.teacher: no such field; known: accumulate, average_decay"),
        ("--config.objective.semantik=1", "--config.objective.semantik: no such field; known: "),
        ("--config.steps.x=1", "--config.steps.x: no such field; known: none"),
        ("--workdirr=DIR", "workdirr"),
    ],
)
def test_field_that_cannot_be_set(gigatok, tmp_path, override, culprit):
    workdir = tmp_path / "workdir"
    result = gigatok("train", f"--config={TOKENIZER}", f"--workdir={workdir}", override)
    assert culprit in refused(result)
    assert not workdir.exists()


def test_unknown_config(gigatok, tmp_path):
    workdir = f"--workdir={tmp_path / 'workdir'}"
    path = tmp_path / "none.py"
    for override in ("--config.seed=1", ""):
        message = refused(gigatok("train", f"--config={path}", workdir, *override.split()))
        assert message.startswith("--config: ") and str(path) in message
    path = TOKENIZER.replace(":s_s", ":s_z")
    assert "'s_z': no such tokenizer" in refused(gigatok("train", f"--config={path}", workdir))


def test_text_file_as_checkpoint(gigatok, tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "notes.pt"
    path.write_text("not weights\n")
    result = gigatok("convert", "tokenizer", f"--from={path}", "--model=s_s", "--out=DIR")
    assert refused(result).startswith(f"{path}: not a PyTorch checkpoint")


@pytest.mark.parametrize("content, message", [(None, "no such file or folder"), ("", "no images")])
def test_missing_images(gigatok, bundle, tmp_path, content, message):
    folder, out = tmp_path / "images", tmp_path / "out"
    if content is not None:
        folder.mkdir()
    result = gigatok("reconstruct", f"--tokenizer={bundle}", f"--images={folder}", f"--out={out}")
    assert refused(result).startswith(f"{folder}: {message}")
    assert not out.exists()


def test_run_resumes_with_newer_fields_but_not_with_another_discriminator(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    run = train_config.get_config()
    older = json.loads(json.dumps(dataclasses.asdict(run)))
    del older["objective"]["discriminator"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert loop._check_workdir(tmp_path, run) == []
    assert json.loads((tmp_path / "config.json").read_text()) == older
    other = dataclasses.replace(
        run, objective=dataclasses.replace(run.objective, discriminator="dino")
    )
    message = r"^config\.objective\.discriminator: 'dino', but the run in .* has 'patchgan'"
    with pytest.raises(UserError, match=message):
        loop._check_workdir(tmp_path, other)


def test_bundle_of_another_kind(gigatok, tmp_path):
    directory = tmp_path / "lpips"
    bundles.save(directory, "lpips", None, {"x": np.ones(1)}, {})
    result = gigatok("reconstruct", f"--tokenizer={directory}", "--images=X", "--out=DIR")
    assert refused(result) == f"{directory}: holds a lpips, expected a tokenizer"


def test_checkpoint_of_another_architecture(gigatok, tmp_path):
    path, out = tmp_path / "checkpoint.safetensors", tmp_path / "bundle"
    torch_files.write(
        path, convert.to_torch("tokenizer", tiny.weights(tiny.config()), tiny.config())
    )
    result = gigatok("convert", "tokenizer", f"--from={path}", "--model=s_s", f"--out={out}")
    assert refused(result).startswith(f"{path}: tensor '")
    assert not out.exists()


def test_converted_model_is_that_of_a_run(gigatok, bundle, tmp_path):
    """`--model` may be a workdir, with the bundle of a finished run, or without one."""
    path, out, workdir = tmp_path / "weights.safetensors", tmp_path / "out", tmp_path / "run"
    torch_files.write(
        path, convert.to_torch("tokenizer", tiny.weights(tiny.config()), tiny.config())
    )
    command = ["convert", "tokenizer", f"--from={path}", f"--model={workdir}", f"--out={out}"]
    (workdir / "checkpoints").mkdir(parents=True)
    assert refused(gigatok(*command)).startswith(f"{workdir}: this run has not written a bundle")
    shutil.copytree(bundle, workdir / "bundle")
    assert gigatok(*command)[0] == 0
    expected, found = (bundles.load(folder, "tokenizer") for folder in (bundle, out))
    assert found.fingerprint == expected.fingerprint and found.config == expected.config


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_not_converted(gigatok, bundle, tmp_path, value):
    path, out = tmp_path / "weights.safetensors", tmp_path / "out"
    tensors = convert.to_torch("tokenizer", tiny.weights(tiny.config()), tiny.config())
    tensors["quantize.embedding.weight"][3, 1] = value
    torch_files.write(path, tensors)
    command = ["convert", "tokenizer", f"--from={path}", f"--model={bundle}", f"--out={out}"]
    message = f"{path}: codebook: expected finite values, found NaN or infinity"
    assert refused(gigatok(*command)) == message
    assert not out.exists()


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_seed_out_of_range(gigatok, tmp_path, seed):
    workdir = tmp_path / "run"
    command = ["train", f"--config={TOKENIZER}", f"--config.seed={seed}", f"--workdir={workdir}"]
    assert refused(gigatok(*command)).startswith("config.seed: expected ")
    assert not workdir.exists()


def test_index_of_shards(gigatok, bundle, tmp_path):
    tensors = convert.to_torch("tokenizer", tiny.weights(tiny.config()), tiny.config())
    names = sorted(tensors)
    parts = {"1.safetensors": names[::2], "2.safetensors": names[1::2]}
    for file, part in parts.items():
        torch_files.write(tmp_path / file, {name: tensors[name] for name in part})
    index, out = tmp_path / "model.safetensors.index.json", tmp_path / "out"
    command = ["convert", "tokenizer", f"--from={index}", f"--model={bundle}", f"--out={out}"]
    places = {name: file for file, part in parts.items() for name in part}
    index.write_text(json.dumps({"weight_map": places | {names[0]: "../1.safetensors"}}))
    assert refused(gigatok(*command)).startswith(f"{index}: weight_map: expected files in its own")
    index.write_text(json.dumps({"weight_map": places}))
    assert gigatok(*command)[0] == 0
    expected, found = (bundles.load(folder, "tokenizer") for folder in (bundle, out))
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["convert", "tokeniser", "--from=X", "--out=Y"], "'tokeniser': no such kind of weights"),
        (["convert", "--from=X", "--out=Y"], "expected one KIND of tokenizer, "),
        (["convert", "tokenizer", "--from=X", "--out=Y"], "--model: expected the architecture"),
        (["convert", "tokenizer", "--from=X", "--out=Y", "--model=q"], "'q': no such tokenizer"),
        (["weights", "fetch", "gigatok_z"], "'gigatok_z': no such weights; known: "),
        (["weights", "fetch"], "expected: weights list, or weights fetch NAME, with "),
        (
            ["train", f"--config={TOKENIZER}", "--workdir=X", "extra"],
            "'extra': unexpected argument",
        ),
    ],
)
def test_unknown_names(gigatok, arguments, message):
    assert refused(gigatok(*arguments)).startswith(message)


def test_results_of_different_verbs_stay_apart(gigatok, bundle, tmp_path):
    image_folders.save(tmp_path / "photos" / "a.png", seed=1)
    photos = f"--images={tmp_path / 'photos'}"
    out, config = tmp_path / "out", f"--config={train_config.__file__}"
    assert gigatok("reconstruct", f"--tokenizer={bundle}", photos, f"--out={out}")[0] == 0
    cost = ["evaluate", "cost", f"--tokenizer={bundle}", config]
    message = refused(gigatok(*cost, f"--out={out}"))
    assert message == f"--out: expected a folder without the images/ of another verb, got {out}"

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "evaluation.json").write_text('{"measure": "generation"}')
    message = refused(gigatok(*cost, f"--out={tmp_path / 'other'}"))
    assert message.endswith("made with another measure: 'generation', not 'cost'")
    for verb in (
        ["reconstruct", f"--tokenizer={bundle}", photos],
        ["sample", f"--tokenizer={bundle}", f"--generator={bundle}"],
    ):
        message = refused(gigatok(*verb, f"--out={tmp_path / 'other'}"))
        assert message.startswith("--out: expected a folder without results of evaluate, got ")

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    probe = ["probe", f"--tokenizer={bundle}", "--config=demo:probe"]
    message = refused(gigatok(*probe, f"--workdir={tmp_path / 'run'}"))
    assert message.startswith("--workdir: expected a folder without a training run, got ")
    message = refused(gigatok("report", tmp_path / "run", f"--out={tmp_path / 'photo.jpg'}"))
    assert message.startswith("--out: expected a file name that ends with .html, got ")


def test_version_and_environment(gigatok, tmp_path):
    version = importlib.metadata.version("gigatok_jax")
    assert gigatok("--version") == (0, f"gigatok_jax {version}\n", [])
    code, out, _ = gigatok("env")
    found = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()}
    assert code == 0 and found["gigatok_jax"] == version and found["jax"] == jax.__version__
    assert found["devices"].endswith(" cpu") and found["cache"] == str(tmp_path / "cache")


def test_configurations_are_listed(gigatok):
    code, out, _ = gigatok("config", "list")
    assert code == 0
    for text in ("demo: ", "generator: ", "probe: ", "tokenizer: ", "s_s s_b s_l"):
        assert text in out


def test_what_config_shows_sets_the_same_configuration(gigatok):
    flags = ["--config.batch_size=64", "--config.data.path=my photos", "--config.epoch_images=640"]
    code, out, _ = gigatok("config", "show", "generator:tiny,2d", *flags)
    shown = [shlex.split(line)[0] for line in out.splitlines()]
    assert code == 0
    assert "--config.batch_size=64" in shown and "--config.data.path=my photos" in shown
    assert "--config.steps=3000" in shown  # 300 epochs of ten
    assert "--config.optimizer.warmup_steps=10" in shown  # an epoch
    assert gigatok("config", "show", "generator:tiny,2d", *shown)[1] == out


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "expected list, or show NAME, got nothing"),
        (["show"], "expected list, or show NAME, got show"),
        (["list", "tokenizer"], "expected list, or show NAME, got list tokenizer"),
        (["show", "nothing"], "--config: nothing: no such file; installed configs: demo, "),
        (["show", "generator:b", "--config.nothing=1"], "--config.nothing: no such field; known: "),
    ],
)
def test_config_says_what_is_wrong(gigatok, words, message):
    assert refused(gigatok("config", *words)).startswith(message)
