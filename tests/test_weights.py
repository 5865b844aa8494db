"""Checkpoints: names and shapes of every architecture, both directions, and files."""

import argparse
import collections
import datetime
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from gigatok_jax import files, recipes
from gigatok_jax.errors import UserError
from gigatok_jax.models import discriminators, layers, quantizer, tokenizer, vit
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize
from gigatok_jax.weights import convert, names, torch_files

import synth
import tiny

# For each of the reference's checkpoints: number of tensors and trainable parameters, and the hash
# of its sorted lines "NAME SHAPE".
MANIFESTS = json.loads(
    (pathlib.Path(__file__).parent / "data" / "tokenizer_manifests.json").read_text()
)


def narrow(layout="1d", depth=2, **kwargs) -> TokenizerConfig:
    """A tokenizer of the reference's structure that is small in every width."""
    options = {
        "image_size": 64,
        "latents": 16,
        "base_channels": 32,
        "channel_multipliers": (1, 1, 1, 1, 2),
        "z_channels": 32,
        "codebook_size": 64,
        "semantic_layer": 1,
        "semantic_dim": 24,
    }
    size = TransformerSize(depth, 2, 32)
    return TokenizerConfig(size, size, layout=layout, **(options | kwargs))


@functools.cache
def tokenizer_tensors(config: TokenizerConfig) -> dict[str, np.ndarray]:
    return tiny.numbered(tiny.torch_shapes("tokenizer", config))


def assert_identical(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert actual[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("name", MANIFESTS)
def test_tokenizer_has_exactly_the_references_tensors(name):
    config = recipes.tokenizer_model(name.removeprefix("tokenizer_"))
    shapes = tiny.torch_shapes("tokenizer", config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(tokenizer.param_shapes(config)))
    assert parameters == sum(map(math.prod, shapes.values())) == MANIFESTS[name]["parameters"]
    if name != "tokenizer_tiny_tiny":  # which does not measure usage
        shapes[names.USAGE] = (quantizer.HISTORY_LENGTH,)
    assert len(shapes) == MANIFESTS[name]["tensors"]
    listing = "".join(sorted(f"{n} {list(shape)}\n" for n, shape in shapes.items()))
    assert hashlib.sha256(listing.encode()).hexdigest() == MANIFESTS[name]["sha256"]


def test_parameter_counts_are_the_references():
    counts = json.loads((synth.PARITY / "parameter_counts.json").read_text())
    tokenizers = {name: n for name, n in counts.items() if name.startswith("tokenizer")}
    assert len(tokenizers) == 9
    assert {name: MANIFESTS[name]["parameters"] for name in tokenizers} == tokenizers
    template = layers.param_shapes(discriminators.PatchGAN(), (1, 256, 256, 3))
    assert sum(x.size for x in jax.tree.leaves(template)) == counts["patchgan"]


@pytest.mark.parametrize("layout", ["1d", "2d"])
@pytest.mark.parametrize("measured", [True, False])
def test_tokenizer_returns_bit_for_bit_through_files(tmp_path, layout, measured):
    config = narrow(layout)
    tensors = dict(tokenizer_tensors(config))
    if measured:
        used = np.random.default_rng(0).integers(0, 64, quantizer.HISTORY_LENGTH)
        tensors[names.USAGE] = used.astype(np.float32)
    first, second = tmp_path / "reference.safetensors", tmp_path / "back.safetensors"
    torch_files.write(first, tensors)
    weights = convert.from_torch("tokenizer", torch_files.read(first), config)
    assert weights["history"].dtype == np.int32
    torch_files.write(second, convert.to_torch("tokenizer", weights, config))
    assert_identical(torch_files.read(second), tensors)


def test_history_that_is_not_full_survives_the_reference_layout():
    config = narrow()
    weights = convert.from_torch("tokenizer", tokenizer_tensors(config), config)
    assert np.all(weights["history"] == -1)
    history = np.asarray(quantizer.update_history(weights["history"], np.array([3, 0, 7])))
    tensors = convert.to_torch("tokenizer", weights | {"history": history}, config)
    again = convert.from_torch("tokenizer", tensors, config)["history"]
    np.testing.assert_array_equal(again, history)


@pytest.mark.parametrize("used", [np.zeros(100), np.full(quantizer.HISTORY_LENGTH, 0.5)])
def test_usage_must_be_a_list_of_codes(used):
    config = narrow()
    tensors = tokenizer_tensors(config) | {names.USAGE: used.astype(np.float32)}
    with pytest.raises(ValueError, match=r"codebook_used.*whole numbers"):
        convert.from_torch("tokenizer", tensors, config)


def test_each_layer_has_its_own_place():
    config = narrow(depth=3)
    tensors = tokenizer_tensors(config)
    params = convert.from_torch("tokenizer", tensors, config)["params"]
    kernel = params["decoder"]["layers"]["block"]["mlp_in"]["kernel"]
    for layer in range(3):
        expected = tensors[f"s1to2decoder.transformer.{layer}.linear1.weight"].T
        np.testing.assert_array_equal(kernel[layer], expected)


def test_converted_parameters_do_not_share_memory_with_the_file():
    config = narrow()
    tensors = tokenizer_tensors(config)
    params = convert.from_torch("tokenizer", tensors, config)["params"]
    for leaf in jax.tree.leaves(params):
        assert not any(np.may_share_memory(leaf, source) for source in tensors.values())


def test_only_tensors_of_the_network_are_read():
    config = vit.ViTConfig(2, 2, 16, patch_size=4, grid=3, norm_in=True, layer_scale=False)
    tensors = tiny.numbered(tiny.torch_shapes("clip", config))

    def text_tower():
        raise AssertionError

    stored = {name: functools.partial(tensors.get, name) for name in tensors}
    file = torch_files.Tensors(stored | {"text.weight": text_tower, "visual.proj": text_tower})
    assert_identical(
        convert.to_torch("clip", convert.from_torch("clip", file, config), config), tensors
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(depth=3), r"'s2to1encoder\.transformer\.2\..*' is missing"),
        (dict(depth=1), r"'s2to1encoder\.transformer\.1\..*' of shape \[.*\] does not belong"),
        (dict(layout="2d"), r"does not belong"),
        (
            dict(codebook_size=128),
            r"'quantize\.embedding\.weight' has shape \[64, 8\].* needs \[128, 8\]",
        ),
        (dict(semantic_dim=0), r"distill_mlp.*does not belong"),
    ],
)
def test_checkpoint_of_another_architecture_names_the_tensor(change, message):
    tensors = tokenizer_tensors(narrow())
    with pytest.raises(ValueError, match=message):
        convert.from_torch("tokenizer", tensors, narrow(**change))


