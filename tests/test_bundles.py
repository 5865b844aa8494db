"""Bundles: what is saved is loaded, and other directories end in one clear line."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import bundles, distributed
from gigatok_jax.errors import UserError
from gigatok_jax.models import generator
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize

import tiny


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {
        "params": {"dense": {"kernel": rng.standard_normal((40, 50), dtype=np.float32)}},
        "batch_stats": {"mean": jnp.asarray(rng.standard_normal(3), jnp.float32)},
        "history": np.arange(5, dtype=np.int32),
    }


@pytest.fixture
def bundle(tmp_path, weights):
    directory = tmp_path / "bundle"
    bundles.save(directory, "thing", TransformerSize(1, 2, 4), weights, {"step": 7})
    return directory


def refusal(directory, kind="thing") -> str:
    with pytest.raises(UserError) as error:
        bundles.load(directory, kind)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_saved_is_loaded(bundle, weights):
    loaded = bundles.load(str(bundle), "thing")
    assert loaded.config == {"depth": 1, "heads": 2, "width": 4}
    assert loaded.made_by == {"step": 7}
    assert_equal(loaded.weights, weights)
    assert bundles.load(bundle, ("other", "thing"), TransformerSize).config.width == 4
    assert sorted(path.name for path in bundle.iterdir()) == ["config.json", "model.safetensors"]


def assert_equal(actual, expected):
    expected = jax.tree.map(np.asarray, expected)
    jax.tree.map(lambda *x: np.testing.assert_array_equal(*x, strict=True), actual, expected)


def test_half_precision_loads_as_float32(tmp_path):
    stored = {"half": np.array([0.1, 2], np.float16), "brain": jnp.array([0.1, 2], jnp.bfloat16)}
    bundles.save(tmp_path / "bundle", "thing", None, stored, {})
    loaded = bundles.load(tmp_path / "bundle", "thing").weights
    assert_equal(loaded, {name: x.astype(np.float32) for name, x in stored.items()})


def test_transposed_arrays_and_scalars_are_saved_as_they_are(tmp_path):
    weights = {"x": np.arange(6, dtype=np.float32).reshape(2, 3).T, "n": np.array(5, np.int32)}
    bundles.save(tmp_path / "bundle", "thing", None, weights, {})
    assert_equal(bundles.load(tmp_path / "bundle", "thing").weights, weights)


@pytest.mark.parametrize("file_bytes, files", [(8_020, 2), (12, 3), (1, 3)])
def test_large_model_is_divided_into_files(tmp_path, weights, file_bytes, files):
    directory = tmp_path / "bundle"
    bundles.save(directory, "thing", None, weights, {}, file_bytes=file_bytes)
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    assert sorted(path.name for path in directory.glob("*.safetensors")) == names
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == flatten_dict(weights, sep="/").keys()
    assert index["metadata"] == {"total_size": 8_000 + 12 + 20}
    assert_equal(bundles.load(directory, "thing").weights, weights)
    (directory / names[-1]).unlink()
    assert refusal(directory).startswith(f"{directory}: unreadable weights (")


def test_index_must_name_the_arrays_of_its_files(tmp_path, weights):
    directory = tmp_path / "bundle"
    bundles.save(directory, "thing", None, weights, {}, file_bytes=1)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["more"] = "model-00001-of-00003.safetensors"
    path.write_text(json.dumps(index))
    assert refusal(directory) == f"{directory}: unreadable weights (more is missing)"
    for file in ("absent.safetensors", "../elsewhere.safetensors"):
        path.write_text(json.dumps({"weight_map": {"x": file}}))
        assert re.search(f"unreadable weights .*{file}", refusal(directory))
    for content in ("{", "[]", "{}"):
        path.write_text(content)
        assert refusal(directory).startswith(f"{directory}: unreadable weights (")


PROCESS = """
import pathlib
import sys

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from gigatok_jax import bundles, distributed

index, address, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
distributed.start(address, 2, index)
mesh = Mesh(np.array(jax.devices()), ("fsdp",))


