"""TiTok: the numbers and checkpoints of the authors' program.

The arrays in `tests/data/baselines` are what it computed (float32, CPU) for the weights and the
first 256-pixel image of `synth`.
"""

import functools
import hashlib
import json
import math
import os
import pathlib

import jax
import numpy as np
import pytest

from gigatok_jax import bundles
from gigatok_jax.models import families, layers, titok
from gigatok_jax.models.titok import Titok, TitokConfig
from gigatok_jax.models.tokenizer import TransformerSize
from gigatok_jax.weights import convert, fetch, torch_files

import synth
import tiny

DATA = pathlib.Path(__file__).parent / "data"
# For each checkpoint: number of tensors and parameters, and the hash of its sorted lines
# "NAME SHAPE".
MANIFESTS = json.loads((DATA / "titok_manifests.json").read_text())
WHOLE = os.environ.get("PARITY") == "whole"  # see `test_parity`
TINY = TransformerSize(depth=1, heads=1, width=8)
NARROW = TitokConfig(TINY, TINY, latents=2, codebook_size=32, code_dim=4)


def close(actual, expected):
    """Within the agreement of two float32 programs."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 2e-4 * np.abs(expected).max()


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor, strict=True)


@pytest.mark.parametrize("name", MANIFESTS)
def test_titok_has_exactly_the_authors_tensors(name):
    shapes = tiny.torch_shapes("titok", titok.MODELS[name])
    assert sum(map(math.prod, shapes.values())) == MANIFESTS[name]["parameters"]
    assert len(shapes) == MANIFESTS[name]["tensors"]
    listing = "".join(sorted(f"{n} {list(shape)}\n" for n, shape in shapes.items()))
    assert hashlib.sha256(listing.encode()).hexdigest() == MANIFESTS[name]["sha256"]


@pytest.mark.parametrize("name", ["titok_s128", *["titok_bl64_vq8k"] * WHOLE])
def test_titok_computes_what_the_authors_program_does(name):
    config, expected = titok.MODELS[name], np.load(DATA / "baselines" / f"{name}.npz")
    shapes = tiny.torch_shapes("titok", config)
    tensors = {name: synth.tensor(name, shape) for name, shape in shapes.items()}
    variables = convert.from_torch("titok", tensors, config)
    assert_same_tensors(convert.to_torch("titok", variables, config), tensors)
    model = Titok(config)

    @jax.jit
    def encode(variables, images):
        def run(module, images):
            z = module.latents(images)
            return z, module.quantizer.encode(z)

        kept = {"capture_intermediates": lambda module, _: isinstance(module, layers.Transformer)}
        outputs, found = model.apply(
            variables, images, method=run, **kept, mutable=["intermediates"]
        )
        ((sequence, _),) = found["intermediates"]["encoder"]["layers"]["__call__"]
        return *outputs, sequence

    latents, codes, sequence = encode(variables, synth.images(1))
    close(sequence[:, ::16, ::16], expected["encoder_sequence"])
    close(latents, expected["latents"][:, :, 0].swapaxes(1, 2))
    decided = expected["margin"] >= 1e-4  # by more than rounding
    np.testing.assert_array_equal(codes[decided], expected["indices"][decided])

    @jax.jit
    def decode(variables, codes):
        def run(module, codes):
            logits = module.proxy_logits(codes) if config.two_stage else None
            return module.decode(codes), logits

        return model.apply(variables, codes, method=run)

    images, logits = decode(variables, expected["random_indices"])
    images = (images + 1) / 2  # the authors' are in [0, 1]
    close(images.transpose(0, 3, 1, 2)[:, :, ::8, ::8], expected["random_reconstruction"])
    if config.two_stage:
        logits = logits.swapaxes(1, 2).reshape(1, 1024, 16, 16)
        close(logits[:, ::16, ::4, ::4], expected["random_proxy_logits"])


def test_patch_is_read_by_rows_then_columns_then_colors():
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), families.param_shapes(NARROW))
    patch = np.random.default_rng(0).uniform(size=(16, 16, 3)).astype(np.float32)
    params["patch_out"]["bias"] = patch.reshape(-1)
    params["conv_out"]["kernel"][1, 1] = np.eye(3)
    codes = np.zeros((1, 2), np.int32)
    decode = jax.jit(functools.partial(Titok(NARROW).apply, method=Titok.decode))
    images = decode({"params": params}, codes)
    np.testing.assert_allclose(images[0], 2 * np.tile(patch, (16, 16, 1)) - 1, atol=1e-6)


def test_reconstruction_is_the_decoded_codes():
    variables = {"params": tiny.fill(families.param_shapes(NARROW))}
    images = tiny.images(2, size=256)

    @jax.jit
    def run(variables, images):
        apply = functools.partial(Titok(NARROW).apply, variables)
        codes = apply(images, method=Titok.encode)
        return codes, apply(codes, method=Titok.decode), apply(images)

    codes, decoded, reconstruction = run(variables, images)
    assert codes.shape == (2, 2) and codes.dtype == np.int32
    assert decoded.shape == images.shape and decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, reconstruction)


def test_titok_becomes_a_bundle_and_returns_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setitem(titok.MODELS, "narrow", NARROW)
    tensors = tiny.numbered(tiny.torch_shapes("titok", NARROW))
    file, directory = tmp_path / "model.safetensors", tmp_path / "bundle"
    torch_files.write(file, tensors)
    convert.to_bundle("titok", [file], directory, model="narrow")
    bundle = bundles.load(directory, "titok", TitokConfig)
    assert bundle.config == NARROW
    assert_same_tensors(convert.to_torch("titok", bundle.weights, NARROW), tensors)


def test_published_titoks_are_of_known_architectures():
    published = {n: p for n, p in fetch.PUBLISHED.items() if p.kind == "titok"}
    assert published.keys() == titok.MODELS.keys()
    for name, entry in published.items():
        assert entry.model == name and entry.figure.startswith("rFID ")
        assert name in entry.files[0].url and name in entry.files[0].name


def test_only_256_pixels_are_possible():
    with pytest.raises(ValueError, match=r"^image_size: expected 256, got 512"):
        TitokConfig(TINY, TINY, 2, image_size=512)