@pytest.mark.parametrize(
    "kind, manifest, dropped",
    [
        ("dinov2", "dinov2_vitb14", {"mask_token"}),
        ("dino", "dino_vits16", set()),
        ("lpips", "lpips_vgg16", set()),
    ],
)
def test_frozen_network_has_exactly_the_published_tensors(kind, manifest, dropped):
    rule, published = convert.KINDS[kind], synth.manifest(manifest)
    shapes = tiny.torch_shapes(kind, rule.model(manifest) if rule.model else None)
    assert {name for name in published if name not in shapes} == dropped
    assert shapes == {name: published[name] for name in shapes}


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_dino_returns_bit_for_bit_without_the_mask_token(kind):
    layer_scale = kind == "dinov2"
    config = vit.ViTConfig(2, 2, 16, patch_size=4, grid=3, layer_scale=layer_scale)
    tensors = tiny.numbered(tiny.torch_shapes(kind, config))
    weights = convert.from_torch(kind, tensors | {"mask_token": np.zeros((1, 16))}, config)
    assert_identical(convert.to_torch(kind, weights, config), tensors)


def test_dinov2_with_registers_is_rejected():
    config = vit.ViTConfig(2, 2, 16, patch_size=4, grid=3)
    with pytest.raises(ValueError, match="'register_tokens'"):
        convert.from_torch("dinov2", {"register_tokens": np.zeros((1, 4, 16))}, config)


def test_lpips_returns_bit_for_bit_from_either_form_of_its_file():
    whole = tiny.numbered(tiny.torch_shapes("lpips"))
    published = {re.sub(r"^net\.slice\d\.", "features.", name): t for name, t in whole.items()}
    extra = {"scaling_layer.shift": np.zeros((1, 3, 1, 1)), "lins.0.model.1.weight": np.zeros(1)}
    classifier = {"classifier.0.weight": np.zeros((4, 4), np.float32)}
    for tensors in (whole | extra, published | classifier):
        assert_identical(convert.to_torch("lpips", convert.from_torch("lpips", tensors)), whole)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def wrapped(tensors, case):
    """`tensors` as the file of one `case` holds them, the rest of a training checkpoint around."""
    old = {name: tensor + 1 for name, tensor in tensors.items()}
    rest = {"optimizer": {"state": {0: old}}, "steps": 7, "args": argparse.Namespace(lr=1e-4)}
    return {
        "bare": tensors,
        "model": {"model": tensors, **rest},
        "module": {"module": tensors, **rest},
        "state_dict": {"state_dict": tensors},
        "ema": {"model": old, "ema": tensors, **rest},
        "model of two": {"model": {"module": tensors}, **rest},
        "ddp": {"model": {f"module.{name}": t for name, t in tensors.items()}},
        "compiled": {"model": {f"_orig_mod.{name}": t for name, t in tensors.items()}},
        "both": {f"module._orig_mod.{name}": t for name, t in tensors.items()},
    }[case]


