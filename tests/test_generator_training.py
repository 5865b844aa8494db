"""A generator's training: its step, its data, what decays, and runs that branch off from others."""

import dataclasses
import functools
from pathlib import Path
import re
import shutil

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
import pytest

from gigatok_jax import api, bundles, config, encoding, sampling, sharding
from gigatok_jax.data import codes, pipeline
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.models.generator import Generator, GeneratorConfig, param_shapes
from gigatok_jax.models.tokenizer import TransformerSize
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training import generator, loop, losses, optimizer
from gigatok_jax.training.generator import (
    GeneratorRun,
    GeneratorTask,
    batch_codes,
    validation_loss,
)
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.task import LoopConfig
from gigatok_jax.training.telemetry import read_metrics

import image_folders
import tiny

BLOCK = TransformerSize(1, 2, 16)
TOKENIZER = tiny.config(
    encoder=BLOCK,
    decoder=BLOCK,
    image_size=16,
    latents=4,
    base_channels=8,
    channel_multipliers=(1,),
    z_channels=16,
    codebook_size=512,  # enough for images to differ in their codes
    semantic_dim=0,
)
MODEL = GeneratorConfig(1, 2, 16, codes=4, codebook_size=512, classes=3, dropout=0.0)
OPTIMIZER = OptimizerConfig(
    rate=1e-2, schedule="warmup_stable_decay", warmup_steps=2, decayed="matrices"
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A tokenizer's bundle."""
    directory = tmp_path_factory.mktemp("tokenizer")
    bundles.save(directory, "tokenizer", TOKENIZER, tiny.weights(TOKENIZER), {})
    return directory


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> DataConfig:
    root = tmp_path_factory.mktemp("photos")
    image_folders.make(root, {"ant": 9, "bee": 7, "cat": 6})
    return DataConfig(source="folder", path=str(root), holdout=4)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, directory, photos) -> DataConfig:
    """Codes of the centre crops of `photos`."""
    out = tmp_path_factory.mktemp("codes")
    tokenizer = api.load_tokenizer(directory)
    encoding.encode(tokenizer, photos, out, crop_factors=(), batch_size=8, shard_images=8)
    return DataConfig(source="codes", path=str(out))


def run(data, **fields) -> GeneratorRun:
    """Twenty steps, those from 17 on with a falling rate."""
    defaults = {
        "model": MODEL,
        "optimizer": OPTIMIZER,
        "loop": LoopConfig(log_every=1, evaluate_every=0, checkpoint_every=4, keep_last=9),
        "steps": 20,
        "batch_size": 8,
        "class_dropout": 0.1,
        "evaluation_images": 5,
        "sampling": SamplingConfig(),
    }
    return GeneratorRun(data=data, **(defaults | fields))


def start(workdir, data, **fields) -> list[dict[str, float]]:
    """Trains, and returns the rows of `metrics.jsonl`."""
    loop.train(run(data, **fields), workdir)
    return read_metrics(workdir / "metrics.jsonl")


# The step.


def filled(model: GeneratorConfig) -> dict:
    """Random parameters: fresh ones have a head of zeros, behind which nothing has a gradient."""
    none = jnp.zeros((1, 0), jnp.int32)
    init = functools.partial(Generator(model).init, jax.random.key(0), none)
    shapes = jax.eval_shape(init, jnp.zeros(1, jnp.int32))
    return tiny.fill(nn.meta.unbox(shapes)["params"])


def noise(images: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, MODEL.classes, images, np.int32)
    return {"codes": rng.integers(0, 512, (images, 4), np.int32), "label": labels}


def make_task(tokenizer=None, **fields) -> GeneratorTask:
    """Ten steps on batches of 8."""
    run = GeneratorRun(model=MODEL, optimizer=OPTIMIZER, steps=10, batch_size=8)
    return GeneratorTask(dataclasses.replace(run, **fields), tokenizer)


