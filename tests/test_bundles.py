"""Bundles: what is saved is loaded, and what is none is refused in one line."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import bundles
from gigatok_jax.errors import UserError
from gigatok_jax.models.tokenizer import TransformerSize


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {
        "params": {"dense": {"kernel": rng.standard_normal((40, 50), dtype=np.float32)}},
        "half": jnp.asarray(rng.standard_normal(3), jnp.bfloat16),
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
    jax.tree.map(np.testing.assert_array_equal, loaded.weights, weights)
    types = jax.tree.map(lambda x: x.dtype, weights)
    assert jax.tree.map(lambda x: x.dtype, loaded.weights) == types


def test_new_bundle_replaces_the_old(bundle):
    bundles.save(bundle, "other", None, {"x": np.ones(2)}, {})
    loaded = bundles.load(bundle, "other")
    assert loaded.config == {} and loaded.weights.keys() == {"x"}
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_failed_save_leaves_the_old_bundle(bundle, weights):
    with pytest.raises(TypeError):
        bundles.save(bundle, "thing", None, weights, {"not": object()})
    assert bundles.load(bundle, "thing").made_by == {"step": 7}
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_another_kind_is_refused(bundle):
    assert refusal(bundle, "teacher") == f"{bundle}: holds a thing, expected a teacher"


def test_directory_without_a_bundle_is_refused(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        assert refusal(directory) == f"{directory}: not a bundle, it has no config.json"


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "config.json: not JSON"),
        ("", "config.json: not JSON"),
        ("[1]", "config.json: not a bundle's description"),
        ('{"format": 99, "kind": "thing"}', "config.json: not a bundle's description"),
    ],
)
def test_broken_description_is_refused(bundle, content, message):
    (bundle / "config.json").write_text(content)
    assert refusal(bundle).startswith(f"{bundle}/{message}")


@pytest.mark.parametrize("key", ["kind", "config", "made_by"])
def test_description_that_lacks_a_part_is_refused(bundle, key):
    record = json.loads((bundle / "config.json").read_text())
    del record[key]
    (bundle / "config.json").write_text(json.dumps(record))
    assert re.match(f"{bundle}/config.json: .*", refusal(bundle))


@pytest.mark.parametrize("damage", ["removed", "emptied", "cut short"])
def test_damaged_weights_are_refused(bundle, damage):
    files = [path for path in (bundle / "weights").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    if damage == "removed":
        largest.unlink()
    else:
        kept = 0 if damage == "emptied" else largest.stat().st_size // 2
        largest.write_bytes(largest.read_bytes()[:kept])
    assert refusal(bundle).startswith(f"{bundle}/weights: unreadable weights (")


def test_missing_weights_are_refused(bundle):
    (bundle / "weights").rename(bundle / "elsewhere")
    assert refusal(bundle).startswith(f"{bundle}/weights: unreadable weights (")
