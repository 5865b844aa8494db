"""Linear probes: LARS, the head, what is probed, and runs."""

import dataclasses
import pathlib
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
import pytest

from gigatok_jax import api, bundles
from gigatok_jax import config as configs
from gigatok_jax.data import codes
from gigatok_jax.data.codes import CodesInfo
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.training import linear_probe, loop, optimizer
from gigatok_jax.training.linear_probe import LinearProbeRun, LinearProbeTask
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.task import LoopConfig
from gigatok_jax.training.telemetry import read_metrics

import tiny

TOKENIZER = tiny.config(image_size=16, latents=4, channel_multipliers=(1, 1), code_dim=8)
GENERATOR = GeneratorConfig(2, 2, 16, codes=4, codebook_size=64, classes=10)
DATA = DataConfig(source="embedded", length=64, eval_length=40)


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, str]:
    """Bundles of a tokenizer and a generator with random weights."""
    return tiny.save_networks(tmp_path_factory.mktemp("networks"), TOKENIZER, GENERATOR)


def run(networks, **fields) -> LinearProbeRun:
    defaults = {
        "data": DATA,
        # In so few steps LARS moves the head hardly at all.
        "optimizer": OptimizerConfig(rate=0.05, warmup_steps=2, weight_decay=0.0),
        "loop": LoopConfig(log_every=1, evaluate_every=0, checkpoint_every=4),
        "steps": 8,
        "batch_size": 16,
        "evaluation_images": 40,
    }
    return LinearProbeRun(**(defaults | networks | fields))


def test_lars_matches_a_plain_version():
    rng = np.random.default_rng(0)
    params = {"head": {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)}}
    config = OptimizerConfig(
        algorithm="lars", rate=0.5, final_rate=0.0, warmup_steps=5, weight_decay=0.01, clip=0.0
    )
    steps = 20
    lars = optimizer.make_optimizer(config, steps)
    ours = jax.tree.map(jnp.float32, params)
    state = lars.init(ours)
    plain = {name: value.copy() for name, value in params["head"].items()}
    momenta = {name: np.zeros_like(value) for name, value in plain.items()}
    for step in range(steps):
        gradients = {name: rng.normal(size=value.shape) for name, value in plain.items()}
        updates, state = lars.update(jax.tree.map(jnp.float32, {"head": gradients}), state, ours)
        ours = optax.apply_updates(ours, updates)

        if step < 5:
            rate = 0.5 * (0.01 + 0.99 * step / 5)
        else:
            rate = 0.5 * 0.5 * (1 + np.cos(np.pi * (step - 5) / (steps - 5)))
        for name, value in plain.items():
            update = gradients[name] + 0.01 * value
            if value.ndim > 1:  # biases are not scaled
                update *= 1e-3 * np.linalg.norm(value) / np.linalg.norm(update)
            momenta[name] = 0.9 * momenta[name] + update
            plain[name] = value - rate * momenta[name]
        for name, value in plain.items():
            np.testing.assert_allclose(ours["head"][name], value, rtol=1e-5, atol=1e-6)


def test_head_normalizes_features_without_gain_or_bias():
    features = np.random.default_rng(0).normal(3, 5, (64, 6)).astype(np.float32)
    module = linear_probe.LinearProbe(classes=4)
    variables = module.init(jax.random.key(0), features, train=True)
    assert set(variables["params"]) == {"head"}
    logits, updated = module.apply(variables, features, train=True, mutable=["batch_stats"])
    shifted, _ = module.apply(variables, 7 * features + 1, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(logits, shifted, atol=1e-5)
    stats = updated["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], 0.1 * features.mean(0), rtol=1e-4)
    expected = 0.9 + 0.1 * features.var(0, ddof=1)
    np.testing.assert_allclose(stats["var"], expected, rtol=1e-4)


def probed(networks, **fields):
    return run(networks, **fields).open_task().probed


def test_generator_features_are_those_of_its_middle_layer_without_a_class(networks):
    batch = {"image": np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)}
    found = probed(networks)
    tokenizer = api.load_tokenizer(networks["tokenizer"])
    generator = api.load_generator(networks["generator"])
    expected = generator.features(tokenizer.encode(batch["image"]), layer=1).mean(1)
    np.testing.assert_allclose(found.apply(found.frozen, batch), expected, atol=1e-5)
    assert found.description == "generator, output of layer 1 of 2, width 16"


@pytest.mark.parametrize(
    "features, description",
    [
        ("encoder", "encoder, output after the last LayerNorm, width 16"),
        ("latents", "latents before the quantizer, width 8"),
        ("decoder", "decoder, output of layer 1, width 16"),
    ],
)
def test_tokenizer_features_are_told_apart(networks, features, description):
    batch = {"image": np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)}
    found = probed(networks, features=features)
    tokenizer = api.load_tokenizer(networks["tokenizer"])
    images = batch["image"]
    expected = {
        "latents": lambda: tokenizer.latents(images),
        "decoder": lambda: tokenizer.decoder_features(tokenizer.encode(images), layer=1),
        "encoder": lambda: tokenizer.module.apply(
            tokenizer.variables, images / 127.5 - 1, method="encoder_features"
        ),
    }[features]()
    values = found.apply(found.frozen, batch)
    np.testing.assert_allclose(values, expected.mean(1), atol=1e-5)
    assert values.shape[1] == found.width
    assert found.description == description


