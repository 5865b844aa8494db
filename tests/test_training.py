"""The tokenizer's training step: its terms, its two players, what moves and what does not."""

import dataclasses
import functools
import time

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import bundles, pictures, recipes
from gigatok_jax.models import lpips, quantizer, tokenizer, vit
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize
from gigatok_jax.training import losses
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.tokenizer import (
    Frozen,
    ObjectiveConfig,
    Phase,
    TokenizerRun,
    TokenizerTask,
)

import tiny

SIZE = TransformerSize(depth=1, heads=2, width=16)
TEACHER = vit.ViTConfig(depth=2, heads=2, width=8, patch_size=2, grid=8)
DINO = vit.ViTConfig(depth=2, heads=2, width=8, patch_size=2, grid=3, layer_scale=False)
RUN = TokenizerRun(
    model=TokenizerConfig(
        SIZE,
        SIZE,
        image_size=8,
        latents=16,
        base_channels=4,
        channel_multipliers=(1,),
        residual_blocks=1,
        z_channels=8,
        codebook_size=32,
        semantic_layer=1,
        semantic_dim=TEACHER.width,
    ),
    # Weights that differ, so that none can be taken for another.
    objective=ObjectiveConfig(
        l2=1.1,
        perceptual=0.9,
        adversarial=0.3,
        codebook=1.3,
        commitment=0.7,
        entropy=0.05,
        semantic=0.4,
        perceptual_distance="teacher",
        disc_start=5,
        auxiliary_steps=10,
        discriminator_channels=(4, 8),
    ),
    optimizer=OptimizerConfig(rate=3e-3, schedule="constant"),
    steps=100,
    batch_size=4,
    average_decay=0.75,
    remat="none",
)
TASK = TokenizerTask(RUN, TEACHER)
ALWAYS = {"l2", "perceptual", "codebook", "commitment", "entropy", "semantic"}
AUXILIARY = {"auxiliary_l2", "auxiliary_feature", "auxiliary_perceptual"}
# What is measured beside the terms of `total`.
BESIDE = {"total", "gradient_norm", "learning_rate", "codebook_usage"}
OF_DISCRIMINATOR = {
    "discriminator",
    "discriminator_gradient_norm",
    "logits_real",
    "logits_fake",
}
PLAIN, ADVERSARIAL = Phase(False, False), Phase(True, True)


