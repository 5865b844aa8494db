"""Other published tokenizers: the numbers and checkpoints of their authors' programs.

The arrays in `tests/data/baselines` are what those programs computed (float32, CPU) for the weights
and the 64-pixel images of `synth`.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib

import jax
import numpy as np
import pytest

from gigatok_jax import bundles
from gigatok_jax.models import families, vqgan
from gigatok_jax.models.vqgan import Vqgan, VqganConfig
from gigatok_jax.weights import convert, fetch, names

import synth
import tiny

DATA = pathlib.Path(__file__).parent / "data"
# For each checkpoint, without LlamaGen's usage buffer: number of tensors and parameters, and the
# hash of its sorted lines "NAME SHAPE".
MANIFESTS = json.loads((DATA / "vqgan_manifests.json").read_text())
# What is small in every width, of each family and quantizer.
NARROW = {"base_channels": 32, "channel_multipliers": (1, 2), "image_size": 16, "z_channels": 8}
NARROW |= {"residual_blocks": 1, "codebook_size": 256, "code_dim": 8}
KINDS = [
    ("llamagen", "vq"),
    ("taming", "vq"),
    ("taming", "ibq"),
    ("maskgit", "vq"),
    ("open_magvit2", "lfq"),
]


def close(actual, expected):
    """Within the agreement of two float32 programs."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 2e-4 * np.abs(expected).max()


def narrow(family="llamagen", quantizer="vq", **changes) -> VqganConfig:
    return VqganConfig(family, quantizer, **(NARROW | changes))


@pytest.mark.parametrize("name", MANIFESTS)
def test_vqgan_has_exactly_the_authors_tensors(name):
    config = vqgan.MODELS[name]
    shapes = tiny.torch_shapes("vqgan", config)
    assert sum(map(math.prod, shapes.values())) == MANIFESTS[name]["parameters"]
    assert len(shapes) == MANIFESTS[name]["tensors"]
    listing = "".join(sorted(f"{n} {list(shape)}\n" for n, shape in shapes.items()))
    assert hashlib.sha256(listing.encode()).hexdigest() == MANIFESTS[name]["sha256"]


@pytest.mark.parametrize(
    "name",
    [
        "llamagen_vq16",
        "llamagen_vq8",
        "taming_f16_1024",
        "ibq_16384",
        "maskgit_vqgan",
        "open_magvit2_256",
    ],
)
def test_vqgan_computes_what_the_authors_program_does(name):
    expected = np.load(DATA / "baselines" / f"{name}_64.npz")
    config = dataclasses.replace(vqgan.MODELS[name], image_size=64)
    shapes = tiny.torch_shapes("vqgan", config)
    tensors = {name: synth.tensor(name, shape) for name, shape in shapes.items()}
    variables = convert.from_torch("vqgan", tensors, config)

    def encode(module, images):
        z = module.latents(images)
        return z, module.choose(z)

    @functools.partial(jax.jit, static_argnums=2)
    def run(variables, x, method):
        return Vqgan(config).apply(variables, x, method=method)

    latents, codes = run(variables, synth.images(2, size=64), encode)
    reconstruction = run(variables, expected["indices"], Vqgan.decode)
    channels_last = expected["latents"].transpose(0, 2, 3, 1)
    close(latents, channels_last.reshape(2, config.latents, config.code_dim))
    decided = expected["margin"] >= 1e-4  # by more than rounding
    np.testing.assert_array_equal(codes[decided], expected["indices"][decided])
    if name == "maskgit_vqgan":  # the authors' images are in [0, 1]
        reconstruction = (reconstruction + 1) / 2
    close(reconstruction.transpose(0, 3, 1, 2)[:, :, ::4, ::4], expected["reconstruction"])


