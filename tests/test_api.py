"""The Python interface to tokenizers."""

import types

import jax
import numpy as np
import pytest

import gigatok_jax as gt
from gigatok_jax import bundles, recipes
from gigatok_jax.errors import UserError
from gigatok_jax.models import quantizer
from gigatok_jax.models.generator import GeneratorConfig, param_shapes
from gigatok_jax.weights import convert, torch_files

import synth
import tiny


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run") / "bundle"
    config = tiny.config()
    weights = tiny.weights(config)
    weights["history"] = np.array(quantizer.update_history(weights["history"], np.arange(16)))
    bundles.save(directory, "tokenizer", config, weights, {})
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory):
    return gt.load_tokenizer(directory)


@pytest.fixture(scope="module")
def codes(tokenizer):
    return tokenizer.encode(tiny.images(2))


def test_bundle_of_a_workdir_is_found(directory, tokenizer):
    assert tokenizer.config == gt.load_tokenizer(directory.parent).config == tiny.config()


def test_bytes_and_floats_encode_alike(tokenizer):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    codes = tokenizer.encode(pixels)
    assert (codes.shape, codes.dtype) == ((2, 16), np.int32)
    assert len(np.unique(codes)) > 1
    np.testing.assert_array_equal(codes, tokenizer.encode((pixels / 127.5 - 1).astype("f4")))


def test_codes_are_the_nearest_to_the_latents(tokenizer, codes):
    latents = np.asarray(tokenizer.latents(tiny.images(2)))
    assert (latents.shape, latents.dtype) == ((2, 16, 8), np.float32)
    codebook = np.asarray(tokenizer.variables["params"]["codebook"])
    codebook = codebook / np.linalg.norm(codebook, axis=-1, keepdims=True)
    np.testing.assert_array_equal((latents @ codebook.T).argmax(-1), codes)


def test_codes_decode_to_images_and_features(tokenizer, codes):
    images = tokenizer.decode(codes)
    assert (images.shape, images.dtype) == ((2, 32, 32, 3), np.float32)
    first, last = (tokenizer.decoder_features(codes, layer=layer) for layer in (1, 2))
    assert first.shape == last.shape == (2, 64, 16)
    assert not np.allclose(first, last)
    semantic = tokenizer.semantic_features(codes)
    assert (semantic.shape, semantic.dtype) == ((2, 64, 12), np.float32)
    projector = tokenizer.variables["params"]["projector"]
    x = np.asarray(first)  # of the semantic layer
    for name in ("in", "hidden", "out"):
        x = x @ np.asarray(projector[name]["kernel"]) + np.asarray(projector[name]["bias"])
        x = x / (1 + np.exp(-x)) if name != "out" else x
    np.testing.assert_allclose(semantic, x, atol=1e-4)


def test_each_image_is_encoded_by_itself(tokenizer, codes):
    np.testing.assert_array_equal(tokenizer.encode(tiny.images(2)[::-1]), codes[::-1])


def test_usage_is_that_of_training(tokenizer):
    assert tokenizer.codebook_usage() == 16 / 64


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 16, 16, 3), (1, 3, 32, 32), (1, 32, 32, 1)])
def test_images_of_another_shape_are_rejected(tokenizer, shape):
    for function in (tokenizer.encode, tokenizer.latents):
        with pytest.raises(ValueError) as error:
            function(np.zeros(shape, np.float32))
        assert str(error.value) == f"images: expected [B, 32, 32, 3], got {list(shape)}"


@pytest.mark.parametrize("shape", [(16,), (1, 15), (1, 4, 4)])
def test_codes_of_another_shape_are_rejected(tokenizer, shape):
    for function in (tokenizer.decode, tokenizer.semantic_features):
        with pytest.raises(ValueError) as error:
            function(np.zeros(shape, np.int32))
        assert str(error.value) == f"codes: expected [B, 16], got {list(shape)}"


@pytest.mark.parametrize("layer", [0, 3, 1.5, 1.0, "1", None])
def test_unknown_layer_is_rejected(tokenizer, codes, layer):
    with pytest.raises(ValueError, match=rf"^layer: expected 1\.\.2, got {layer}"):
        tokenizer.decoder_features(codes, layer=layer)


def test_tokenizer_without_a_teacher_has_no_semantic_features():
    config = tiny.config(semantic_dim=0)
    tokenizer = gt.api.PretrainedTokenizer(config, tiny.weights(config))
    with pytest.raises(ValueError, match="has no projector"):
        tokenizer.semantic_features(np.zeros((1, 16), np.int32))


def test_parameter_counts_equal_the_reference():
    counts = synth.expected("parameter_counts.json")
    for name in ("s_s", "b_l", "b_l_2d"):
        assert gt.parameter_count(name) == counts[f"tokenizer_{name}"], name


@pytest.mark.parametrize("name", ["b_xl", "generator_b:b", "tokenizer_b_l"])
def test_unknown_model_has_no_parameter_count(name):
    with pytest.raises(UserError, match=f"^'{name}': no such"):
        gt.parameter_count(name)


