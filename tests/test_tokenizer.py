"""The tokenizer: checks, shapes, queries, axis names, remat, types, cost of tracing."""

import dataclasses
import functools
from unittest import mock

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import sharding
from gigatok_jax.models import cnn, layers, norms
from gigatok_jax.models.tokenizer import (
    Tokenizer,
    TokenTransformer,
    TransformerSize,
    pool_queries,
)
from gigatok_jax.sharding import RULES

import jaxprs
import tiny

FSQ = {"quantizer": "fsq", "fsq_levels": (4, 4, 4), "code_dim": 3}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_size": 30}, "image_size: expected a multiple of 4 .*got 30"),
        ({"image_size": 0}, "image_size: expected greater than 0, got 0"),
        ({"latents": 12}, "latents: expected a power of two in a 1d tokenizer, got 12"),
        ({"latents": 0}, "latents: expected greater than 0"),
        ({"latents": 256}, "latents: the queries are pooled from 8x16 blocks, which do not"),
        ({"layout": "2d"}, "latents: expected 64 .the 8x8 grid. in a 2d tokenizer, got 16"),
        ({"layout": "3d"}, "layout: expected '1d' or '2d', got '3d'"),
        ({"semantic_layer": 3}, r"semantic_layer: expected 1\.\.2 \(the decoder's depth\), got 3"),
        ({"semantic_layer": 0}, r"semantic_layer: expected 1\.\.2"),
        ({"semantic_dim": -1}, "semantic_dim: expected greater than or equal to 0"),
        ({"channel_multipliers": ()}, "channel_multipliers: expected at least one"),
        ({"channel_multipliers": (1, 0)}, r"channel_multipliers\.1: expected greater than 0"),
        ({"codebook_size": 1}, "codebook_size: expected greater than or equal to 2, got 1"),
        ({"gradient": "gumbel"}, "gradient: expected 'straight_through' or 'rotation', got 'gumb"),
        ({"dropout": 1.0}, "dropout: expected less than 1, got 1.0"),
        ({"quantizer": "rvq"}, "quantizer: expected 'vq', 'fsq', 'lfq', 'bsq' or 'ibq', got 'rvq'"),
        ({"fsq_levels": (8, 8)}, r"fsq_levels: expected none with quantizer='vq', got \(8, 8\)"),
        (FSQ | {"code_dim": 8}, r"fsq_levels: expected one for each of code_dim=8 .*\(4, 4, 4\)"),
        (FSQ | {"codebook_size": 60}, "codebook_size: expected 64, the product of .*got 60"),
        (FSQ | {"fsq_levels": (4, 16, 1)}, r"fsq_levels\.2: expected greater than or equal to 2"),
        ({"quantizer": "lfq"}, r"codebook_size: expected 2\^8 with quantizer='lfq' and .*, got 64"),
        (
            {"quantizer": "ibq", "gradient": "rotation"},
            "gradient: expected 'straight_through' with quantizer='ibq', got 'rotation'",
        ),
        (
            FSQ | {"codebook_size": 64, "normalize_codes": False},
            "normalize_codes: expected True with quantizer='fsq', got False",
        ),
    ],
)
def test_impossible_configuration_names_its_field(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tiny.config(**changes)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"^width: expected a multiple of heads=3, got 16"):
        TransformerSize(1, 3, 16)
    with pytest.raises(ValueError, match=r"^depth: expected greater than 0, got 0"):
        TransformerSize(depth=0, heads=2, width=16)


def test_configurations_are_static_arguments():
    size, config = TransformerSize(1, 2, 16), tiny.config()
    assert hash(config) == hash(tiny.config()) and config != tiny.config(code_dim=4)
    assert dataclasses.replace(config, code_dim=4) == tiny.config(code_dim=4)
    assert dataclasses.asdict(size) == {"depth": 1, "heads": 2, "width": 16}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.latents = 8