def test_probe_beats_chance_goes_on_and_leaves_a_bundle(networks, tmp_path):
    rng = np.random.default_rng(0)
    for label, name in enumerate(("red", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            image = rng.integers(0, 120, (20, 20, 3), np.uint8)
            image[..., 2 * label] += 120
            Image.fromarray(image).save(tmp_path / "photos" / name / f"{i}.png")
    data = DataConfig(source="folder", path=str(tmp_path / "photos"), holdout=4)
    fields = {"data": data, "features": "latents", "evaluation_images": 10}
    workdir = tmp_path / "run"
    loop.train(run(networks, steps=20, **fields), workdir)
    loop.train(run(networks, steps=60, **fields), workdir)
    rows = read_metrics(workdir / "metrics.jsonl")
    assert rows[-1]["held_out/accuracy"] > 0.8  # chance: a half
    assert rows[-1]["held_out/top5_accuracy"] == 1  # of two
    # Killed between the last checkpoint and the end of its evaluation.
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:-1]))
    loop.train(run(networks, steps=60, **fields), workdir)
    assert read_metrics(workdir / "metrics.jsonl") == rows
    bundle = bundles.load(workdir, "linear_probe")
    assert bundle.made_by["step"] == 60
    assert bundle.made_by["features"] == "latents before the quantizer, width 8"


def test_probe_learns_nothing_of_shuffled_classes(networks, tmp_path):
    rng = np.random.default_rng(0)
    classes = rng.permutation(["a", "b"] * 40)
    for i, name in enumerate(classes):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 120, (20, 20, 3), np.uint8)
        image[..., i % 2] += 120
        Image.fromarray(image).save(tmp_path / "photos" / name / f"{i:02d}.png")
    data = DataConfig(source="folder", path=str(tmp_path / "photos"), holdout=4)
    fields = {"data": data, "features": "latents", "evaluation_images": 20, "steps": 60}
    loop.train(run(networks, **fields), tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["held_out/accuracy"] <= 0.7  # of 20; chance: a half


def test_features_in_parts_are_those_of_the_whole_batch(networks):
    found = probed(networks, features="latents")
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (6, 16, 16, 3), np.uint8),
        "label": np.arange(6, dtype=np.int32),
    }
    values = [
        LinearProbeTask(run(networks, batch_size=6, feature_batch_size=size), found)._features(
            found.frozen, batch
        )
        for size in (6, 2)
    ]
    np.testing.assert_allclose(values[0], values[1], atol=1e-5)


def test_rate_and_warmup_follow_the_batch():
    run = configs.load("probe:linear")
    found = run.resolved_optimizer
    assert (found.rate, found.warmup_steps) == (pytest.approx(6.4), 781)
    found = dataclasses.replace(run, batch_size=1_024).resolved_optimizer
    assert (found.rate, found.warmup_steps) == (pytest.approx(0.4), 12_500)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"feature_batch_size": 3, "batch_size": 8},
            r"^config\.feature_batch_size: expected a divisor",
        ),
        ({"layer": 3}, r"^config\.layer: expected 1 to 2, got 3$"),
        ({"features": "latents", "layer": 1}, r"^config\.layer: the latents features have no"),
        ({"tokenizer": ""}, r"^config\.tokenizer: expected"),
        ({"generator": ""}, r"^config\.generator: expected"),
        ({"features": "logits"}, r"^config\.features: expected 'generator'"),
    ],
)
def test_what_cannot_be_probed_is_refused(networks, tmp_path, fields, message):
    mapping = dataclasses.asdict(run(networks)) | fields
    with pytest.raises(UserError, match=message):
        loop.train(configs.from_mapping(LinearProbeRun, mapping), tmp_path)


def test_generator_of_another_tokenizer_is_refused(networks, tmp_path):
    weights = tiny.weights(TOKENIZER)
    weights["params"]["codebook"] = weights["params"]["codebook"] + 1
    other = pathlib.Path(tmp_path) / "other"
    bundles.save(other, "tokenizer", TOKENIZER, weights, {})
    with pytest.raises(UserError, match=r"other: expected tokenizer=\w+, as in the generator, got"):
        probed(networks, tokenizer=str(other))


@pytest.mark.parametrize("field, theirs", [("latents", 2), ("codebook_size", 48)])
@pytest.mark.parametrize("source", ["embedded", "codes"])
def test_codes_that_do_not_fit_the_generator_are_refused(
    networks, tmp_path, field, theirs, source, monkeypatch
):
    config = dataclasses.replace(TOKENIZER, **{field: theirs})
    other, data = tmp_path / "other", dataclasses.replace(DATA, source=source, path="codes")
    bundles.save(other, "tokenizer", config, tiny.weights(config), {})
    info = CodesInfo("0" * 16, config.latents, config.codebook_size, (), {}, (), 8)
    monkeypatch.setattr(codes, "STORE", mock.Mock(find_info=lambda path: info))
    name, ours = ("codes", 4) if field == "latents" else (field, 64)
    where = "codes" if source == "codes" else str(other)
    message = f"{where}: expected {name}={ours}, as in the generator's model.{name}, got {theirs}"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        probed(networks, tokenizer=str(other), data=data)
