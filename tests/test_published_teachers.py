"""CLIP and SigLIP: features as published, weights there and back, and their use in training.

`data/teachers.npz` holds what open_clip 3.3.0 and transformers 5.24.0 computed (float32, CPU) with
the weights of `synth`; `data/teacher_manifests.json` describes their models of the real size.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re

import chex
import jax
import numpy as np
import pytest

from gigatok_jax import bundles, frozen_networks
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import features
from gigatok_jax.models import vit
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.tokenizer import ObjectiveConfig, TokenizerRun
from gigatok_jax.weights import convert, fetch, torch_files

import synth
import tiny

DATA = pathlib.Path(__file__).parent / "data"
NAMES = {"clip": "clip_dfn_vitl14", "siglip": "siglip_so400m14"}
SMALL = {"depth": 3, "heads": 3, "width": 48, "patch_size": 4, "grid": 5}
CONFIGS = {
    "clip": dataclasses.replace(vit.PUBLISHED[NAMES["clip"]], **SMALL),
    "siglip": dataclasses.replace(vit.PUBLISHED[NAMES["siglip"]], **SMALL, mlp_width=80),
}
# What the files hold beside the vision tower.
DROPPED = {
    "clip": ("visual.proj", "positional_embedding", "transformer.resblocks.0.ln_1.weight"),
    "siglip": ("vision_model.head.probe", "text_model.head.weight", "logit_bias"),
}
families = pytest.mark.parametrize("family", CONFIGS)


def checkpoint(family: str) -> dict[str, np.ndarray]:
    tower = tiny.torch_shapes(family, CONFIGS[family])
    return {name: synth.tensor(name, shape) for name, shape in tower.items()}


@functools.cache
def parameters(family: str) -> dict:
    return convert.from_torch(family, checkpoint(family), CONFIGS[family])["params"]


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """Small teachers where `weights fetch` would have put the published ones."""
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path))
    for family, name in NAMES.items():
        weights = {"params": parameters(family)}
        bundles.save(fetch.bundle_path(name), family, CONFIGS[family], weights, {})


def tokens(config: vit.ViTConfig, params: dict) -> tuple[np.ndarray, np.ndarray]:
    """Class token and patch tokens of images of another size than the teacher's 20 pixels.

    They are faint, so that the norms' epsilon counts.
    """
    images = vit.preprocess(synth.images(2, size=24) / 10, config, config.grid)
    return vit.ViT(config).apply({"params": params}, images)[:2]


def distance(actual, expected) -> float:
    """Largest difference, as a share of the largest magnitude."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


@families
def test_features_are_those_of_the_published_implementation(family):
    expected = np.load(DATA / "teachers.npz")
    class_token, patch_tokens = tokens(CONFIGS[family], parameters(family))
    assert distance(patch_tokens, expected[f"{family}_patch_tokens"]) < 1e-5
    if family == "clip":
        assert distance(class_token, expected["clip_class_token"]) < 1e-5


@pytest.mark.parametrize(
    "family, change",
    [
        ("clip", {"activation": "gelu"}),
        ("clip", {"epsilon": 1e-6}),
        ("clip", {"std": vit.IMAGENET_STD}),
        ("siglip", {"activation": "gelu"}),
        ("siglip", {"epsilon": 1e-5}),
        ("siglip", {"mean": vit.IMAGENET_MEAN}),
    ],
)
def test_features_depend_on_every_setting(family, change):
    expected = np.load(DATA / "teachers.npz")[f"{family}_patch_tokens"]
    config = dataclasses.replace(CONFIGS[family], **change)
    assert distance(tokens(config, parameters(family))[1], expected) > 2e-5


@families
def test_real_size_has_exactly_the_published_tensors(family):
    expected = json.loads((DATA / "teacher_manifests.json").read_text())[NAMES[family]]
    tower = tiny.torch_shapes(family, vit.PUBLISHED[NAMES[family]])
    listing = "".join(sorted(f"{name} {list(shape)}\n" for name, shape in tower.items()))
    assert len(tower) == expected["tensors"]
    assert sum(map(math.prod, tower.values())) == expected["parameters"]
    assert hashlib.sha256(listing.encode()).hexdigest() == expected["sha256"]


@families
def test_vision_tower_returns_bit_for_bit_through_files(tmp_path, monkeypatch, family):
    monkeypatch.setitem(vit.FAMILIES[family], "small", CONFIGS[family])
    first, second = tmp_path / "published.safetensors", tmp_path / "back.safetensors"
    expected = checkpoint(family)
    dropped = {name: np.ones((2, 3), np.float32) for name in DROPPED[family]}
    torch_files.write(first, expected | dropped)
    convert.to_bundle(family, [first], tmp_path / "bundle", model="small")
    convert.to_file(family, tmp_path / "bundle", second)
    actual = torch_files.read(second)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(actual[name], tensor, strict=True)


