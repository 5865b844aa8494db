"""Networks whose features are compared: parity of Inception, and what features depend on."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import features
from gigatok_jax.models import inception
from gigatok_jax.weights import convert

import synth


@pytest.fixture(scope="module")
def extractor():
    return features.load("embedded")


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def test_inception_matches_reference():
    params = convert.from_torch("inception", synth.checkpoint("inception_fid"))["params"]
    inputs = np.clip(127.5 * synth.images(2) + 128, 0, 255).astype(np.uint8)

    @jax.jit
    def apply(params, inputs):
        return inception.Inception().apply({"params": params}, inception.preprocess(inputs))

    found, expected = apply(params, inputs), synth.expected("inception_fid.npz")
    spatial = found["spatial"].reshape(2, 17, 17, 7).transpose(0, 3, 1, 2)
    for name, value in (("pool", found["pool"]), ("logits", found["logits"]), ("spatial", spatial)):
        error = np.abs(value - expected[name]).max() / np.abs(expected[name]).max()
        assert error < 2e-4, name
    back = convert.to_torch("inception", {"params": params})
    for name, tensor in synth.checkpoint("inception_fid").items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_missing_inception_names_its_file_and_offers_a_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"pt_inception-.*\.pth.*--features=embedded"):
        features.load("inception")


def test_features_do_not_depend_on_the_batch(extractor):
    apart = np.concatenate([extractor(images(5)[i : i + 1])["pool"] for i in range(5)])
    np.testing.assert_allclose(extractor(images(5))["pool"], apart, atol=1e-5)


def test_features_do_not_depend_on_the_number_of_devices(extractor, tmp_path):
    script = """if True:
        import sys
        import jax, numpy as np
        from gigatok_jax.evaluation import features
        assert len(jax.devices()) == 4
        np.save(sys.argv[2], features.load("embedded")(np.load(sys.argv[1]))["pool"])
    """
    np.save(tmp_path / "images.npy", images(5))
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, tmp_path / "images.npy", tmp_path / "pool.npy"]
    subprocess.run(command, check=True, env=os.environ | devices)
    found = np.load(tmp_path / "pool.npy")
    np.testing.assert_allclose(found, extractor(images(5))["pool"], atol=1e-5)
