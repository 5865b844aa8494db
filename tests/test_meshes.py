"""Training is the same on any mesh, and `fsdp` divides all that is large."""

import json
import pathlib
import re
import subprocess
import sys
from unittest import mock

import jax
from jax.sharding import AbstractMesh, AxisType
import pytest

from gigatok_jax import recipes, sharding
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training import loop
from gigatok_jax.training.generator import GeneratorRun, GeneratorTask
from gigatok_jax.training.tokenizer import TokenizerRun, TokenizerTask

WORKER = pathlib.Path(__file__).parent / "mesh_worker.py"
AGREEMENT = 1e-5


@pytest.mark.parametrize("task", ["tokenizer", "generator"])
def test_ten_steps_are_the_same_on_any_mesh(task, tmp_path):
    # `python tests/mesh_worker.py OUT.json tokenizer all` has more meshes.
    subprocess.run([sys.executable, WORKER, tmp_path / "out.json", task], check=True)
    results = json.loads((tmp_path / "out.json").read_text())
    single = results.pop("1x1x1")
    assert len(single["rows"]) == 10 and results
    if task == "tokenizer":
        terms = {"l2", "perceptual", "semantic", "entropy", "adversarial", "discriminator"}
        assert terms | {"codebook", "commitment", "auxiliary_feature"} <= single["rows"][-1].keys()
    for mesh, found in results.items():
        assert found["digest"] == single["digest"]  # of the same state, sharded in another way
        for one, other in zip(single["rows"], found["rows"], strict=True):
            assert one == pytest.approx(other, rel=AGREEMENT, abs=AGREEMENT), mesh
        for name, distance in found["distances"].items():
            assert distance < AGREEMENT, (mesh, name)


@pytest.mark.parametrize("name", ["xl_xxl", "s_s", "b_l_2d", "generator:xxl", "generator:b,2d"])
def test_no_large_parameter_is_whole_under_fsdp(name):
    kind, _, size = name.rpartition(":")
    if kind:
        training = GeneratorTask(GeneratorRun(model=recipes.generator_model(size)))
    else:
        training = TokenizerTask(TokenizerRun(model=recipes.tokenizer_model(size)))
    mesh = sharding.abstract_mesh(MeshConfig(1, 8, 1), 8)
    state = loop.abstract_state(training, mesh)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        whole = leaf.sharding.is_fully_replicated
        assert not (whole and leaf.size * leaf.dtype.itemsize > 2**20), (path, leaf.shape)


def test_an_axis_that_the_mesh_does_not_divide_is_left_whole():
    mesh = AbstractMesh((1, 3, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 3)
    training = GeneratorTask(GeneratorRun(model=recipes.generator_model("b")))
    state = loop.abstract_state(training, mesh)
    for leaf in jax.tree.leaves(state.params):
        leaf.sharding.shard_shape(leaf.shape)  # raises where it does not divide


@pytest.mark.parametrize(
    "parts, block",
    [
        ({0: [0, 1], 1: [2, 3]}, (0, 2)),
        ({0: [2, 3], 1: [0, 1]}, (1, 2)),
        ({0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}, (0, 1)),  # they differ along `tensor`
        ({0: [0, 1], 1: [2]}, "process 1 owns parts [2] of 4"),
        ({0: [0, 1], 1: [3, 1]}, "process 1 owns parts [1, 3] of 4"),
        ({0: [0, 2], 1: [1, 3]}, "process 0 owns parts [0, 2] of 4"),
    ],
)
def test_block_of_a_process(parts, block, monkeypatch):
    places = {
        mock.Mock(process_index=process): (slice(index, index + 1),)
        for process, indices in parts.items()
        for index in indices
    }
    placed = mock.Mock(devices_indices_map=lambda shape: places)
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: placed)
    mesh = sharding.abstract_mesh(MeshConfig(2, 2, 1), 4)
    if isinstance(block, tuple):
        assert sharding.batch_block(mesh) == block
    else:
        with pytest.raises(ValueError, match=re.escape(block)):
            sharding.batch_block(mesh)