@pytest.mark.parametrize("family, quantizer", KINDS)
def test_reconstruction_is_the_decoded_codes(family, quantizer):
    config = narrow(family, quantizer)
    model, images = Vqgan(config), tiny.images(2, config.image_size)
    variables = {"params": tiny.fill(families.param_shapes(config))}

    @jax.jit
    def run(variables, images):
        codes = model.apply(variables, images, method=Vqgan.encode)
        decoded = model.apply(variables, codes, method=Vqgan.decode)
        return codes, decoded, model.apply(variables, images)

    codes, decoded, reconstruction = run(variables, images)
    assert codes.shape == (2, config.latents) and codes.dtype == np.int32
    assert np.all((codes >= 0) & (codes < config.codebook_size))
    assert decoded.shape == images.shape and decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, reconstruction)


@pytest.mark.parametrize("family, quantizer", KINDS)
def test_vqgan_returns_bit_for_bit(family, quantizer):
    config = narrow(family, quantizer)
    tensors = tiny.numbered(tiny.torch_shapes("vqgan", config))
    weights = convert.from_torch("vqgan", tensors, config)
    back = convert.to_torch("vqgan", weights, config)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, strict=True)


def released(torch, tensors, case):
    """`tensors` as the authors' file of one `case` holds them."""
    tensors = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    losses = {"loss.discriminator.main.0.weight": torch.ones(2, 2)}
    averages = {f"model_ema.{name.replace('.', '')}": t for name, t in tensors.items()}
    counts = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(5)}
    usage = {names.USAGE: torch.zeros(65_536)}
    return {
        "bare": tensors,
        "llamagen": {"model": tensors | usage, "optimizer": {}, "steps": 7},
        "llamagen with ema": {"model": other | usage, "ema": tensors | usage},
        "taming": {"state_dict": tensors | losses, "epoch": 3},
        "ibq": {"state_dict": other | losses | averages | counts, "epoch": 3},
    }[case]


@pytest.mark.parametrize("case", ["bare", "llamagen", "llamagen with ema", "taming", "ibq"])
def test_released_files_become_bundles(tmp_path, monkeypatch, case):
    torch = pytest.importorskip("torch")
    family = case.split()[0] if case.startswith("llamagen") else "taming"
    config = narrow(family)
    monkeypatch.setitem(vqgan.MODELS, "narrow", config)
    tensors = tiny.numbered(tiny.torch_shapes("vqgan", config))
    file, directory = tmp_path / "last.ckpt", tmp_path / "bundle"
    torch.save(released(torch, tensors, case), file)
    convert.to_bundle("vqgan", [file], directory, model="narrow")
    bundle = bundles.load(directory, "vqgan", VqganConfig)
    assert bundle.config == config
    back = convert.to_torch("vqgan", bundle.weights, config)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, strict=True)


def test_tensor_of_another_architecture_is_named():
    tensors = tiny.numbered(tiny.torch_shapes("vqgan", narrow("taming")))
    with pytest.raises(ValueError, match=r"'encoder\.conv_in\.bias' of shape \[32\] does not"):
        convert.from_torch("vqgan", tensors, narrow("maskgit"))


def test_published_vqgans_are_of_known_architectures():
    published = {n: p for n, p in fetch.PUBLISHED.items() if p.kind == "vqgan"}
    assert published.keys() == {n for n in vqgan.MODELS if not n.startswith("taming")}
    for name, entry in published.items():
        assert entry.model == name and entry.figure.startswith("rFID ")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image_size": 15}, "image_size: expected a multiple of 2"),
        ({"family": "maskgit", "code_dim": 4}, "code_dim: expected z_channels=8"),
        ({"quantizer": "lfq", "codebook_size": 100}, "codebook_size: expected 2**code_dim=256"),
        ({"quantizer": "ibq", "normalize_codes": True}, "normalize_codes: expected False"),
        ({"family": "vqvae"}, "family: expected"),
    ],
)
def test_impossible_config_is_refused(wrong, message):
    with pytest.raises(ValueError) as error:
        narrow(**wrong)
    assert str(error.value).startswith(message)