@pytest.mark.parametrize(
    "family, extra, message",
    [
        ("clip", "visual.transformer.resblocks.0.ls_1.gamma", "does not belong"),
        ("clip", "visual.transformer.resblocks.3.ln_1.weight", "does not belong"),
        ("siglip", "vision_model.encoder.layers.3.layer_norm1.weight", "does not belong"),
        ("siglip", "vision_model.embeddings.class_embedding", "does not belong"),
    ],
)
def test_tower_of_another_architecture_names_the_tensor(family, extra, message):
    tensors = checkpoint(family) | {extra: np.ones(48, np.float32)}
    with pytest.raises(ValueError, match=f"'{extra}'.*{message}"):
        convert.from_torch(family, tensors, CONFIGS[family])


def test_file_of_one_family_is_not_taken_for_another():
    with pytest.raises(ValueError, match=r"'vision_model\..*' is missing"):
        convert.from_torch("siglip", checkpoint("clip"), CONFIGS["siglip"])
    with pytest.raises(ValueError, match=r"'visual\.class_embedding' is missing"):
        convert.from_torch("clip", checkpoint("siglip"), CONFIGS["clip"])


def test_unknown_activation_is_rejected():
    with pytest.raises(ValueError, match=r"^activation: expected 'gelu', .*got 'relu'"):
        dataclasses.replace(CONFIGS["clip"], activation="relu")


def test_positions_are_resized_with_and_without_a_class_token():
    table = np.random.default_rng(0).normal(size=(1 + 16 * 16, 8)).astype(np.float32)
    resized = vit.resize_positions(table, 12)
    assert resized.shape == (1 + 12 * 12, 8)
    np.testing.assert_array_equal(resized[0], table[0])
    np.testing.assert_array_equal(resized[1:], vit.resize_positions(table[1:], 12))
    np.testing.assert_array_equal(vit.resize_positions(table[1:], 16), table[1:])


@families
def test_teacher_that_cannot_be_fetched_names_its_files(tmp_path, monkeypatch, family):
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path))
    (file,) = fetch.PUBLISHED[NAMES[family]].files
    with pytest.raises(UserError, match=re.escape(file.name)):
        frozen_networks.load_teacher(NAMES[family])


@families
def test_teacher_is_loaded_by_name_and_by_directory(fetched, family):
    for name in (NAMES[family], str(fetch.bundle_path(NAMES[family]))):
        config, params = frozen_networks.load_teacher(name)
        assert config == CONFIGS[family]
        chex.assert_trees_all_equal(params, parameters(family))


def test_bundle_of_a_tokenizer_is_no_teacher(tmp_path):
    config = tiny.config()
    bundles.save(tmp_path / "bundle", "tokenizer", config, tiny.weights(config), {})
    with pytest.raises(UserError, match="holds a tokenizer, expected a dinov2 or clip or siglip"):
        frozen_networks.load_teacher(str(tmp_path / "bundle"))


@families
def test_distance_of_its_features_is_not_named_after_dinov2(fetched, family):
    extractor = features.load(NAMES[family])
    assert extractor.distance == "fd_teacher"
    assert extractor(np.zeros((2, 32, 32, 3), np.uint8))["pool"].shape == (2, 48)


def run(family: str, semantic_dim: int) -> TokenizerRun:
    """A tokenizer of an 8x8 grid, not the teacher's 5x5, with perception by the teacher too."""
    return TokenizerRun(
        model=tiny.config(semantic_dim=semantic_dim),
        objective=ObjectiveConfig(
            teacher=NAMES[family],
            perceptual_distance="teacher",
            discriminator_channels=(4, 8),
        ),
        data=DataConfig(source="embedded", length=8, eval_length=8),
        optimizer=OptimizerConfig(warmup_steps=0),
        batch_size=2,
    )


@families
def test_tokenizer_training_step_takes_it_as_teacher(fetched, family):
    task = run(family, 48).open_task()
    rows = 64 + CONFIGS[family].class_token
    assert task.frozen.teacher["positions"].shape == (rows, 48)
    state = jax.eval_shape(task.init, jax.random.key(0))
    batch = {"image": jax.ShapeDtypeStruct((2, 32, 32, 3), np.uint8)}
    step = functools.partial(task.step, phase=task.phase(0))
    _, metrics = jax.eval_shape(step, state, batch, task.frozen)
    assert {"semantic", "perceptual"} <= metrics.keys()


@families
def test_semantic_dim_must_be_the_teachers_width(fetched, family):
    with pytest.raises(UserError, match=rf"semantic_dim: expected 48, .*{NAMES[family]}, got 12"):
        run(family, 12).open_task()