def test_semantic_layer_does_not_matter_without_a_projector():
    assert tiny.config(semantic_dim=0, semantic_layer=9).semantic_dim == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": "2d", "latents": 144, "image_size": 48},
        {
            "image_size": 48,
            "latents": 8,
            "code_dim": 3,
            "codebook_size": 100,
            "encoder": TransformerSize(2, 1, 12),
            "decoder": TransformerSize(1, 4, 32),
        },
        {
            "image_size": 4,
            "latents": 1,
            "channel_multipliers": (1, 2),
            "normalize_codes": False,
            "gradient": "rotation",
            "semantic_dim": 0,
        },
        FSQ,
        {"quantizer": "lfq", "code_dim": 6},
        {"quantizer": "bsq", "code_dim": 6},
        {"quantizer": "ibq"},
    ],
)
def test_shapes_follow_the_configuration(changes):
    config = tiny.config(**changes)
    images = jax.ShapeDtypeStruct((2, config.image_size, config.image_size, 3), jnp.float32)
    model = Tokenizer(config)
    variables = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))

    def shape(method, *args, **kwargs):
        apply = functools.partial(model.apply, method=method, **kwargs)
        return jax.eval_shape(apply, variables, *args)

    cells, width = config.grid**2, config.decoder.width
    codes = shape(Tokenizer.encode, images)
    assert (codes.shape, codes.dtype) == ((2, config.latents), jnp.int32)
    assert shape(Tokenizer.latents, images).shape == (2, config.latents, config.code_dim)
    encoded = shape(Tokenizer.encoder_features, images)
    assert encoded.shape == (2, config.latents, config.encoder.width)
    assert shape(Tokenizer.decode, codes).shape == images.shape
    assert shape(Tokenizer.decoder_features, codes, layer=1).shape == (2, cells, width)
    out = shape(None, images, entropy=True, auxiliary=True)
    assert out.reconstruction.shape == out.direct.shape == images.shape
    assert out.codes.shape == codes.shape
    assert ("codebook" in variables["params"]) == config.has_codebook
    scalars = out.codebook_loss, out.commitment_loss, out.entropy_loss, out.feature_loss
    assert all(scalar.shape == () for scalar in scalars)
    if config.semantic_dim:
        assert out.semantic_features.shape == (2, cells, config.semantic_dim)
        assert shape(Tokenizer.semantic_features, codes).shape == out.semantic_features.shape
    else:
        assert out.semantic_features is None and "projector" not in variables["params"]


@pytest.mark.parametrize("count, side", [(1, 4), (2, 4), (8, 4), (16, 4), (64, 8), (32, 24)])
def test_queries_are_block_means_of_ever_finer_levels(count, side):
    grid = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
    expected, rows, columns = [grid.mean((1, 2))], 1, 1
    while len(expected) < count:
        height, width = side // rows, side // columns
        for i in range(rows):
            for j in range(columns):
                block = grid[:, i * height : (i + 1) * height, j * width : (j + 1) * width]
                expected.append(block.mean((1, 2)))
        rows, columns = (rows, 2 * columns) if rows == columns else (2 * rows, columns)
    queries = pool_queries(jnp.asarray(grid), count)
    np.testing.assert_allclose(queries, np.stack(expected, 1), atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"layout": "2d", "latents": 64}])
def test_every_parameter_names_its_axes(changes):
    model = Tokenizer(tiny.config(**changes))
    variables = jax.eval_shape(model.init, jax.random.key(0), tiny.images(1))
    boxes = jax.tree_util.tree_leaves_with_path(
        variables["params"], is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
    )
    assert len(boxes) > 50
    known = {name for name, _ in RULES} | {None}
    for path, box in boxes:
        path = jax.tree_util.keystr(path)
        assert isinstance(box, nn.LogicallyPartitioned), path
        assert len(box.names) == box.value.ndim, path
        assert set(box.names) <= known, path
        assert (box.names[0] == "layers") == ("['layers']" in path), path
        if box.value.ndim > 1 and "quant_conv" not in path:
            assert set(box.names) - {None, "layers"}, path


class Blocks(nn.Module):
    """A block of the CNN and two transformer layers, under a remat policy."""

    remat: str

    @nn.compact
    def __call__(self, images):
        x = cnn.residual_block(0.0, self.remat, images.dtype)(4, name="cnn")(images)
        x = x.reshape(len(x), -1, 4)
        block = functools.partial(layers.Block, heads=2)
        return layers.Transformer(2, block, self.remat, name="transformer")(x)[0]


def test_remat_changes_neither_the_output_nor_a_gradient():
    images = tiny.images(1, size=4)
    params = tiny.fill(layers.param_shapes(Blocks("none"), images.shape))

    def run(remat):
        def total(params, images):
            output = Blocks(remat).apply({"params": params}, images)
            return jnp.sum(jnp.sin(output)), output

        gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
        # It runs once: optimizing would take most of the time.
        options = {"xla_backend_optimization_level": 0}
        return jax.jit(gradient, compiler_options=options)(params, images)

    expected = run("none")
    for remat in ("dots", "full"):
        chex.assert_trees_all_close(run(remat), expected, rtol=1e-4, atol=1e-5)