def state_of(training: GeneratorTask, params: dict):
    """A fresh state of given parameters."""
    shapes = nn.meta.unbox(jax.eval_shape(training.init, jax.random.key(0)))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return zeros.replace(params=params, key=jax.random.key_data(jax.random.key(1)))


def test_batch_in_parts_gives_the_gradient_of_the_whole():
    parts = make_task(accumulate=2, class_dropout=0.0)
    state, batch = state_of(parts, filled(MODEL)), noise(8)

    def loss(params):  # without dropout, the validation loss is that of training
        return validation_loss(MODEL, params, batch["codes"], batch["label"]).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
    new, metrics = jax.device_get(jax.jit(parts.step)(state, batch, None, None))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    close(metrics["total"], value)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
    close(metrics["gradient_norm"], sum(np.sum(leaf**2) for leaf in leaves) ** 0.5)
    # Of the first update, Adam's mean is a tenth of the gradient.
    for mean, leaf in zip(
        jax.tree.leaves(optax.tree.get(new.optimizer, "mu")), leaves, strict=True
    ):
        close(10 * mean, leaf)
        assert np.abs(leaf).max() > 1e-4


@pytest.mark.parametrize("changes", [{}, {"adaln": "block"}])
def test_chunks_of_logits_change_no_loss_and_no_gradient(monkeypatch, changes):
    model = dataclasses.replace(MODEL, **changes)
    params, batch = filled(model), noise(8)
    module = Generator(model)

    def measure(limit):
        monkeypatch.setattr(generator, "CHUNK_ELEMENTS", limit)

        def loss(params):
            return generator.code_losses(module, params, *batch.values(), mean=True)

        each = validation_loss(model, params, *batch.values())
        return each, *jax.jit(jax.value_and_grad(loss))(params)

    whole, chunked = measure(2**30), measure(2 * 8 * 512)  # two positions
    for one, other in zip(*map(jax.tree.leaves, (whole, chunked)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * np.abs(other).max())


def test_only_large_codebooks_are_computed_in_chunks(monkeypatch):
    chunked = []

    def record(x, kernel, targets, chunks):
        chunked.append(chunks)
        return losses.cross_entropy(x @ kernel, targets)

    monkeypatch.setattr(losses, "chunked_cross_entropy", record)
    for size, images, devices, tensor, chunks in (
        (16_384, 256, 1, 1, []),
        (16_384, 512, 2, 1, []),
        (262_144, 256, 1, 1, [16]),
        (262_144, 256, 8, 1, [2]),
        (262_144, 256, 8, 2, [2]),
    ):
        model = dataclasses.replace(MODEL, codes=256, codebook_size=size)
        params = nn.meta.unbox(param_shapes(model))
        array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        mesh = sharding.abstract_mesh(MeshConfig(tensor=tensor), devices)
        with sharding.use(mesh):
            loss = functools.partial(validation_loss, model)
            jax.eval_shape(loss, params, array((images, 256)), array((images,)))
        assert chunked == chunks, (size, images, devices, tensor)
        chunked.clear()


def test_generator_of_262144_codes_trains_and_samples(monkeypatch):
    monkeypatch.setattr(generator, "CHUNK_ELEMENTS", 2**20)  # one position at a time
    model = dataclasses.replace(MODEL, width=8, codebook_size=2**18)
    training = make_task(model=model, optimizer=dataclasses.replace(OPTIMIZER, rate=0.1))
    batch = noise(4)
    batch["codes"] = batch["codes"] + 2**18 - 512  # past 16 bits
    state = nn.meta.unbox(jax.jit(training.init)(jax.random.key(0)))
    step = jax.jit(training.step)
    totals = []
    for _ in range(4):
        state, metrics = step(state, batch, None, None)
        totals.append(float(metrics["total"]))
    assert totals[0] == pytest.approx(np.log(2**18), rel=1e-5)  # the head starts at zero
    assert totals[-1] < totals[0] - 0.5
    keys = jax.random.split(jax.random.key(0), 2)
    settings = SamplingConfig(top_k=4, top_p=0.9, guidance=2.0)
    found = sampling.sample(model, state.params, jnp.arange(2), keys, settings)
    assert found.shape == (2, 4) and np.isin(found, batch["codes"]).all()


def test_step_takes_images_in_place_of_their_codes(directory):
    training = make_task(TOKENIZER)
    state = state_of(training, filled(MODEL))
    frozen = bundles.load(directory, "tokenizer").weights["params"]
    image = {"image": np.zeros((8, 16, 16, 3), np.uint8), "label": noise(8)["label"]}
    step = functools.partial(training.step, phase=None)
    of_codes = jax.eval_shape(step, state, noise(8), None)
    assert jax.eval_shape(step, state, image, frozen) == of_codes


def test_right_share_of_the_classes_is_hidden():
    images, share = 4_096, 0.3
    task = make_task(class_dropout=share, batch_size=images)
    params = filled(MODEL)
    # Every image has the same class and codes: the loss is a mixture of two values.
    batch = jax.tree.map(lambda x: np.repeat(x[:1], images, 0), noise(1))
    codes = batch["codes"][:1]
    shown, hidden = (
        float(validation_loss(MODEL, params, codes, np.full(1, label))[0])
        for label in (batch["label"][0], MODEL.null_class)
    )
    assert abs(hidden - shown) > 0.05
    step, found = jax.jit(task.step), []
    for seed in range(3):
        state = state_of(task, params)
        state = state.replace(key=jax.random.key_data(jax.random.key(seed)))
        mixed = float(step(state, batch, None, None)[1]["total"])
        found.append((mixed - shown) / (hidden - shown))
    # Four standard deviations.
    np.testing.assert_allclose(found, share, atol=4 * (share * (1 - share) / images) ** 0.5)
    assert len(set(found)) == 3


@pytest.mark.parametrize("adaln", ["block", "shared"])
def test_gains_and_biases_are_told_from_matrices(adaln):
    model = dataclasses.replace(MODEL, depth=2, qk_norm=True, adaln=adaln)
    boxed = jax.eval_shape(make_task(model=model).init, jax.random.key(0))
    params = nn.meta.unbox(boxed.params)
    mask = optimizer.is_matrix(params)
    vectors = set()
    for (path, leaf), decayed in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(mask), strict=True
    ):
        stacked = any(entry.key == "layers" for entry in path)
        assert decayed == (leaf.ndim - stacked >= 2), path
        if not decayed:
            vectors.add(path[-1].key)
    assert vectors == {"scale", "bias"}
    # Fresh parameters are in boxes, with the names of their axes; restored ones are not.
    assert nn.meta.unbox(optimizer.is_matrix(boxed.params)) == mask


