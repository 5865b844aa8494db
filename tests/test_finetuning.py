"""Runs that start from a bundle's weights, and parts that are not trained."""

import dataclasses
import functools
import json
import logging
from unittest import mock

from flax import linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import bundles, cli, commands, sharding
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.models import generator, tokenizer
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import Tokenizer, TransformerSize
from gigatok_jax.planning import flops, programs
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training import finetuning, loop
from gigatok_jax.training.checkpoints import Checkpoints
from gigatok_jax.training.generator import GeneratorRun, GeneratorTask, check_tokenizer
from gigatok_jax.training.linear_probe import LinearProbeRun
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.task import LoopConfig
from gigatok_jax.training.telemetry import read_metrics
from gigatok_jax.training.tokenizer import (
    ObjectiveConfig,
    TokenizerRun,
    TokenizerTask,
    weights_for_use,
)

import tiny

BLOCK = TransformerSize(1, 2, 16)
MODEL = tiny.config(
    encoder=BLOCK,
    decoder=BLOCK,
    image_size=8,
    latents=4,
    channel_multipliers=(1,),
    semantic_dim=0,
)
GENERATOR = GeneratorConfig(2, 2, 16, codes=4, codebook_size=32, classes=5, dropout=0.0)
FROZEN = ("cnn_encoder", "encoder", "encoder_out", "quant_conv", "codebook")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Bundles of a tokenizer and of a generator."""
    root = tmp_path_factory.mktemp("bundles")
    weights = tiny.weights(MODEL)
    weights["history"] = np.arange(len(weights["history"]), dtype=np.int32) % 64
    bundles.save(root / "tokenizer", "tokenizer", MODEL, weights, {})
    params = tiny.fill(generator.param_shapes(GENERATOR))
    bundles.save(root / "generator", "generator", GENERATOR, {"params": params}, {"tokenizer": "a"})
    return root


def run(folder, *, model=None, **fields) -> TokenizerRun:
    """Twenty steps on drawings; `model` holds changes to `MODEL`."""
    defaults = {
        "objective": ObjectiveConfig(perceptual=0.0, semantic=0.0, adversarial=0.0),
        "data": DataConfig(source="embedded", length=32, eval_length=8),
        "optimizer": OptimizerConfig(rate=1e-3, warmup_steps=0, weight_decay=0.1),
        "loop": LoopConfig(log_every=15, evaluate_every=0, checkpoint_every=10),
        "steps": 20,
        "batch_size": 8,
        "average_decay": 0.9,
        "evaluation_images": 8,
        "remat": "none",
        "init_from": str(folder / "tokenizer"),
    }
    model = dataclasses.replace(MODEL, **(model or {}))
    return TokenizerRun(model=model, **(defaults | fields))


def generator_run(folder, *, model=None, **fields) -> GeneratorRun:
    model = dataclasses.replace(GENERATOR, **(model or {}))
    defaults = {"steps": 20, "batch_size": 8, "init_from": str(folder / "generator")}
    defaults["optimizer"] = OptimizerConfig(rate=1e-2, warmup_steps=0)
    return GeneratorRun(model=model, **(defaults | fields))


def train(run, workdir):
    """`loop.train` without evaluations, which take time to compile."""
    with mock.patch.object(loop, "HeldOut", lambda task, mesh: lambda state, frozen: ({}, {})):
        loop.train(run, workdir)


def started(task):
    """The state in which a run of this task makes its first step, but for what is fresh: zeros."""
    abstract = nn.meta.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    fresh = jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), abstract)
    return finetuning.adopt(fresh, finetuning.read(task))


def same(one, other) -> dict:
    """Whether each array is equal, bit for bit, by name."""
    one, other = (flatten_dict(tree, sep="/") for tree in (one, other))
    assert one.keys() == other.keys()
    return {name: np.array_equal(bits(one[name]), bits(other[name])) for name in one}


def bits(array):
    return np.asarray(array).view(np.uint32)


# Step 0.


def test_step_0_reconstructs_exactly_as_the_bundle(folder):
    @jax.jit
    def reconstruct(params, images):
        apply = functools.partial(Tokenizer(MODEL).apply, {"params": params})
        return apply(apply(images, method="encode"), method="decode")

    state, images = started(run(folder).open_task()), tiny.images(2, 8)
    theirs = bundles.load(folder / "tokenizer", "tokenizer").weights["params"]
    expected = bits(reconstruct(theirs, images))
    for params in (state.params, weights_for_use(state)["params"]):
        assert np.array_equal(bits(reconstruct(params, images)), expected)
    np.testing.assert_array_equal(state.history, np.arange(65_536) % 64)
    assert state.step == 0
    assert not any(map(np.any, jax.tree.leaves(state.optimizer)))


# Frozen parts.


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """A finished run that trained the decoder alone."""
    workdir = tmp_path_factory.mktemp("tuned")
    train(run(folder, freeze=("encoder", "quantizer")), workdir)
    return workdir


def test_frozen_leaves_are_bit_equal_after_20_steps_and_all_others_move(folder, tuned):
    before = bundles.load(folder / "tokenizer", "tokenizer", type(MODEL))
    after = bundles.load(tuned / "bundle", "tokenizer", type(MODEL))
    task = run(folder, freeze=("encoder", "quantizer")).open_task()
    abstract = loop.abstract_state(task, sharding.make_mesh(MeshConfig()))
    opened = Checkpoints(tuned / "checkpoints", read_only=True)
    state = opened.restore(abstract).state
    opened.close()
    assert after.made_by["step"] == state.step == 20
    for params in (state.params, after.weights["params"]):
        equal = same(before.weights["params"], params)
        assert {name for name in equal if equal[name]} == {
            name for name in equal if name.split("/")[0] in FROZEN
        }
    trained = {name: x for name, x in state.params.items() if name not in FROZEN}
    norm = sum(np.sum(np.square(x)) for x in jax.tree.leaves(trained)) ** 0.5
    row = read_metrics(tuned / "metrics.jsonl")[-2]  # the last row is for evaluations
    np.testing.assert_allclose(row["parameter_norm"], norm, rtol=1e-5)
    assert after.made_by["started_from"] == after.made_by["codes_of"] == before.fingerprint
    # So a generator of the bundle's codes goes on with the new decoder.
    model = GeneratorConfig(1, 2, 16, codes=4, codebook_size=64)
    check_tokenizer("tuned", after, model, before.fingerprint)
    with pytest.raises(UserError, match="expected tokenizer=another"):
        check_tokenizer("tuned", after, model, "another")


def test_optimizer_and_average_hold_only_what_is_trained(folder):
    task = run(folder, freeze=("encoder", "quantizer")).open_task()
    state = loop.abstract_state(task, sharding.abstract_mesh(MeshConfig(1, 8, 1), 8))
    trained = {name: state.params[name] for name in state.params if name not in FROZEN}
    adamw = state.optimizer[1][0]
    for tree in (adamw.mu, adamw.nu, state.average):
        assert jax.tree.map(lambda x: (x.shape, x.sharding), tree) == jax.tree.map(
            lambda x: (x.shape, x.sharding), trained
        )


def test_frozen_parts_cost_no_gradients_and_plans_count_that(folder):
    mesh = sharding.abstract_mesh(MeshConfig(), 1)
    whole, part = (
        programs.training(run(folder, freeze=freeze), mesh)
        for freeze in ((), ("encoder", "quantizer"))
    )
    sizes = {
        name: sum(x.nbytes for x in jax.tree.leaves(tree))
        for name, tree in tiny.weights(MODEL)["params"].items()
    }
    trained = sum(size for name, size in sizes.items() if name not in FROZEN)
    assert part.memory["parameters"] == whole.memory["parameters"] == sum(sizes.values())
    assert part.memory["average"] == trained
    assert part.memory["optimizer"] == 2 * trained + 8  # and two counters
    encode = flops.count(
        jax.make_jaxpr(lambda params, x: Tokenizer(MODEL).apply(params, x, method="latents"))(
            {"params": tokenizer.param_shapes(MODEL)},
            jax.ShapeDtypeStruct((8, 8, 8, 3), np.float32),
        )
    )
    saved = flops.count(whole.trace().jaxpr) - flops.count(part.trace().jaxpr)
    # A backward pass costs twice the forward pass, but for the image, which needs no gradient.
    assert 1.8 * encode < saved < 2.2 * encode


@pytest.mark.parametrize("layout, latents", [("1d", 16), ("2d", 64)])
@pytest.mark.parametrize("semantic_dim", [0, 12])
def test_parts_of_a_tokenizer_are_all_of_it(layout, latents, semantic_dim):
    config = tiny.config(layout=layout, latents=latents, semantic_dim=semantic_dim)
    names = [name for part in config.parts.values() for name in part]
    assert sorted(names) == sorted(tokenizer.param_shapes(config))


def test_frozen_encoder_keeps_the_codes_of_a_quantizer_without_parameters(tmp_path):
    changes = {"quantizer": "lfq", "code_dim": 6}
    model = dataclasses.replace(MODEL, **changes)
    names = [name for part in model.parts.values() for name in part]
    assert sorted(names) == sorted(tokenizer.param_shapes(model))
    bundles.save(tmp_path / "tokenizer", "tokenizer", model, tiny.weights(model), {})

    def provenance(freeze):
        return finetuning.read(run(tmp_path, model=changes, freeze=freeze).open_task()).provenance

    assert provenance(("encoder",)).keys() == {"started_from", "codes_of"}
    assert provenance(("decoder",)).keys() == {"started_from"}
    with pytest.raises(ValueError, match=r"freeze: 'quantizer': no such part; known: encoder, de"):
        run(tmp_path, model=changes, freeze=("quantizer",))


@pytest.mark.parametrize("adaln", ["none", "block", "shared"])
def test_parts_of_a_generator_are_all_of_it(adaln):
    config = dataclasses.replace(GENERATOR, adaln=adaln)
    names = [name for part in config.parts.values() for name in part]
    assert len(set(names)) == len(names) and set(generator.param_shapes(config)) <= set(names)


# Going on.


def test_resumed_run_does_not_need_the_bundle(folder, tuned, tmp_path, caplog):
    def die(*args):
        raise KeyError("the machine")

    options = {"freeze": ("encoder", "quantizer")}
    with mock.patch.object(loop.Telemetry, "row", die), pytest.raises(KeyError):
        train(run(folder, **options), tmp_path)  # at step 15
    with caplog.at_level(logging.WARNING, logger="gigatok_jax"):
        train(run(folder, **options, init_from="lost"), tmp_path)
    assert f"config.init_from: 'lost', was '{folder / 'tokenizer'}' when this run" in caplog.text
    one, other = (bundles.load(path / "bundle", "tokenizer") for path in (tmp_path, tuned))
    assert all(same(one.weights, other.weights).values())
    for name in ("started_from", "codes_of"):
        assert one.made_by[name] == other.made_by[name]


def test_other_frozen_parts_on_resuming_are_refused(folder, tuned):
    before = (tuned / "config.json").read_text()
    with pytest.raises(UserError, match=r"^config\.freeze: \['encoder'\], but the run in .* has"):
        loop.train(run(folder, freeze=("encoder",)), tuned)
    assert (tuned / "config.json").read_text() == before


# Other sizes.


def test_32_to_64_pixels_trains(tmp_path, caplog):
    changes = {"image_size": 32, "channel_multipliers": (1, 1)}
    config = dataclasses.replace(MODEL, **changes)
    bundles.save(tmp_path / "tokenizer", "tokenizer", config, tiny.weights(config), {})
    slow = OptimizerConfig(rate=1e-4, warmup_steps=0)
    changes["image_size"] = 64
    task = run(tmp_path, model=changes, optimizer=slow, batch_size=2).open_task()
    with caplog.at_level(logging.INFO, logger="gigatok_jax"):
        state = started(task)
    assert "encoder/grid_positions resized, 256 to 1024 rows" in caplog.text
    assert state.params["decoder"]["grid_positions"].shape == (1024, 16)
    params = {name: dict(part) for name, part in state.params.items() if name != "codebook"}
    theirs = bundles.load(tmp_path / "tokenizer", "tokenizer").weights["params"]
    del theirs["codebook"]
    for part in ("encoder", "decoder"):
        del params[part]["grid_positions"], theirs[part]["grid_positions"]
    assert all(same(params, theirs).values())

    step = jax.jit(task.step, static_argnames="phase")
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    totals = []
    for _ in range(3):
        state, metrics = step(state, {"image": image}, task.frozen, phase=task.phase(0))
        totals.append(float(metrics["total"]))
    assert np.isfinite(totals).all() and totals[2] < totals[0]


def test_position_tables_are_resized_as_images_and_lines():
    line = np.arange(4, dtype=np.float32)
    rows, columns = (x.reshape(-1) for x in np.meshgrid(line, line, indexing="ij"))
    grid = np.stack([rows, 10 * columns, np.full(16, 7)], -1).astype(np.float32)
    found = finetuning._fit("grid_positions", grid, 64).reshape(8, 8, 3)
    between = np.arange(8) / 2 - 0.25  # half-pixel centers
    inside = slice(3, 5)  # where all four taps lie inside
    np.testing.assert_allclose(found[inside, 0, 0], between[inside], atol=1e-5)
    np.testing.assert_allclose(found[0, inside, 1], 10 * between[inside], atol=1e-4)
    np.testing.assert_allclose(found[..., 2], 7, rtol=1e-6)

    table = np.stack([line, np.full(4, 3)], -1).astype(np.float32)
    found = finetuning._fit("latent_positions", table, 8)
    np.testing.assert_allclose(found[1:-1, 0], between[1:-1], atol=1e-6)
    np.testing.assert_allclose(found[:, 1], 3, rtol=1e-6)
    # A generator's first position is that of the class.
    found = finetuning._fit("positions", np.concatenate([[[9, 9]], table]), 9)
    np.testing.assert_array_equal(found[0], [9, 9])
    np.testing.assert_allclose(found[2:-1, 0], between[1:-1], atol=1e-6)


def test_generator_for_other_classes_and_codes(folder, caplog):
    task = GeneratorTask(generator_run(folder, model={"classes": 3, "codes": 16}), fingerprint="b")
    with caplog.at_level(logging.INFO, logger="gigatok_jax"):
        found = started(task).params
    theirs = bundles.load(folder / "generator", "generator").weights["params"]
    null = theirs.pop("class_embedding")[-1]
    np.testing.assert_array_equal(found.pop("class_embedding"), np.stack([null] * 4))
    assert found.pop("positions").shape == (17, 16)
    del theirs["positions"]
    assert all(same(found, theirs).values())
    assert "class_embedding as the null class, 6 to 4 rows" in caplog.text
    assert "positions resized, 5 to 17 rows" in caplog.text
    assert "trained on the codes of another tokenizer" in caplog.text


def test_generator_trains_only_its_classes(folder):
    freeze = ("codes", "layers", "head")
    task = GeneratorTask(generator_run(folder, freeze=freeze, accumulate=2, average_decay=0.9))
    before = state = started(task)
    rng = np.random.default_rng(0)
    batch = {"codes": rng.integers(0, 32, (8, 4), np.int32), "label": np.zeros(8, np.int32)}
    step = jax.jit(task.step)
    for _ in range(3):
        state, _ = step(state, batch, None)
    assert state.average.keys() == {"class_embedding"}
    equal = same(before.params, state.params)
    assert [name for name in equal if not equal[name]] == ["class_embedding"]


def test_semantic_projector_is_fresh_where_the_bundle_has_another_or_none(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="gigatok_jax")
    semantic = dataclasses.replace(MODEL, semantic_dim=12)
    for name, config in (("without", MODEL), ("with", semantic)):
        bundles.save(tmp_path / name, "tokenizer", config, tiny.weights(config), {})

    def start(name, semantic_dim):
        model = {"semantic_dim": semantic_dim}
        task = TokenizerTask(run(tmp_path, model=model, init_from=str(tmp_path / name)))
        return started(task)

    for name, semantic_dim in (("without", 12), ("with", 8)):
        state = start(name, semantic_dim)
        assert not any(map(np.any, jax.tree.leaves(state.params["projector"])))  # here: zeros
        assert np.any(state.params["codebook"])
    assert "semantic_dim is 0: fresh projector" in caplog.text
    assert "semantic_dim is 12: fresh projector" in caplog.text
    assert np.any(start("with", 12).params["projector"]["out"]["kernel"])
    assert "projector" not in start("with", 0).params


# What is refused.


@pytest.mark.parametrize(
    "model, message",
    [
        ({"codebook_size": 128}, "config.model.codebook_size: expected 64, as in .*, got 128"),
        ({"encoder": TransformerSize(1, 4, 16)}, "config.model.encoder.heads: expected 2, .* 4"),
        ({"decoder": TransformerSize(2, 2, 16)}, "config.model.decoder.depth: expected 1, .* 2"),
        ({"normalize_codes": False}, "config.model.normalize_codes: expected True, .* False"),
        ({"layout": "2d", "latents": 64}, "config.model.layout: expected '1d', .*, got '2d'"),
    ],
)
def test_other_architectures_are_refused_by_field_before_anything_is_written(
    folder, tmp_path, model, message
):
    with pytest.raises(UserError, match=f"^{message}"):
        loop.train(run(folder, model=model), tmp_path / "new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, message",
    [
        ("generator", "generator: holds a generator, expected a token"),
        ("no", r"^config\.init_from: '.*/no': no such folder; known: drawings, gigatok_s_s, "),
    ],
)
def test_other_bundles_are_refused(folder, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        loop.train(run(folder, init_from=str(folder / name)), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_unknown_parts_list_the_known_ones(folder):
    with pytest.raises(ValueError, match=r"freeze: 'x': no such part; .* encoder, quantizer, deco"):
        run(folder, freeze=("encoder", "x"))
    with pytest.raises(ValueError, match=r"'encoder': .* known: classes, codes, layers, head"):
        generator_run(folder, freeze=("encoder",))
    with pytest.raises(ValueError, match="freeze: expected to leave a part to train"):
        run(folder, freeze=("encoder", "quantizer", "decoder"))
    with pytest.raises(ValueError, match="init_from: expected '' in a linear_probe, got 'x'"):
        LinearProbeRun(init_from="x")
    branch = {"branch_from": "a", "branch_step": 5}
    optimizer = OptimizerConfig(schedule="warmup_stable_decay", warmup_steps=0)
    with pytest.raises(ValueError, match="init_from: expected '' in a run that branches off"):
        generator_run(folder, optimizer=optimizer, **branch)


@pytest.mark.parametrize("text", ["encoder,quantizer", "('encoder', 'quantizer')"])
def test_parts_on_the_command_line(text):
    arguments = ["--config=tokenizer:s_s", f"--config.freeze={text}", "--workdir=x"]
    values = cli.parse("train", commands.VERBS["train"], arguments)
    assert values["config"].freeze == ("encoder", "quantizer")
    assert json.loads(json.dumps(dataclasses.asdict(values["config"])))["freeze"]