def test_backward_pass_does_not_recompute_statistics():
    x = jnp.ones((2, 8, 8, 32))

    def sums_of_pixels(remat):
        norm = cnn.norm_silu(remat=remat, dtype=x.dtype, name=None)
        params = {"params": {"scale": jnp.ones(32), "bias": jnp.zeros(32)}}
        program = jax.make_jaxpr(jax.grad(lambda *px: norm.apply(*px).sum(), (0, 1)))(params, x)
        return sum(
            e.primitive.name == "reduce_sum" and e.params["axes"] == (1, 2)
            for e in jaxprs.equations(program)
        )

    assert sums_of_pixels("dots") == sums_of_pixels("none")


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_reaches_every_block_of_both_halves(remat):
    def recomputed(remat):
        model = Tokenizer(tiny.config(), remat=remat)
        program = jax.make_jaxpr(model.init)(jax.random.key(0), tiny.images(1))
        return sum(e.primitive.name.startswith("remat") for e in jaxprs.equations(program))

    # CNN blocks: a level each and two in the middle to encode, two a level and two in the middle
    # to decode, of two norms each, and a norm behind them; and one scanned layer a transformer.
    blocks = (3 + 2) + (2 * 3 + 2)
    expected = {"full": blocks + 2, "dots": 2 * blocks + 2 + 2}
    assert recomputed(remat) - recomputed("none") == expected[remat]


def test_bfloat16_is_the_type_between_float32_parameters_and_outputs():
    config = tiny.config()
    model = Tokenizer(config, dtype=jnp.bfloat16)
    images = tiny.images(1)
    variables = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def outputs(variables, images):
        out = model.apply(variables, images, entropy=True, auxiliary=True)
        apply = functools.partial(model.apply, variables)
        return [
            out.replace(codes=None),
            apply(images, method=Tokenizer.latents),
            apply(images, method=Tokenizer.encoder_features),
            apply(out.codes, method=Tokenizer.decode),
            apply(out.codes, method=Tokenizer.decoder_grid),
            apply(out.codes, layer=2, method=Tokenizer.decoder_features),
        ]

    program, shapes = jax.make_jaxpr(outputs, return_shape=True)(variables, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    types = {"conv_general_dilated": set(), "dot_general": set()}
    for equation in jaxprs.equations(program):
        if equation.primitive.name in types:
            operand = equation.invars[0].aval
            searched = operand.shape[-1] == config.code_dim and operand.ndim == 2
            if not searched:
                types[equation.primitive.name].add(operand.dtype)
    assert types["conv_general_dilated"] == {jnp.dtype("bfloat16")}
    assert jnp.dtype("bfloat16") in types["dot_general"]


def test_program_does_not_grow_with_depth():
    def size(depth):
        stack = TransformerSize(depth, 2, 16)
        config = tiny.config(encoder=stack, decoder=stack)
        module, features = TokenTransformer(config, decoder=False), jnp.ones((1, 64, 8))
        params = layers.param_shapes(module, features.shape)

        def total(params):
            return module.apply({"params": params}, features)[0].sum()

        return sum(1 for _ in jaxprs.equations(jax.make_jaxpr(jax.grad(total))(params)))

    assert size(2) == size(8)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("given", ["learned", "given", "neither"])
@pytest.mark.parametrize("silu", [True, False])
def test_gradient_of_group_norm_is_that_of_its_definition(platform, given, silu):
    x = 1 + 2 * jax.random.normal(jax.random.key(0), (3, 8, 6, 16))
    shape = {"learned": (16,), "given": (3, 1, 1, 16), "neither": ()}[given]
    gain, offset = (1 + jax.random.normal(jax.random.key(n), shape) for n in (1, 2))
    gain, offset = (gain, offset) if shape else (1.0, 0.0)

    def plain(x, gain, offset):
        groups = x.reshape(3, 48, norms.group_count(16), -1)
        mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
        y = ((groups - mean) * jax.lax.rsqrt(var + 1e-6)).reshape(x.shape) * gain + offset
        return nn.silu(y) if silu else y

    def ours(x, gain, offset):
        params = {"params": {"scale": gain, "bias": offset}} if given == "learned" else {}
        parts = (gain, offset) if given == "given" else ()
        return norms.GroupNorm(given == "learned", silu).apply(params, x, *parts)

    weights = jnp.cos(jnp.arange(x.size)).reshape(x.shape)
    with mock.patch.object(sharding, "platform", return_value=platform):
        found, expected = (
            jax.value_and_grad(lambda *args, f=f: (f(*args) * weights).sum(), (0, 1, 2))(
                x, gain, offset
            )
            for f in (ours, plain)
        )
    if given == "neither":
        found, expected = ((value, gradients[0]) for value, gradients in (found, expected))
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-5)