def shared(array, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


rows = np.arange(12, dtype=np.float32).reshape(4, 3)
weights = {"rows": shared(rows, "fsdp"), "whole": shared(rows + 1), "local": rows + 2}
bundles.save(pathlib.Path(directory), "thing", None, weights, {}, file_bytes=60)
if index == 1:
    loaded = bundles.load(directory, "thing").weights  # while the other process does not
    assert all(np.array_equal(loaded[k], rows + i) for i, k in enumerate(weights)), loaded
"""


def test_two_processes_save_one_bundle_and_each_loads_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    root = pathlib.Path(__file__).parents[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    environment.pop("XLA_FLAGS", None)
    command = [sys.executable, "-c", PROCESS]
    processes = [
        subprocess.Popen([*command, str(i), address, str(tmp_path / "bundle")], env=environment)
        for i in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert len(list((tmp_path / "bundle").glob("model-*.safetensors"))) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_new_bundle_replaces_the_old(bundle):
    bundles.save(bundle, "other", None, {"x": np.ones(2)}, {})
    loaded = bundles.load(bundle, "other")
    assert loaded.config == {} and loaded.weights.keys() == {"x"}
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("other", ["photo.jpg", "notes/mine.txt", "model.safetensors"])
def test_other_things_than_a_bundle_are_not_replaced(bundle, other):
    (bundle / other).parent.mkdir(exist_ok=True)
    (bundle / other).touch()
    if other == "model.safetensors":  # as downloaded from elsewhere
        (bundle / "config.json").write_text("{}")
    before = sorted(bundle.rglob("*"))
    with pytest.raises(UserError, match="bundle: expected a bundle to replace, or an empty folder"):
        bundles.save(bundle, "other", None, {"x": np.ones(2)}, {})
    assert sorted(bundle.rglob("*")) == before and [*bundle.parent.iterdir()] == [bundle]


def test_a_bundle_with_files_of_file_managers_is_replaced(bundle):
    for name in (".DS_Store", "Thumbs.db"):
        (bundle / name).touch()
    bundles.save(bundle, "other", None, {"x": np.ones(2)}, {})
    assert {path.name for path in bundle.iterdir()} == {"config.json", "model.safetensors"}


def test_failed_save_leaves_the_old_bundle(bundle, weights):
    with pytest.raises(TypeError):
        bundles.save(bundle, "thing", None, weights, {"not": object()})
    assert bundles.load(bundle, "thing").made_by == {"step": 7}
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_another_kind_is_rejected(bundle):
    assert refusal(bundle, "teacher") == f"{bundle}: holds a thing, expected a teacher"


def test_directory_without_a_bundle_is_rejected(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path}: not a bundle: it has no config.json"
    assert refusal(tmp_path / "missing") == f"{tmp_path / 'missing'}: no such folder"


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "config.json: expected JSON"),
        ("", "config.json: expected JSON"),
        ("[1]", "config.json: expected a JSON object"),
        ('{"format": 99, "kind": "thing"}', "config.json: not the config of a bundle"),
    ],
)
def test_broken_description_is_rejected(bundle, content, message):
    (bundle / "config.json").write_text(content)
    assert refusal(bundle).startswith(f"{bundle}/{message}")


@pytest.mark.parametrize("key", ["kind", "config", "made_by"])
def test_incomplete_description_is_rejected(bundle, key):
    record = json.loads((bundle / "config.json").read_text())
    del record[key]
    (bundle / "config.json").write_text(json.dumps(record))
    assert re.match(f"{bundle}/config.json: .*", refusal(bundle))


@pytest.mark.parametrize("damage", ["removed", "emptied", "cut short", "text"])
def test_damaged_weights_are_rejected(bundle, damage):
    path = bundle / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage != "removed":
        kept = {"emptied": b"", "cut short": content[: len(content) // 2], "text": b"hello\n" * 9}
        path.write_bytes(kept[damage])
    assert refusal(bundle).startswith(f"{bundle}: unreadable weights (")


def test_run_that_has_written_no_bundle_says_when_it_will(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert refusal(tmp_path).startswith(f"{tmp_path}: this run has not written a bundle yet")


def test_workdir_stands_for_its_bundle(bundle, weights):
    (bundle.parent / "checkpoints").mkdir()
    assert_equal(bundles.load(bundle.parent, "thing").weights, weights)


def test_fingerprint_depends_on_names_and_values():
    params = {"a": {"kernel": np.ones(2, np.float32)}, "b": np.zeros(2, np.float32)}
    found = bundles.fingerprint(params)
    assert re.fullmatch(r"[0-9a-f]{16}", found)
    assert found == bundles.fingerprint(jax.tree.map(jnp.asarray, params))
    assert found != bundles.fingerprint({**params, "b": np.array([0, 1], np.float32)})
    assert found != bundles.fingerprint({"a": params["a"], "c": params["b"]})


CONTENTS = {
    "another size": (
        lambda weights: tiny.weights(tiny.config(decoder=TransformerSize(2, 2, 32))),
        "params/decoder/embed/bias: expected float32 [16] by config.json, got float32 [32]",
    ),
    "another codebook": (
        lambda weights: tiny.weights(tiny.config(codebook_size=128)),
        "params/codebook: expected float32 [64, 8] by config.json, got float32 [128, 8]",
    ),
    "missing": (
        lambda weights: {"params": weights["params"]},
        "history: expected int32 [65536] by config.json, got none",
    ),
    "unknown": (
        lambda weights: weights | {"params": weights["params"] | {"x": np.ones(3, np.float32)}},
        "params/x: expected no such array by config.json, got float32 [3]",
    ),
    "another type": (
        lambda weights: weights | {"history": weights["history"].astype(np.int64)},
        "history: expected int32 [65536] by config.json, got int64 [65536]",
    ),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_weights_must_be_those_of_the_architecture(tmp_path, case):
    change, message = CONTENTS[case]
    bundles.save(tmp_path, "tokenizer", tiny.config(), change(tiny.weights(tiny.config())), {})
    with pytest.raises(UserError) as error:
        bundles.load(tmp_path, "tokenizer", TokenizerConfig)
    assert str(error.value) == f"{tmp_path}: {message}"


def test_weights_of_a_generator_must_be_those_of_its_architecture(tmp_path):
    small, large = (
        generator.GeneratorConfig(1, 2, 16, codes=4, codebook_size=codes, classes=3)
        for codes in (8, 9)
    )
    weights = {"params": tiny.fill(generator.param_shapes(large))}
    bundles.save(tmp_path, "generator", small, weights, {})
    with pytest.raises(UserError, match=r": params/\S+: expected float32 \[.*8.*\] by config.json"):
        bundles.load(tmp_path, "generator", generator.GeneratorConfig)


def test_one_process_of_a_run_can_save_by_itself(tmp_path, monkeypatch):
    def wait(*args, **options):
        raise AssertionError("waits for the others")

    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "barrier", wait)
    config = tiny.config()
    bundles.save(tmp_path / "b", "tokenizer", config, tiny.weights(config), {}, alone=True)
    assert bundles.load(tmp_path / "b", "tokenizer", TokenizerConfig).config == config