def jit(function, **kwargs):
    """Compiled without optimizations, which take longer than what is run here."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options, **kwargs)


@pytest.fixture(scope="module")
def state():
    return jit(lambda key: nn.meta.unbox(TASK.init(key)))(jax.random.key(0))


@pytest.fixture(scope="module")
def frozen():
    module, images = vit.ViT(TEACHER), jnp.zeros((1, 16, 16, 3))
    params = jit(lambda key: nn.meta.unbox(module.init(key, images))["params"])(jax.random.key(1))
    return Frozen(teacher=params)


@pytest.fixture(scope="module")
def batch():
    return {"image": np.random.default_rng(2).integers(0, 256, (4, 8, 8, 3), np.uint8)}


@pytest.fixture(scope="module")
def step():
    return jit(TASK.step, static_argnames="phase")


@pytest.fixture(scope="module")
def plain(step, state, batch, frozen):
    return step(state, batch, frozen, phase=PLAIN)


@pytest.fixture(scope="module")
def adversarial(step, state, batch, frozen):
    return step(state, batch, frozen, phase=ADVERSARIAL)


def equal(first, second):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, first, second)))


def names(training, frozen, phase, size=8):
    abstract = nn.meta.unbox(jax.eval_shape(training.init, jax.random.key(0)))
    batch = {"image": jax.ShapeDtypeStruct((4, size, size, 3), np.uint8)}

    def step(*args):
        return training.step(*args, phase)

    return set(jax.eval_shape(step, abstract, batch, frozen)[1])


def test_phase_follows_disc_start_and_auxiliary_steps():
    phases = [TASK.phase(step) for step in (0, 4, 5, 9, 10)]
    assert [phase.adversarial for phase in phases] == [False, False, True, True, True]
    assert [phase.auxiliary for phase in phases] == [True, True, True, True, False]


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize("auxiliary", [False, True])
def test_each_phase_has_the_terms_of_the_objective(frozen, adversarial, auxiliary):
    expected = ALWAYS | BESIDE
    expected |= {"adversarial"} | OF_DISCRIMINATOR if adversarial else set()
    expected |= AUXILIARY if auxiliary else set()
    expected |= {"auxiliary_adversarial"} if adversarial and auxiliary else set()
    assert names(TASK, frozen, Phase(adversarial, auxiliary)) == expected


def test_terms_without_weight_are_dropped():
    objective = ObjectiveConfig(perceptual=0.0, semantic=0.0, discriminator_channels=(4, 8))
    training = TokenizerTask(dataclasses.replace(RUN, objective=objective))
    assert names(training, Frozen(), PLAIN) == {"l2", "codebook", "commitment"} | BESIDE


def test_total_is_the_weighted_sum_of_the_terms(adversarial):
    metrics, objective = adversarial[1], dataclasses.asdict(RUN.objective)
    terms = ALWAYS | AUXILIARY | {"adversarial", "auxiliary_adversarial"}
    objective["feature"] = 1.0  # of the auxiliary terms, the only one without a field
    weights = {name: objective[name.removeprefix("auxiliary_")] for name in terms}
    total = sum(weights[name] * float(metrics[name]) for name in terms)
    assert float(metrics["total"]) == pytest.approx(total, rel=1e-5)


def test_terms_are_those_of_the_reconstructions_before_the_update(
    state, batch, frozen, adversarial
):
    images = pictures.to_float(batch["image"])

    @jit
    def expected(state):
        out = TASK.tokenizer.apply({"params": state.params}, images, auxiliary=True)
        fake = jax.lax.stop_gradient(out.reconstruction)

        def logits(params, images):
            variables = state.discriminator | {"params": params}
            return TASK.discriminator.apply(variables, images, mutable=["batch_stats"])[0]

        def hinge(params):
            real, false = logits(params, images), logits(params, fake)
            return 0.5 * (jnp.maximum(0, 1 - real).mean() + jnp.maximum(0, 1 + false).mean())

        def teacher(images):
            inputs = vit.preprocess(images, TEACHER, 8)
            _, tokens, taps = vit.ViT(TEACHER).apply({"params": frozen.teacher}, inputs, (0, 1, 2))
            return tokens, [taps[i] for i in (0, 0, 1, 2, 2)]  # quarters of two blocks

        tokens, real = teacher(images)
        value, gradient = jax.value_and_grad(hinge)(state.discriminator["params"])
        norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient)))
        params = state.discriminator["params"]
        return {
            "l2": ((out.reconstruction - images) ** 2).mean(),
            "semantic": losses.semantic(out.semantic_features, tokens),
            "perceptual": losses.feature_distance(real, teacher(out.reconstruction)[1]).mean(),
            "auxiliary_l2": ((out.direct - images) ** 2).mean(),
            "auxiliary_feature": out.feature_loss,
            "adversarial": -logits(params, out.reconstruction).mean(),
            "auxiliary_adversarial": -logits(params, out.direct).mean(),
            "discriminator": value,
            "discriminator_gradient_norm": RUN.objective.adversarial * norm,
        }

    for name, value in expected(state).items():
        np.testing.assert_allclose(adversarial[1][name], value, rtol=1e-4, err_msg=name)


# What is computed over a batch is computed over each part: BatchNorm's groups are the parts.
PARTLY = dataclasses.replace(
    RUN,
    objective=dataclasses.replace(
        RUN.objective,
        entropy=0.0,
        perceptual=0.0,
        semantic=0.0,
        auxiliary_steps=0,
        patchgan_groups=2,
    ),
    optimizer=OptimizerConfig(rate=1e-2, warmup_steps=10, weight_decay=0.0),
)


@pytest.fixture(scope="module")
def undivided(state, batch):
    """A step of `PARTLY` on the batch in an order by which its halves are the parts."""
    turns = {"image": batch["image"][[0, 2, 1, 3]]}  # parts are of every other image
    step = jit(TokenizerTask(PARTLY).step, static_argnames="phase")
    return step(state, turns, Frozen(), phase=Phase(True, False))


def test_batch_in_parts_gives_what_the_whole_does(state, batch, undivided):
    expected = undivided
    objective = dataclasses.replace(PARTLY.objective, patchgan_groups=1)
    parts = TokenizerTask(dataclasses.replace(PARTLY, objective=objective, accumulate=2))
    step = jit(parts.step, static_argnames="phase")
    found = step(state, batch, Frozen(), phase=Phase(True, False))
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, err_msg=name)
    codes = [outcome[0].history[-4 * 16 :].reshape(4, 16) for outcome in (found, expected)]
    np.testing.assert_array_equal(codes[0][np.array([0, 2, 1, 3])], codes[1])
    moved = found[0].discriminator["batch_stats"], state.discriminator["batch_stats"]
    assert not equal(*moved)


def test_discriminator_rests_before_its_start(state, plain):
    assert equal(plain[0].discriminator, state.discriminator)
    assert equal(plain[0].discriminator_optimizer, state.discriminator_optimizer)


def test_discriminator_learns_after_its_start(state, adversarial):
    old, new = state.discriminator, adversarial[0].discriminator
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), old, new)
    # While all logits are within the hinges, real and fake cancel in the last bias's gradient.
    del moved["params"]["conv_out"]["bias"]
    assert all(jax.tree.leaves(moved))


def test_discriminator_starts_with_the_rate_of_the_runs_step(state, undivided):
    # Its first update, at step 5, is half-way through the warm-up: 0.01 + 0.99 / 2 of the rate.
    states = (state, undivided[0])
    before, after = (s.discriminator["params"]["conv_out"]["kernel"] for s in states)
    # Adam's first update is the rate, whatever the gradient.
    np.testing.assert_allclose(np.abs(after - before).max(), 1e-2 * 0.505, rtol=1e-2)


@pytest.fixture(scope="module")
def dino():
    """A training with the dino discriminator, its state, its frozen networks and its step."""
    objective = dataclasses.replace(
        RUN.objective, discriminator="dino", perceptual=0.0, semantic=0.0, auxiliary_steps=0
    )
    training = TokenizerTask(dataclasses.replace(RUN, objective=objective), dino=DINO)
    module, images = vit.ViT(DINO), jnp.zeros((1, 6, 6, 3))
    params = jit(lambda key: nn.meta.unbox(module.init(key, images))["params"])(jax.random.key(1))
    state = jit(lambda key: nn.meta.unbox(training.init(key)))(jax.random.key(0))
    step = jit(training.step, static_argnames="phase")
    return training, state, Frozen(dino=params), step


def test_dino_discriminator_learns_and_teaches(dino, batch):
    _, state, frozen, step = dino
    new, metrics = step(state, batch, frozen, phase=Phase(True, False))
    assert {"adversarial"} | OF_DISCRIMINATOR <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values())
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state, new).discriminator
    # A matrix of one row has its singular vectors from the start.
    del moved["batch_stats"]["head"]["conv_out"]
    # While all logits are within the hinges, real and fake cancel in the last bias's gradient.
    del moved["params"]["head"]["conv_out"]["bias"]
    assert all(jax.tree.leaves(moved))


def test_dino_discriminator_sees_images_as_its_key_says(dino, batch):
    training, state, frozen, _ = dino
    images = pictures.to_float(batch["image"])

    @jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def judge(images, key):
        logits, _ = training._discriminate(state.discriminator, images, frozen, key)
        return logits.mean(), logits

    keys = jax.random.split(jax.random.key(0), 2)
    first, again, other = (judge(images, key) for key in (keys[0], keys[0], keys[1]))
    assert equal(first, again)
    assert not np.allclose(first[0][1], other[0][1])
    assert np.abs(first[1]).max((1, 2, 3)).all()  # every image is told what to change


def test_every_parameter_and_the_step_move(state, adversarial):
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, adversarial[0].params)
    still = [path for path, value in jax.tree_util.tree_leaves_with_path(moved) if not value]
    assert not still
    assert adversarial[0].step == 1
    assert equal(state.key, adversarial[0].key)


def test_average_follows_the_weights_closely_at_first(state, plain):
    def check(average, old, new):
        np.testing.assert_allclose(average, 0.1 * old + 0.9 * new, rtol=1e-5, atol=1e-7)

    jax.tree.map(check, *jax.device_get((plain[0].average, state.average, plain[0].params)))


def test_loss_falls_on_one_batch_and_the_teacher_stays(step, state, batch, frozen, plain):
    before = jax.tree.map(np.array, frozen)
    first, (state, _) = float(plain[1]["total"]), plain
    for _ in range(29):
        state, metrics = step(state, batch, frozen, phase=PLAIN)
    assert float(metrics["total"]) < first - 0.1
    assert equal(before, frozen)
    assert metrics["codebook_usage"] > 0
    assert int((state.history >= 0).sum()) == 30 * 4 * 16


QUANTIZERS = {
    "fsq": {"fsq_levels": (4, 4, 2), "code_dim": 3},
    "lfq": {"code_dim": 5},
    "bsq": {"code_dim": 5},
    "ibq": {},
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_tokenizers_with_other_quantizers_learn_and_are_saved(name, tmp_path):
    size = TransformerSize(depth=1, heads=1, width=8)
    changes = {"encoder": size, "decoder": size, "layout": "2d", "latents": 64, "semantic_dim": 0}
    model = dataclasses.replace(RUN.model, quantizer=name, **changes, **QUANTIZERS[name])
    objective = ObjectiveConfig(perceptual=0.0, semantic=0.0, adversarial=0.0, entropy=0.005)
    task = TokenizerTask(dataclasses.replace(RUN, model=model, objective=objective))
    params, images = tiny.fill(tokenizer.param_shapes(model)), tiny.images(4, size=8)
    assert ("codebook" in params) == (name == "ibq")

    def step(params, _):
        def loss(params):
            return task.tokenizer_loss(params, None, images, Frozen(), PLAIN, jax.random.key(0))

        gradients, (metrics, _, _) = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda x, dx: x - 0.1 * dx, params, gradients), metrics

    _, metrics = jit(lambda params: jax.lax.scan(step, params, length=8))(params)
    assert metrics["l2"][-1] < 0.7 * metrics["l2"][0]
    assert (metrics["commitment"][-1] > 0) == (metrics["entropy"][-1] < 0) == (name != "fsq")
    assert (metrics["codebook"][-1] > 0) == (name == "ibq")
    weights = {"params": params, "history": np.array(quantizer.empty_history())}
    bundles.save(tmp_path / "bundle", "tokenizer", model, weights, {})
    loaded = bundles.load(tmp_path / "bundle", "tokenizer", TokenizerConfig)
    assert loaded.config == model
    assert equal(loaded.weights, weights)


def abstract_lpips():
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), images, images)
    return nn.meta.unbox(variables)["params"]


def test_lpips_step_traces():
    objective = ObjectiveConfig(semantic=0.0, discriminator_channels=(4, 8))
    model = dataclasses.replace(RUN.model, image_size=32)
    training = TokenizerTask(dataclasses.replace(RUN, model=model, objective=objective))
    found = names(training, Frozen(lpips=abstract_lpips()), Phase(True, False), size=32)
    assert {"perceptual", "adversarial"} <= found
    assert "semantic" not in found


def test_first_step_of_xl_xxl_lowers_in_a_minute_with_nothing_allocated():
    model = recipes.tokenizer_model("xl_xxl")
    objective = ObjectiveConfig(entropy=0.005)
    teacher = vit.DINOV2["dinov2_vitb14"]
    run = dataclasses.replace(RUN, model=model, objective=objective, dtype="bfloat16")
    training = TokenizerTask(run, teacher)
    allocated = {id(array) for array in jax.live_arrays()}
    start = time.process_time()
    state = nn.meta.unbox(jax.eval_shape(training.init, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(vit.ViT(teacher).init, jax.random.key(0), images)
    params = nn.meta.unbox(variables)["params"]
    batch = {"image": jax.ShapeDtypeStruct((8, 256, 256, 3), np.uint8)}
    step = jax.jit(training.step, donate_argnums=0, static_argnames="phase")
    frozen = Frozen(teacher=params, lpips=abstract_lpips())
    step.lower(state, batch, frozen, phase=training.phase(0))
    assert time.process_time() - start < 60
    new = [array for array in jax.live_arrays() if id(array) not in allocated]
    assert sum(array.nbytes for array in new) < 1e6
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) > 2.8e9


@pytest.mark.parametrize("channels", [(8,), (4, 8, 16, 32)])
def test_discriminator_that_does_not_fit_the_image_is_refused(channels):
    objective = dataclasses.replace(RUN.objective, discriminator_channels=channels)
    with pytest.raises(ValueError, match=r"^objective\.discriminator_channels"):
        TokenizerRun(model=RUN.model, objective=objective)
