"""Numbers of the reference implementation, for synthetic weights."""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gigatok_jax import api
from gigatok_jax.models import discriminators, lpips, quantizer, resize, vit
from gigatok_jax.models.tokenizer import Tokenizer, TokenizerConfig, TransformerSize
from gigatok_jax.training import losses
from gigatok_jax.training.generator import GeneratorRun, GeneratorState, GeneratorTask
from gigatok_jax.training.optimizer import OptimizerConfig, make_optimizer
from gigatok_jax.weights import convert

import reference_discriminators
import synth

# PARITY=whole runs what else takes minutes and hardly differs from what is always run.
WHOLE = os.environ.get("PARITY") == "whole"
STEPS = 6 if WHOLE else 2  # of the optimizer
TINY, S, B = TransformerSize(4, 4, 256), TransformerSize(6, 8, 512), TransformerSize(12, 12, 768)


def close(actual, expected, tolerance=2e-4):
    """Within `tolerance` of the largest magnitude of the expected array."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@functools.lru_cache(maxsize=1)  # hundreds of megabytes each
def tokenizer_variables(name, config):
    return convert.from_torch("tokenizer", synth.checkpoint(name), config)


@pytest.mark.parametrize(
    "name, config",
    [
        ("tokenizer_s_b_2d", TokenizerConfig(S, B, layout="2d")),
        ("tokenizer_s_s", TokenizerConfig(S, S)),  # last, because the next test has it too
    ],
)
def test_tokenizer_outputs_match_reference(name, config):
    expected = synth.expected(f"{name}.npz")
    variables = {"params": tokenizer_variables(name, config)["params"]}
    images = synth.images(2)
    model = Tokenizer(config)

    @functools.partial(jax.jit, static_argnames="methods")
    def run(variables, inputs, methods):
        return [model.apply(variables, inputs, method=method) for method in methods]

    encoding = (Tokenizer.cnn_features, Tokenizer.latents, Tokenizer.encode)
    features, latents, codes = run(variables, images, encoding)
    close(features.transpose(0, 3, 1, 2)[:, :, ::4, ::4], expected["cnn_features"])
    close(latents.transpose(0, 2, 1), expected["prequant"])
    np.testing.assert_array_equal(codes, expected["indices"])
    decoding = (Tokenizer.decoder_grid, Tokenizer.decode, Tokenizer.semantic_features)
    grid, images, semantic = run(variables, codes, decoding)
    close(grid.transpose(0, 3, 1, 2)[:, :, ::4, ::4], expected["decoder_features"])
    close(images.transpose(0, 3, 1, 2)[:, :, ::4, ::4], expected["reconstruction"])
    close(semantic[:, ::16, ::8], expected["semantic_features"])


def test_training_losses_and_every_gradient_match_reference():
    expected = synth.expected("tokenizer_s_s_train.json")
    config = TokenizerConfig(S, S, gradient="rotation")
    params = tokenizer_variables("tokenizer_s_s", TokenizerConfig(S, S))["params"]
    images = synth.images(2)
    target = np.random.default_rng(3).standard_normal((2, 256, 768)).astype(np.float32)

    def loss(params):
        out = Tokenizer(config).apply({"params": params}, images, auxiliary=True)
        terms = {
            "l2": jnp.mean((out.reconstruction - images) ** 2),
            "direct_l2": jnp.mean((out.direct - images) ** 2),
            "codebook": out.codebook_loss,
            "commitment": out.commitment_loss,
            "entropy": out.entropy_loss,
            "feature": out.feature_loss,
            "semantic": losses.semantic(out.semantic_features, target),
        }
        weighted = terms | {"semantic": 0.5 * terms["semantic"]}
        return sum(weighted.values()), terms

    if WHOLE:  # the gradients take 10 GB
        loss = jax.value_and_grad(loss, has_aux=True)
    result = jax.jit(loss)(params)
    (total, terms), gradients = result if WHOLE else (result, None)
    for name, value in (terms | {"total": total}).items():
        assert value == pytest.approx(expected["losses"][name], rel=1e-4, abs=1e-8), name
    if not WHOLE:
        return
    gradients = convert.to_torch("tokenizer", {"params": gradients}, config)
    assert gradients.keys() == expected["gradient_norms"].keys()
    for name, norm in expected["gradient_norms"].items():
        assert np.linalg.norm(gradients[name]) == pytest.approx(norm, rel=1e-3, abs=1e-7), name


@pytest.mark.skipif(not WHOLE, reason="10 GB and minutes; AdamW is compared elsewhere too")
def test_optimizer_steps_match_reference():
    expected = synth.expected("tokenizer_tiny_tiny_steps.json")
    config = TokenizerConfig(TINY, TINY, gradient="rotation")
    params = tokenizer_variables("tokenizer_tiny_tiny", config)["params"]
    images = synth.images(2)
    target = np.random.default_rng(3).standard_normal((2, 256, 768)).astype(np.float32)
    adamw = make_optimizer(OptimizerConfig(schedule="constant", warmup_steps=0), len(expected))

    def loss(params, images, target):
        out = Tokenizer(config).apply({"params": params}, images)
        terms = {
            "l2": jnp.mean((out.reconstruction - images) ** 2),
            "codebook": out.codebook_loss,
            "commitment": out.commitment_loss,
            "semantic": losses.semantic(out.semantic_features, target),
        }
        weighted = terms | {"semantic": 0.5 * terms["semantic"]}
        return sum(weighted.values()), terms

    @jax.jit
    def step(params, state, images, target):
        (total, terms), gradients = jax.value_and_grad(loss, has_aux=True)(params, images, target)
        terms |= {"total": total, "gradient_norm": optax.tree.norm(gradients)}
        updates, state = adamw.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, terms

    state = adamw.init(params)
    for row in expected[:STEPS]:
        params, state, terms = step(params, state, images, target)
        for name, value in row.items():
            assert terms[name] == pytest.approx(value, rel=1e-3), (name, json.dumps(row))


@functools.lru_cache(maxsize=1)
def generator(name):
    return api.generator_from_torch(synth.checkpoint(f"gpt_{name}"), name.replace("_", ","))


@pytest.mark.parametrize("name", ["b", "b_2d"])
def test_generator_outputs_match_reference(name):
    expected, model = synth.expected(f"gpt_{name}.npz"), generator(name)
    logits = model.logits(expected["indices"], expected["classes"])
    close(logits[:, ::16, ::64], expected["logits"])
    loss = losses.cross_entropy(logits, expected["indices"]).mean()
    assert loss == pytest.approx(float(expected["loss"]), rel=1e-4)
    features = model.features(expected["indices"], layer=6)
    close(features[:, ::16, ::8], expected["middle_features"])


GREEDY = [
    ("b", "greedy_step", {"guidance": 1.75, "schedule": "step", "schedule_start": 0.18}),
    ("b", "greedy_linear", {"guidance": 2.0, "schedule": "linear"}),
    ("b", "greedy_constant", {"guidance": 2.0}),
    ("b", "greedy_nocfg", {}),
    ("b_2d", "greedy_step", {"guidance": 1.75, "schedule": "step", "schedule_start": 0.18}),
    ("b_2d", "greedy_linear", {"guidance": 2.0, "schedule": "linear"}),
    ("b_2d", "greedy_constant", {"guidance": 2.0}),
    ("b_2d", "greedy_nocfg", {}),
]


@pytest.mark.parametrize("name, case, guidance", GREEDY if WHOLE else GREEDY[:1])
def test_greedy_codes_match_reference(name, case, guidance):
    expected, model = synth.expected(f"gpt_{name}.npz"), generator(name)
    codes = model.sample(expected["classes"], jax.random.key(0), temperature=0, **guidance)
    np.testing.assert_array_equal(codes, expected[case])


def test_generator_optimizer_steps_match_reference():
    expected, inputs = synth.expected("gpt_b_steps.json"), synth.expected("gpt_b.npz")
    model = generator("b")
    run = GeneratorRun(
        model=dataclasses.replace(model.config, dropout=0.0),
        optimizer=OptimizerConfig(
            rate=1e-4, schedule="constant", weight_decay=0.05, decayed="matrices", clip=1.0
        ),
        steps=len(expected),
        class_dropout=0.0,
        remat="full",  # bounds the memory
    )
    task, params = GeneratorTask(run), model.variables["params"]
    adamw = make_optimizer(run.resolved_optimizer, run.total_steps)
    state = GeneratorState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(0)),
        params=params,
        optimizer=adamw.init(params),
        average=None,
    )
    step = jax.jit(functools.partial(task.step, frozen=None), donate_argnums=0)
    batch = {"codes": inputs["indices"], "label": inputs["classes"]}
    for row in expected[:STEPS]:
        state, metrics = step(state, batch)
        assert metrics["total"] == pytest.approx(row["loss"], rel=1e-3)
        assert metrics["gradient_norm"] == pytest.approx(row["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("rule", ["straight_through", "rotation"])
def test_quantizer_matches_reference(rule):
    expected = synth.expected("quantizer_losses.npz")
    z = expected["z"].transpose(0, 2, 3, 1).reshape(2, 64, 8)
    upstream = expected["upstream"].transpose(0, 2, 3, 1).reshape(2, 64, 8)

    def quantize(z):
        z, codebook = map(quantizer.normalize, (z, jnp.asarray(expected["codebook"])))
        codes, entropy = quantizer.search(z, codebook, entropy=True, chunk_elements=512 * 16)
        q = codebook[codes]
        mse = jnp.mean((q - z) ** 2)
        return quantizer.pass_gradient(z, q, rule), codes, entropy, mse

    quantized, backward = jax.vjp(lambda z: quantize(z)[0], z)
    _, codes, entropy, mse = quantize(z)
    channels_first = expected[f"{rule}_quantized"].transpose(0, 2, 3, 1).reshape(2, 64, 8)
    close(quantized, channels_first)
    gradient = expected[f"{rule}_grad_z"].transpose(0, 2, 3, 1).reshape(2, 64, 8)
    close(backward(jnp.asarray(upstream))[0], gradient)
    np.testing.assert_array_equal(codes.reshape(-1), expected[f"{rule}_indices"])
    assert mse == pytest.approx(expected["codebook_loss"], rel=1e-4)
    assert 0.25 * mse == pytest.approx(expected["commitment_loss"], rel=1e-4)
    # The reference's figure has the entropy loss's weight in it.
    assert 0.005 * entropy == pytest.approx(expected["entropy_loss"], rel=1e-4)


def test_hinge_losses_match_reference():
    expected = synth.expected("quantizer_losses.npz")
    real, fake = expected["logits_real"], expected["logits_fake"]
    discriminator = losses.hinge_discriminator(real, fake)
    assert discriminator == pytest.approx(expected["hinge_discriminator"], rel=1e-4)
    assert losses.hinge_generator(fake) == pytest.approx(expected["hinge_generator"], rel=1e-4)


def test_lpips_matches_reference():
    tensors = synth.checkpoint("lpips_vgg16")
    tensors = {k: np.abs(v) if k.startswith("lin") else v for k, v in tensors.items()}
    params = convert.from_torch("lpips", tensors)["params"]
    expected = synth.expected("lpips.npz")
    images, others = synth.images(2), synth.images(2, salt="0b")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def distance(others, images, params):
        d = lpips.LPIPS().apply({"params": params}, images, others)
        return d.mean(), d

    (_, value), gradient = distance(others, images, params)
    close(value, expected["distance"])
    gradient = gradient.transpose(0, 3, 1, 2)[:, :, ::8, ::8]
    error = np.linalg.norm(gradient - expected["grad_second"])
    assert error <= 1e-2 * np.linalg.norm(expected["grad_second"])


def test_patchgan_matches_reference():
    variables = reference_discriminators.patchgan(synth.checkpoint("patchgan"))
    expected = synth.expected("patchgan.npz")
    model = discriminators.PatchGAN()
    images = synth.images(2)
    close(
        model.apply(variables, images, train=False).transpose(0, 3, 1, 2), expected["eval_logits"]
    )
    logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
    close(logits.transpose(0, 3, 1, 2), expected["train_logits"])
    # The reference's file holds the running statistics as they were before the call; PyTorch's
    # rule, momentum 0.1 and unbiased variance, is checked on the first normalised layer's input.
    _, seen = model.apply(
        variables, images, mutable=["batch_stats", "intermediates"], capture_intermediates=True
    )
    inputs = np.asarray(seen["intermediates"]["conv1"]["__call__"][0], np.float64)
    inputs = inputs.reshape(-1, inputs.shape[-1])
    before, after = variables["batch_stats"]["norm1"], updated["batch_stats"]["norm1"]
    np.testing.assert_array_equal(before["mean"], expected["main__3__running_mean__after"])
    close(after["mean"], 0.9 * before["mean"] + 0.1 * inputs.mean(0))
    close(after["var"], 0.9 * before["var"] + 0.1 * inputs.var(0, ddof=1))


def test_dino_discriminator_matches_reference():
    expected = synth.expected("dino_disc.npz")
    config = vit.DINO["dino_vits16"]
    # The reference zeroes the keys' biases, on which attention does not depend.
    params = convert.from_torch("dino", synth.checkpoint("dino_vits16"), config)["params"]
    variables = reference_discriminators.dino_heads(dino_heads())

    @jax.jit
    def judge(params, variables, images):
        images = resize.area(vit.normalize(images, config), 224)
        taps, method = vit.quarters(config), vit.ViT.readouts
        features = vit.ViT(config).apply({"params": params}, images, taps, method=method)
        logits = discriminators.DinoHeads().apply(variables, features, train=False)
        return features, logits

    features, logits = judge(params, variables, synth.images(2))
    close(features.transpose(0, 1, 3, 2)[:, :, ::8, ::8], expected["activations"])
    close(logits, expected["logits"])


def dino_heads():
    """The heads' checkpoint, with the singular vectors that its kernels have."""
    tensors = synth.checkpoint("dino_disc_heads")
    for name in [name for name in tensors if name.endswith("weight_orig")]:
        kernel = tensors[name].reshape(len(tensors[name]), -1)
        left, _, right = np.linalg.svd(kernel, full_matrices=False)
        conv = name.removesuffix("orig")
        tensors[f"{conv}u"], tensors[f"{conv}v"] = left[:, 0], right[0]
    return tensors


def test_dinov2_matches_reference():
    config = vit.DINOV2["dinov2_vitb14"]
    params = convert.from_torch("dinov2", synth.checkpoint("dinov2_vitb14"), config)["params"]
    expected = synth.expected("dinov2_vitb14.npz")
    params["positions"] = vit.resize_positions(params["positions"], 16)
    close(params["positions"][::16, ::8], expected["position_embedding"])
    images = vit.preprocess(synth.images(2), config, 16)
    close(images.transpose(0, 3, 1, 2)[:, :, ::8, ::8], expected["resized"])
    class_token, tokens, _ = jax.jit(vit.ViT(config).apply)({"params": params}, images)
    close(tokens[:, ::8, ::8], expected["patch_tokens"])
    close(class_token[:, ::8], expected["class_token"])