@pytest.mark.parametrize(
    "case",
    ["bare", "model", "module", "state_dict", "ema", "model of two", "ddp", "compiled", "both"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_file_is_read_however_its_tensors_are_wrapped(tmp_path, torch, case, zipped):
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(3)}
    path = tmp_path / "file.pt"
    torch.save(wrapped(tensors, case), path, _use_new_zipfile_serialization=zipped)
    expected = {name: tensor.numpy() for name, tensor in tensors.items()}
    assert_identical(torch_files.read(path), expected)


def test_weights_are_chosen_by_their_key(tmp_path, torch):
    path = tmp_path / "file.pt"
    content = {key: {"x": torch.full((1,), i)} for i, key in enumerate(("model", "discriminator"))}
    torch.save(content, path)
    assert torch_files.read(path)["x"] == 0
    assert torch_files.read(path, "discriminator")["x"] == 1
    with pytest.raises(UserError, match=r"no 'ema' weights, found model, discriminator"):
        torch_files.read(path, "ema")


def test_averages_beside_the_weights_are_preferred(tmp_path, torch):
    path = tmp_path / "file.ckpt"
    state = {"a.b.weight": torch.zeros(2), "a.count": torch.tensor(3), "loss.w": torch.zeros(1)}
    averages = {"model_ema.abweight": torch.ones(2), "model_ema.decay": torch.tensor(0.9)}
    torch.save({"state_dict": state | averages}, path)
    for weights, value in (("auto", 1), ("ema", 1), ("model", 0)):
        tensors = torch_files.read(path, weights)
        assert tensors.keys() == state.keys()
        np.testing.assert_array_equal(tensors["a.b.weight"], [value, value])
        assert tensors["a.count"] == 3
    torch.save({"state_dict": {"c.d": torch.zeros(1)} | averages}, path)
    with pytest.raises(UserError, match=r"expected 'model_ema\.abweight' .* of its tensors"):
        torch_files.read(path)
    assert torch_files.read(path, "model").keys() == {"c.d"}


def test_class_of_a_lightning_callback_beside_the_weights_is_ignored(tmp_path, torch, monkeypatch):
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        path = tmp_path / "last.ckpt"
        content = {"callbacks": {callback: {"best": 1}}, "state_dict": {"w": torch.ones(2)}}
        torch.save(content, path)
    assert_identical(torch_files.read(path), {"w": np.ones(2, np.float32)})


def test_shards_are_those_of_the_index(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": "2.pt", "b": "1.pt", "c": "2.pt"}}))
    assert torch_files.shards(path) == [tmp_path / "1.pt", tmp_path / "2.pt"]
    assert torch_files.shards(tmp_path / "1.pt") == [tmp_path / "1.pt"]


@pytest.mark.parametrize("file", ["../../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b.pt", 3])
def test_index_of_files_elsewhere_is_refused(tmp_path, file):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError) as error:
        torch_files.shards(path)
    expected = f"weight_map: expected files in its own folder, got {file!r}"
    assert str(error.value) == f"{path}: {expected}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_floating_type_is_read_as_float32(tmp_path, torch, dtype, suffix):
    tensors = {
        "x": torch.tensor([1.5, -0.25, 3.0], dtype=getattr(torch, dtype)),
        "n": torch.arange(2),
    }
    path = tmp_path / f"file{suffix}"
    if suffix == ".pt":
        torch.save(tensors, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(tensors, path)
    expected = {"x": np.array([1.5, -0.25, 3.0], np.float32), "n": np.arange(2)}
    assert_identical(torch_files.read(path), expected)


def test_written_pt_file_is_read_back_bit_for_bit(tmp_path, torch):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(5, np.int64)}
    tensors["a"].flags.writeable = False  # as JAX's arrays are
    path = tmp_path / "new" / "file.pt"
    torch_files.write(path, tensors)
    assert_identical(torch_files.read(path), tensors)
    assert torch.load(path, weights_only=True).keys() == {"model"}
    assert [p.name for p in path.parent.iterdir()] == ["file.pt"]


def test_parameter_objects_are_read(tmp_path, torch):
    path = tmp_path / "file.pt"
    torch.save({"w": torch.nn.Parameter(torch.ones(2))}, path)
    np.testing.assert_array_equal(torch_files.read(path)["w"], np.ones(2, np.float32))


BESIDE = {
    "scalar": np.float32(1),
    "array": np.arange(3),
    "objects": np.array([{}], object),
    "path": pathlib.PurePosixPath("/x"),
    "windows": pathlib.PureWindowsPath("c:/x"),
    "own path": pathlib.Path("x"),
    "empty": collections.defaultdict(list),
    "history": collections.defaultdict(list, {"loss": [np.float64(1.0), 0.5]}),
    "counts": collections.defaultdict(int, {1: 2}),
    "last": collections.deque([1.0], maxlen=9),
    "date": datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC),
    "took": datetime.timedelta(1),
    "settings": types.SimpleNamespace(rate=1e-4, out=pathlib.Path("x")),
    "random": np.random.get_state(),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("zipped", [True, False])
def test_plain_objects_beside_the_weights_are_ignored(tmp_path, torch, name, zipped):
    path = tmp_path / "file.pt"
    content = {"first": BESIDE[name], "model": {"w": torch.ones(2)}, "last": [BESIDE[name]]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert_identical(torch_files.read(path), {"w": np.ones(2, np.float32)})


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


class System(Touch):
    """The same, by a command of the shell."""

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


class Factory(Touch):
    """The same, as an argument of an object that is ignored."""

    def __reduce__(self):
        return (collections.defaultdict, (System(self.path),))


@pytest.mark.parametrize(
    "attack, culprit", [(Touch, r"\S+"), (System, "posix.system"), (Factory, "posix.system")]
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_torch_file_does_not_run(tmp_path, torch, attack, culprit, protocol):
    path, touched = tmp_path / "file.pt", tmp_path / "touched"
    content = {"model": {"w": torch.ones(2)}, "extra": attack(touched)}
    torch.save(content, path, pickle_protocol=protocol)
    fault = f"it would run code of {culprit}" if protocol == 2 else "its pickle protocol is not 2"
    with pytest.raises(UserError, match=rf"file\.pt: not a PyTorch checkpoint.*\({fault}; where"):
        torch_files.read(path)
    assert not touched.exists()


def one_line_error(path) -> str:
    with pytest.raises(UserError) as error:
        torch_files.read(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_files_than_checkpoints_end_in_one_line(tmp_path, torch, suffix):
    path = tmp_path / f"file{suffix}"
    assert "no such file" in one_line_error(path)
    path.mkdir()
    assert "is a directory" in one_line_error(path)
    path.rmdir()
    path.touch()
    assert "is empty" in one_line_error(path)
    for text in ("hello\n", "some words of prose, long enough to be a header\n" * 30):
        path.write_text(text)
        assert "not a" in one_line_error(path)
    torch_files.write(path, {"w": np.ones((50, 50), np.float32)})
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        assert "truncated" in one_line_error(path)


def test_safetensors_file_has_no_ema(tmp_path):
    path = tmp_path / "file.safetensors"
    torch_files.write(path, {"w": np.ones(2, np.float32)})
    with pytest.raises(UserError, match=r"no 'ema' weights, found w"):
        torch_files.read(path, "ema")


def test_tensor_of_an_unknown_type_is_named(tmp_path, torch):
    path = tmp_path / "file.safetensors"
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match=r"file\.safetensors: tensor 'w' cannot be read"):
        torch_files.read(path)["w"]


def test_written_files_may_be_read_by_others(tmp_path):
    path = tmp_path / "file.safetensors"
    torch_files.write(path, {"w": np.ones(2, np.float32)})
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_torch_file_without_tensors_says_what_it_holds(tmp_path, torch):
    path = tmp_path / "file.pt"
    torch.save({"epoch": 3, "teacher": {"w": torch.ones(1)}}, path)
    assert "found epoch, teacher" in one_line_error(path)
    torch.save([1, 2], path)
    assert "holds a list" in one_line_error(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, torch, monkeypatch, suffix):
    path = tmp_path / f"file{suffix}"
    torch_files.write(path, {"w": np.zeros(2, np.float32)})

    def full_disk(_, file):
        pathlib.Path(file).write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    monkeypatch.setattr(safetensors.numpy, "save_file", full_disk)
    with pytest.raises(OSError, match="the disk is full; this file takes 8 bytes") as caught:
        torch_files.write(path, {"w": np.ones(2, np.float32)})
    assert caught.value.filename == str(path) and caught.value.errno in files.MACHINE
    np.testing.assert_array_equal(torch_files.read(path)["w"], np.zeros(2))
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_suffix_is_rejected_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"out\.npz: expected a file name that ends in"):
        torch_files.write(tmp_path / "new" / "out.npz", {"w": np.ones(2)})
    assert list(tmp_path.iterdir()) == []