@pytest.mark.parametrize("decayed, spared", [("matrices", {"scale", "bias"}), ("all", set())])
def test_weight_decay_spares_gains_and_biases(decayed, spared):
    block = {"norm": {"scale": 2.0}, "dense": {"kernel": 2.0, "bias": 2.0}}
    params = {"layers": {"block": block}, "embedding": 2.0}
    params = jax.tree.map(lambda value: np.full((2, 3), value, np.float32), params)
    settings = OptimizerConfig(rate=0.1, schedule="constant", weight_decay=0.5, decayed=decayed)
    transformation = optimizer.make_optimizer(settings.resolve(1, 1), 10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = transformation.update(zeros, transformation.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        expected = 0 if path[-1].key in spared else -0.1 * 0.5 * 2
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=str(path))


# Runs.


@pytest.fixture(scope="module")
def stable(tmp_path_factory, directory, stored):
    """A finished run, and its metrics."""
    workdir = tmp_path_factory.mktemp("stable")
    return workdir, start(workdir, stored, tokenizer=str(directory))


def test_loss_falls_on_a_few_images(stable):
    totals = [row["total"] for row in stable[1] if "total" in row]
    assert len(totals) == 20
    assert totals[0] == pytest.approx(np.log(512), abs=0.01)  # a head of zeros
    assert np.mean(totals[-3:]) < totals[0] - 2
    assert stable[1][-1]["held_out/loss"] < totals[0] - 1


def test_run_leaves_a_bundle_that_names_its_tokenizer(stable, directory):
    bundle = bundles.load(stable[0] / "bundle", "generator", GeneratorConfig)
    assert bundle.config == MODEL
    assert bundle.made_by["step"] == 20
    assert bundle.made_by["tokenizer"] == bundles.load(directory, "tokenizer").fingerprint


def test_bundle_and_log_tell_the_classes_without_a_training_image(directory, photos, caplog):
    data = dataclasses.replace(photos, length=1)
    with pipeline.train_batches(data, 16, batch_size=8, seed=0) as batches:
        (label,) = set(next(batches)["label"].tolist())
        task = run(data, tokenizer=str(directory)).open_task()
        task.set_data(batches)
    missing = [other for other in range(3) if other != label]
    names = ("ant", "bee", "cat")
    state = state_of(task, filled(MODEL))
    assert task.bundle(state).made_by["data"] == {
        "version": batches.version(),
        "class_names": list(names),
        "untrained": missing,
    }
    assert (
        "the 1 training images show 1 of 3 classes; the others, such as "
        f"{missing[0]} ({names[missing[0]]}), cannot be sampled"
    ) in caplog.text


def test_run_shows_samples(stable):
    (picture,) = (stable[0] / "pictures").glob("*.png")
    assert picture.name == "samples_00000020.png"
    # Four rows of eight images of 16 pixels, enlarged six times, 4 pixels between and around.
    with Image.open(picture) as image:
        assert image.size == (8 * 100 + 4, 4 * 100 + 4)


@pytest.fixture(scope="module")
def encoded(stable, directory, photos):
    """Function of a split to its crops' codes, labels and losses, as training on images has them.

    The losses are those of the finished run's weights.
    """
    task = run(photos, tokenizer=str(directory)).open_task()
    params = jax.device_put(bundles.load(stable[0] / "bundle", "generator").weights["params"])

    @jax.jit
    def functions(batch):
        codes = batch_codes(batch, TOKENIZER, task.frozen)
        return codes, validation_loss(MODEL, params, codes, batch["label"])

    def encoded(split):
        with pipeline.eval_batches(
            photos, image_size=16, batch_size=8, train=split == "train"
        ) as batches:
            parts = []
            for batch in batches:
                outputs = functions({name: batch[name] for name in ("image", "label")})
                parts.append([part[batch["valid"]] for part in (*outputs, batch["label"])])
        return [np.concatenate(part) for part in zip(*parts, strict=True)]

    return encoded


@pytest.mark.parametrize("split, count", [("train", 18), ("validation", 4)])
def test_codes_of_images_are_the_stored_ones(encoded, stored, split, count):
    found, _, labels = encoded(split)
    source = codes.CodesSource(stored.path, split)
    examples = [source[i] for i in range(len(source))]
    assert len(found) == len(examples) == count
    np.testing.assert_array_equal(found, [example["codes"][0] for example in examples])
    np.testing.assert_array_equal(labels, [example["label"] for example in examples])
    assert len(np.unique(found, axis=0)) > 2


def test_images_have_the_loss_of_their_stored_codes(encoded, stable):
    _, losses, _ = encoded("validation")
    assert stable[1][-1]["held_out/loss"] == pytest.approx(losses.mean(), rel=1e-6)


def codes_of_another(stored: DataConfig, folder: Path) -> DataConfig:
    """A copy of `stored` that another tokenizer is said to have made."""
    shutil.copytree(stored.path, folder)
    info = dataclasses.replace(codes.STORE.read_info(folder), tokenizer="0123456789abcdef")
    codes.STORE.write_info(folder, info)
    return DataConfig(source="codes", path=str(folder))


def test_run_does_not_go_on_with_codes_of_another_tokenizer(stable, stored, tmp_path):
    workdir = shutil.copytree(stable[0], tmp_path / "run")
    with pytest.raises(
        UserError, match=r"^\S+: its checkpoint was trained with another tokenizer$"
    ):
        start(workdir, codes_of_another(stored, tmp_path / "codes"), steps=24)


def test_run_does_not_go_on_with_more_classes(stable, stored, tmp_path):
    workdir = shutil.copytree(stable[0], tmp_path / "run")
    path = shutil.copytree(stored.path, tmp_path / "codes")
    names = ("ant", "bee", "cat", "dog")
    codes.STORE.write_info(
        path, dataclasses.replace(codes.STORE.read_info(path), class_names=names)
    )
    more = DataConfig(source="codes", path=str(path))
    # The number of classes is the data's, so that the state has another shape.
    model = dataclasses.replace(MODEL, classes=0)
    config_file = workdir / "config.json"
    config_file.write_text(config_file.read_text().replace('"classes": 3', '"classes": 0'))
    with pytest.raises(
        UserError, match=r"^\S+: its checkpoint was trained with another list of classes$"
    ):
        start(workdir, more, model=model, steps=24)


# Branches.


def files(folder: Path) -> dict[str, tuple]:
    """What a folder holds, and when each was last written."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


@pytest.fixture(scope="module")
def branch(tmp_path_factory, stable, stored):
    """A run that branches off at step 8, its metrics, and what was in the other's workdir."""
    workdir, before = tmp_path_factory.mktemp("branch"), files(stable[0])
    rows = start(workdir, stored, branch_from=str(stable[0]), branch_step=8, steps=12)
    return workdir, rows, before


def test_branch_goes_on_where_the_other_run_was(stable, branch):
    # Same weights, same batch, same classes hidden, and not yet a lower rate.
    first, expected = branch[1][0], stable[1][8]
    assert first["step"] == expected["step"] == 9
    for name in ("total", "gradient_norm", "parameter_norm", "learning_rate"):
        assert first[name] == pytest.approx(expected[name], rel=1e-5), name


def test_branch_decays_to_zero_at_its_end(branch, stored):
    found = [row["learning_rate"] for row in branch[1] if "learning_rate" in row]
    expected = [1e-2 * (1 - (i / 4) ** 0.5) for i in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    branched = run(stored, branch_from="stable", branch_step=8, steps=12)
    assert optimizer.learning_rate(branched.resolved_optimizer, 12)(12) == 0


def test_branch_leaves_the_other_run_as_it_was(stable, branch):
    assert files(stable[0]) == branch[2]
    assert bundles.load(branch[0] / "bundle", "generator").made_by["step"] == 12


@pytest.mark.parametrize("step", [1, 17])
def test_branch_starts_from_the_constant_phase(stable, stored, tmp_path, step):
    place = {"branch_from": str(stable[0]), "branch_step": step}
    with pytest.raises(UserError, match=r"^config.branch_step: expected .*, 2 to 16, got"):
        start(tmp_path, stored, steps=24, **place)


def test_branch_is_of_the_same_model(stable, stored, tmp_path):
    place = {"branch_from": str(stable[0]), "branch_step": 8}
    with pytest.raises(UserError, match=r"^config.model.positions: expected .*, got 'rotary'$"):
        model = dataclasses.replace(MODEL, positions="rotary")
        start(tmp_path, stored, model=model, steps=12, **place)


def test_branch_needs_the_other_run_only_at_its_start(branch, stored, tmp_path):
    place = {"branch_from": str(tmp_path / "gone"), "branch_step": 8}
    assert start(branch[0], stored, steps=12, **place) == branch[1]


@pytest.mark.parametrize("step, total", [(8, 10), (2, 3), (1_000, 1_250)])
def test_decay_of_a_branch_is_a_fifth_of_the_whole(stored, step, total):
    branch = run(stored, branch_from="stable", branch_step=step, steps=0)
    assert branch.total_steps == total


def test_branch_from_a_step_without_a_checkpoint_is_refused(stable, stored, tmp_path):
    place = {"branch_from": str(stable[0]), "branch_step": 9, "steps": 12}
    known = re.escape(f"{stable[0]}: expected a checkpoint of step 9, found 4, 8, 12, 16, 20")
    with pytest.raises(UserError, match=f"^{known}$"):
        start(tmp_path / "branch", stored, **place)
    place["branch_from"] = str(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"nothing: expected a checkpoint of step 9, found none$"):
        start(tmp_path / "branch", stored, **place)
    assert not (tmp_path / "nothing").exists()


def test_branch_with_codes_of_another_tokenizer_is_refused(stable, stored, tmp_path):
    place = {"branch_from": str(stable[0]), "branch_step": 8, "steps": 12}
    with pytest.raises(
        UserError, match=r"^\S+: its checkpoint was trained with another tokenizer$"
    ):
        start(tmp_path / "branch", codes_of_another(stored, tmp_path / "codes"), **place)


@pytest.mark.parametrize(
    "share, guidance, warned", [(0.0, 2.0, True), (0.0, 1.0, False), (0.1, 2.0, False)]
)
def test_run_warns_of_pictures_by_an_untrained_class(
    directory, photos, caplog, share, guidance, warned
):
    settings = SamplingConfig(guidance=guidance)
    run(photos, tokenizer=str(directory), class_dropout=share, sampling=settings).open_task()
    assert ("which this generator was not trained on" in caplog.text) == warned


# What is refused.


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"codes": 8}, r"\S+: expected codes=8, as in the generator's model.codes, got 4"),
        (
            {"codebook_size": 256},
            r"\S+: expected codebook_size=256, as in the generator's model.codebook_size, got 512",
        ),
        (
            {"classes": 2},
            r"config\.model\.classes: expected at least 3, the number of classes in the data, or "
            "0, got 2",
        ),
    ],
)
def test_codes_that_do_not_fit_the_model_are_refused(stored, tmp_path, fields, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        start(tmp_path / "run", stored, model=dataclasses.replace(MODEL, **fields))
    assert not (tmp_path / "run").exists()


def test_codes_of_another_tokenizer_are_refused(stored, directory, tmp_path):
    others = codes_of_another(stored, tmp_path / "codes")
    message = r"^\S+: expected tokenizer=\w+, as in the generator, got 0123456789abcdef$"
    with pytest.raises(UserError, match=message):
        start(tmp_path / "run", others, tokenizer=str(directory))
    assert not (tmp_path / "run").exists()


def test_images_without_a_tokenizer_are_refused(photos, tmp_path):
    with pytest.raises(UserError, match=r"^config\.tokenizer: expected the bundle"):
        start(tmp_path / "run", photos)


@pytest.mark.parametrize("field, theirs", [("codes", 4), ("codebook_size", 512)])
def test_model_of_another_size_than_the_tokenizer_is_refused(
    photos, directory, tmp_path, field, theirs
):
    model = dataclasses.replace(MODEL, **{field: 16})
    message = rf"^\S+: expected {field}=16, as in the generator's model.{field}, got {theirs}$"
    with pytest.raises(UserError, match=message):
        start(tmp_path / "run", photos, tokenizer=str(directory), model=model)


@pytest.mark.parametrize(
    "field, fields",
    [
        ("class_dropout", {"class_dropout": 1.0}),
        ("accumulate", {"accumulate": 3}),
        ("accumulate", {"accumulate": 0}),
        ("branch_from", {"branch_step": 8}),
        ("branch_from", {"branch_from": "stable"}),
        ("steps", {"branch_from": "stable", "branch_step": 20}),
        ("optimizer.warmup_steps", {"steps": 2}),
        (
            "optimizer.schedule",
            {"branch_from": "stable", "branch_step": 8, "optimizer": {"warmup_steps": 2}},
        ),
        ("task", {"task": "tokenizer"}),
    ],
)
def test_impossible_values_are_refused_by_name(stored, field, fields):
    mapping = dataclasses.asdict(run(stored)) | fields
    with pytest.raises(UserError, match=rf"^config\.{re.escape(field)}: "):
        config.from_mapping(GeneratorRun, mapping)
