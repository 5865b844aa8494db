"""Checkpoints: names and shapes of every architecture, ways there and back, and files."""

import argparse
import functools
import hashlib
import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from gigatok_jax.errors import UserError
from gigatok_jax.models import quantizer, vit
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize
from gigatok_jax.weights import convert, layout, names, torch_files

import synth

SIZES = {
    "tiny": TransformerSize(4, 4, 256),
    "s": TransformerSize(6, 8, 512),
    "b": TransformerSize(12, 12, 768),
    "l": TransformerSize(24, 16, 1024),
    "xl": TransformerSize(36, 20, 1280),
    "xxl": TransformerSize(48, 24, 1536),
}
# Of each of the reference's checkpoints: number of tensors and trainable parameters, and the hash
# of its sorted lines "NAME SHAPE".
MANIFESTS = json.loads(
    (pathlib.Path(__file__).parent / "data" / "tokenizer_manifests.json").read_text()
)


def tokenizer_config(name: str) -> TokenizerConfig:
    _, encoder, decoder, *layout = name.split("_")
    return TokenizerConfig(SIZES[encoder], SIZES[decoder], layout=layout[0] if layout else "1d")


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


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors of these shapes, no two elements alike within a tensor."""
    return {
        name: np.arange(i, i + math.prod(shape), dtype=np.float32).reshape(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


@functools.cache
def tokenizer_tensors(config: TokenizerConfig) -> dict[str, np.ndarray]:
    return filled(layout.torch_shapes(names.tokenizer(config), convert.tokenizer_shapes(config)))


def assert_identical(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].shape == tensor.shape, name
        assert actual[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_tokenizer_has_exactly_the_references_tensors(name):
    config = tokenizer_config(name)
    template = convert.tokenizer_shapes(config)
    shapes = layout.torch_shapes(names.tokenizer(config), template)
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(template))
    assert parameters == sum(map(math.prod, shapes.values())) == MANIFESTS[name]["parameters"]
    if name != "tokenizer_tiny_tiny":  # which does not measure usage
        shapes[convert.USAGE_NAME] = (quantizer.HISTORY_LENGTH,)
    assert len(shapes) == MANIFESTS[name]["tensors"]
    listing = "".join(sorted(f"{n} {list(shape)}\n" for n, shape in shapes.items()))
    assert hashlib.sha256(listing.encode()).hexdigest() == MANIFESTS[name]["sha256"]


def test_parameter_counts_are_the_references():
    counts = json.loads((synth.PARITY / "parameter_counts.json").read_text())
    tokenizers = {name: n for name, n in counts.items() if name.startswith("tokenizer")}
    assert len(tokenizers) == 9
    assert {name: MANIFESTS[name]["parameters"] for name in tokenizers} == tokenizers
    template = convert.shapes(convert.discriminators.PatchGAN(), (1, 256, 256, 3))["params"]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(template)) == counts["patchgan"]


def test_reference_tokenizer_without_usage_comes_back_bit_for_bit():
    tensors = filled(synth.manifest("tokenizer_tiny_tiny"))
    config = tokenizer_config("tokenizer_tiny_tiny")
    variables = convert.tokenizer_from_torch(tensors, config)
    assert_identical(convert.tokenizer_to_torch(variables, config), tensors)


@pytest.mark.parametrize("layout", ["1d", "2d"])
def test_tokenizer_with_usage_comes_back_bit_for_bit_through_files(tmp_path, layout):
    config = narrow(layout)
    used = np.random.default_rng(0).integers(0, 64, quantizer.HISTORY_LENGTH).astype(np.float32)
    tensors = {**tokenizer_tensors(config), convert.USAGE_NAME: used}
    first, second = tmp_path / "reference.safetensors", tmp_path / "back.safetensors"
    torch_files.write(first, tensors)
    variables = convert.tokenizer_from_torch(torch_files.read(first), config)
    assert variables["history"].dtype == np.int32
    torch_files.write(second, convert.tokenizer_to_torch(variables, config))
    assert_identical(torch_files.read(second), tensors)


def test_history_with_assignments_yet_to_come_survives_the_reference_layout():
    config = narrow()
    variables = convert.tokenizer_from_torch(tokenizer_tensors(config), config)
    assert np.all(variables["history"] == -1)
    history = np.asarray(quantizer.update_history(variables["history"], np.array([3, 0, 7])))
    tensors = convert.tokenizer_to_torch(variables | {"history": history}, config)
    again = convert.tokenizer_from_torch(tensors, config)["history"]
    np.testing.assert_array_equal(again, history)


@pytest.mark.parametrize("used", [np.zeros(100), np.full(quantizer.HISTORY_LENGTH, 0.5)])
def test_usage_that_is_no_list_of_codes_is_refused(used):
    config = narrow()
    tensors = tokenizer_tensors(config) | {convert.USAGE_NAME: used.astype(np.float32)}
    with pytest.raises(ValueError, match=r"codebook_used.*whole numbers"):
        convert.tokenizer_from_torch(tensors, config)


def test_layers_go_to_their_own_place():
    config = narrow(depth=3)
    tensors = tokenizer_tensors(config)
    name = "s1to2decoder.transformer.{}.linear1.weight"
    kernel = convert.tokenizer_from_torch(tensors, config)["params"]["decoder"]["layers"]["block"]
    kernel = kernel["mlp_in"]["kernel"]
    for layer in range(3):
        np.testing.assert_array_equal(kernel[layer], tensors[name.format(layer)].T)


def test_converted_parameters_do_not_share_memory_with_the_file():
    config = narrow()
    tensors = tokenizer_tensors(config)
    params = convert.tokenizer_from_torch(tensors, config)["params"]
    sources = list(tensors.values())
    for leaf in jax.tree.leaves(params):
        assert not any(np.may_share_memory(leaf, source) for source in sources)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(depth=3), r"'s2to1encoder\.transformer\.2\..*' is missing"),
        (dict(depth=1), r"'s2to1encoder\.transformer\.1\..*' of shape \[.*\] has no place"),
        (dict(layout="2d"), r"has no place"),
        (
            dict(codebook_size=128),
            r"'quantize\.embedding\.weight' has shape \[64, 8\].* needs \[128, 8\]",
        ),
        (dict(semantic_dim=0), r"distill_mlp.*has no place"),
    ],
)
def test_checkpoint_of_another_architecture_names_the_tensor(change, message):
    tensors = tokenizer_tensors(narrow())
    with pytest.raises(ValueError, match=message):
        convert.tokenizer_from_torch(tensors, narrow(**change))


def test_patchgan_comes_back_bit_for_bit():
    manifest = synth.manifest("patchgan")
    tensors = filled(manifest)
    for name in tensors:
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.array(12_345, np.int64)
    variables = convert.patchgan_from_torch(tensors)
    assert_identical(convert.patchgan_to_torch(variables), tensors)
    trained = {key: variables[key] for key in ("params", "batch_stats")}
    assert convert.patchgan_to_torch(trained).keys() == tensors.keys()


def test_dinov2_comes_back_bit_for_bit_but_for_the_mask_token():
    config = vit.ViTConfig(2, 2, 16, patch_size=4, grid=3)
    template = convert.shapes(vit.ViT(config), (1, 12, 12, 3))["params"]
    tensors = filled(layout.torch_shapes(names.dino(config), template))
    params = convert.dino_from_torch(tensors | {"mask_token": np.zeros((1, 16))}, config)
    assert_identical(convert.dino_to_torch(params, config), tensors)


def test_dinov2_has_exactly_the_published_tensors():
    config = vit.DINOV2["dinov2_vitb14"]
    template = convert.shapes(vit.ViT(config), (1, 518, 518, 3))["params"]
    shapes = layout.torch_shapes(names.dino(config), template)
    assert shapes | {"mask_token": (1, 768)} == synth.manifest("dinov2_vitb14")


def test_dino_has_exactly_the_published_tensors_and_comes_back_bit_for_bit():
    config = vit.DINO["dino_vits16"]
    tensors = filled(synth.manifest("dino_vits16"))
    params = convert.dino_from_torch(tensors, config)
    assert_identical(convert.dino_to_torch(params, config), tensors)


def test_heads_on_dino_come_back_bit_for_bit():
    tensors = filled(synth.manifest("dino_disc_heads"))
    variables = convert.dino_heads_from_torch(tensors)
    assert variables.keys() == {"params", "batch_stats"}
    assert_identical(convert.dino_heads_to_torch(variables), tensors)


def test_dinov2_with_registers_is_refused():
    config = vit.ViTConfig(2, 2, 16, patch_size=4, grid=3)
    with pytest.raises(ValueError, match="'register_tokens'"):
        convert.dino_from_torch({"register_tokens": np.zeros((1, 4, 16))}, config)


def test_lpips_comes_back_bit_for_bit():
    tensors = filled(synth.manifest("lpips_vgg16"))
    extra = {"scaling_layer.shift": np.zeros((1, 3, 1, 1)), "lins.0.model.1.weight": np.zeros(1)}
    params = convert.lpips_from_torch(tensors | extra)
    assert_identical(convert.lpips_to_torch(params), tensors)


def test_lpips_reads_torchvisions_vgg_and_the_linear_layers():
    tensors = filled(synth.manifest("lpips_vgg16"))
    published = {
        re.sub(r"^net\.slice\d\.", "features.", name): tensor for name, tensor in tensors.items()
    }
    published["classifier.0.weight"] = np.zeros((4, 4), np.float32)
    assert_identical(convert.lpips_to_torch(convert.lpips_from_torch(published)), tensors)


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


def test_pt_that_was_written_is_read_back_bit_for_bit(tmp_path, torch):
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


class Touch:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


def test_code_in_a_torch_file_is_not_run(tmp_path, torch):
    path, touched = tmp_path / "file.pt", tmp_path / "touched"
    torch.save({"model": {"w": torch.ones(2)}, "extra": Touch(touched)}, path)
    with pytest.raises(UserError, match=r"file\.pt: not a PyTorch checkpoint.*code of \S+"):
        torch_files.read(path)
    assert not touched.exists()


def one_line_error(path) -> str:
    with pytest.raises(UserError) as error:
        torch_files.read(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_checkpoints_are_refused_in_one_line(tmp_path, torch, suffix):
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
        assert "cut short" in one_line_error(path)


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
    with pytest.raises(UserError, match=r"cannot be written .No space left on device"):
        torch_files.write(path, {"w": np.ones(2, np.float32)})
    np.testing.assert_array_equal(torch_files.read(path)["w"], np.zeros(2))
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_suffix_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"out\.npz: expected a name that ends in"):
        torch_files.write(tmp_path / "new" / "out.npz", {"w": np.ones(2)})
    assert list(tmp_path.iterdir()) == []