def test_checkpoint_loads_alike_from_tensors_and_from_a_file(tmp_path, monkeypatch):
    config = tiny.config()
    monkeypatch.setitem(recipes.TOKENIZERS, "small", types.SimpleNamespace(model=config))
    weights = tiny.weights(config)
    tensors = convert.to_torch("tokenizer", weights, config)
    path = tmp_path / "checkpoint.safetensors"
    torch_files.write(path, tensors)
    one, other = gt.tokenizer_from_torch(tensors, "small"), gt.tokenizer_from_torch(path, "small")
    jax.tree.map(np.testing.assert_array_equal, one.variables["params"], weights["params"])
    codes = one.encode(tiny.images(2))
    assert len(np.unique(codes)) > 1
    np.testing.assert_array_equal(other.encode(tiny.images(2)), codes)


def test_checkpoint_of_another_architecture_is_rejected(monkeypatch):
    tensors = convert.to_torch("tokenizer", tiny.weights(tiny.config()), tiny.config())
    other = types.SimpleNamespace(model=tiny.config(z_channels=16))
    monkeypatch.setitem(recipes.TOKENIZERS, "small", other)
    with pytest.raises(ValueError, match=r"^tensor '"):
        gt.tokenizer_from_torch(tensors, "small")


def test_arrays_of_another_type_are_rejected(tokenizer):
    for images, message in (
        (
            np.zeros((1, 32, 32, 3), bool),
            r"images: expected floats in \[-1, 1\] or integers in 0..255, got bool",
        ),
        (np.full((1, 32, 32, 3), 256), r"images: expected integers in 0..255, got 256"),
        (np.full((1, 32, 32, 3), 200.0), r"images: expected floats in \[-1, 1\], .*, got 200.0"),
        (np.full((1, 32, 32, 3), np.nan), r"images: expected floats in \[-1, 1\], .*, got nan"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"images: expected \[B, 32, 32, 3\], got \[0, .*"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            tokenizer.encode(images)
    for codes, message in (
        (np.zeros((1, 16), np.float32), "codes: expected integers, got float32"),
        (np.full((1, 16), 64), r"codes: expected 0..63, got 64"),
        (np.full((1, 16), -1), r"codes: expected 0..63, got -1"),
        (np.full((1, 16), 2**40), r"codes: expected 0..63, got 1099511627776"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            tokenizer.decode(codes)


def test_tensors_of_pytorch_are_arrays(tokenizer, codes):
    torch = pytest.importorskip("torch")
    images = tiny.images(2)
    np.testing.assert_array_equal(tokenizer.encode(torch.from_numpy(images)), codes)
    pixels = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    for kind in (torch.uint8, torch.int64):
        encoded = tokenizer.encode(torch.from_numpy(pixels).to(kind))
        np.testing.assert_array_equal(encoded, tokenizer.encode(pixels))
    decoded = tokenizer.decode(torch.from_numpy(np.array(codes)))
    np.testing.assert_array_equal(decoded, tokenizer.decode(codes))
    shape = (2, 32, 32, 3)
    for bad, message in (
        (torch.zeros(shape, dtype=torch.bfloat16), "images: expected an array, got a Tensor"),
        (torch.zeros(shape, device="meta"), "images: expected an array, got a Tensor"),
        (torch.zeros(2, 3, 32, 32), r"images: expected \[B, 32, 32, 3\], got \[2, 3, 32, 32\]"),
        (torch.zeros(shape, dtype=torch.bool), "images: .* or integers in 0..255, got bool"),
        ([[1], [2, 3]], "images: expected an array, got a list"),
        (None, r"images: expected \[B, 32, 32, 3\], got \[\]"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            tokenizer.encode(bad)


@pytest.fixture(scope="module")
def generator():
    config = GeneratorConfig(1, 2, 16, codes=4, codebook_size=64, classes=3)
    weights = {"params": tiny.fill(param_shapes(config))}
    return gt.api.PretrainedGenerator(config, weights, made_by={"run": {"class_dropout": 0.0}})


@pytest.mark.parametrize("key", [None, 0, "0", np.zeros(3, np.float32), np.zeros(3, np.uint32)])
def test_other_values_than_random_keys_are_rejected(generator, key):
    with pytest.raises(ValueError, match=r"^key: expected jax\.random\.key"):
        generator.sample([0], key)


def test_sampling_warns_once_of_guidance_by_an_untrained_class(generator, caplog):
    for guidance in (1.0, 2.0, 2.0):
        generator.sample([0], jax.random.key(0), guidance=guidance)
    (record,) = caplog.records
    assert record.getMessage().startswith("guidance compares with the null class")


def test_accelerator_that_is_not_there_is_named(directory, monkeypatch):
    def missing():
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(jax, "default_backend", missing)
    tensors = convert.to_torch("tokenizer", tiny.weights(tiny.config()), tiny.config())
    for load in (
        lambda: gt.load_tokenizer(directory),
        lambda: gt.tokenizer_from_torch(tensors, "b_l"),
    ):
        with pytest.raises(UserError, match=r"^JAX_PLATFORMS=cuda: JAX finds no cuda device"):
            load()


def test_integers_of_any_type_are_pixels(tokenizer):
    images = np.arange(32 * 32 * 3).reshape(1, 32, 32, 3) % 256
    expected = tokenizer.encode(images.astype(np.uint8))
    for other in (images, images.astype(np.uint16), images.tolist()):
        np.testing.assert_array_equal(tokenizer.encode(other), expected)
