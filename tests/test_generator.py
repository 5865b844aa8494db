"""The generator: sizes, the reference's tensors, what is computed with and without a cache."""

import functools
import hashlib
import json
import math
import pathlib
from typing import get_args
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import api, recipes, sharding
from gigatok_jax.errors import UserError
from gigatok_jax.models import layers, vqgan
from gigatok_jax.models.generator import (
    AdaLN,
    Block,
    Decoder,
    Generator,
    GeneratorConfig,
    Positions,
    param_shapes,
    rotation,
)
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.sharding import RULES
from gigatok_jax.training import losses
from gigatok_jax.weights import convert, fetch

import tiny

# Of each of the reference's checkpoints, as in `tokenizer_manifests.json`.
MANIFESTS = json.loads(
    (pathlib.Path(__file__).parent / "data" / "generator_manifests.json").read_text()
)
VARIANTS = [
    {"positions": positions, "adaln": adaln}
    for positions in get_args(Positions)
    for adaln in get_args(AdaLN)
]
WITH_QK_NORM = [{"positions": positions, "qk_norm": True} for positions in ("learned", "rotary_2d")]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))


def narrow(**changes) -> GeneratorConfig:
    """Nine codes of 24, heads of eight dimensions."""
    options = {"depth": 2, "heads": 2, "width": 16, "codes": 9, "codebook_size": 24, "classes": 5}
    return GeneratorConfig(**(options | changes))


def parameters(config: GeneratorConfig) -> dict:
    """Random, those that are zero at first too."""
    return tiny.fill(param_shapes(config))


def inputs(config: GeneratorConfig) -> tuple[np.ndarray, np.ndarray]:
    """Codes and classes of nine images: one batch size, so that programs compile once."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, config.codebook_size, (9, config.codes), np.int32)
    return codes, np.arange(9, dtype=np.int32) % (config.null_class + 1)


def jit(function):
    """Compiled without optimizations, which take longer than what is run here."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


@functools.cache
def compiled(config, method, train, **kwargs):
    module = Generator(config, train=train)

    def apply(params, key, *args):
        return module.apply(
            {"params": params}, *args, rngs={"dropout": key}, method=method, **kwargs
        )

    return jit(apply)


def run(config, params, *args, method=Generator.__call__, train=False, seed=0, **kwargs):
    key = jax.random.key(seed)
    return np.asarray(compiled(config, method, train, **kwargs)(params, key, *args))


@pytest.mark.parametrize(
    "name, count",
    [
        ("b", 111_085_824),
        ("l", 343_174_144),
        ("xl", 775_028_480),
        ("xxl", 1_411_367_424),
        ("b,2d", 110_888_448),
    ],
)
def test_parameter_counts_are_the_references(name, count):
    assert api.parameter_count(f"generator:{name}") == count == MANIFESTS[name]["parameters"]


# Depth, heads and width (autoregressive/models/gpt.py), and the parameters in the README.
LLAMAGEN = {
    "b": (12, 12, 768, "111M"),
    "l": (24, 16, 1024, "343M"),
    "xl": (36, 20, 1280, "775M"),
    "xxl": (48, 24, 1536, "1.4B"),
    "3b": (24, 32, 3200, "3.1B"),
}


@pytest.mark.parametrize("name", LLAMAGEN)
def test_llamagens_generators_have_their_sizes(name):
    depth, heads, width, published = LLAMAGEN[name]
    model = recipes.generator_model(f"{name},2d,384")
    assert (model.depth, model.heads, model.width, model.codes) == (depth, heads, width, 576)
    hidden = int(2 * 4 * width / 3)
    hidden += -hidden % 256
    count = depth * (4 * width**2 + 3 * width * hidden + 2 * width)
    count += (1_001 + 2 * 16_384 + 1) * width
    assert api.parameter_count(f"generator:{name},2d,384") == count
    assert api.parameter_count(f"generator:{name},2d") == count  # there is no table of positions
    digits, unit = (0, 1e6) if published.endswith("M") else (1, 1e9)
    assert f"{count / unit:.{digits}f}{published[-1]}" == published


def test_published_llamagens_are_of_known_architectures():
    published = {n: p for n, p in fetch.PUBLISHED.items() if n.startswith("llamagen_gpt_")}
    assert len(published) == 7
    for name, entry in published.items():
        size, pixels = name.removeprefix("llamagen_gpt_").partition("_")[::2]
        model = recipes.generator_model(entry.model)
        assert entry.model == f"{size},2d,384" if pixels else f"{size},2d"
        assert entry.files[0].name == f"c2i_{size.upper()}_{pixels or 256}.pt"
        tokenizer = vqgan.MODELS[entry.tokenizer]
        assert (model.codes, model.codebook_size) == (tokenizer.latents, tokenizer.codebook_size)
        assert SamplingConfig(**entry.sampling).schedule == "constant"


@pytest.mark.parametrize("name", ["generator:c", "generator:b,3d", "generators:b", "b,2d"])
def test_unknown_generator_has_no_parameter_count(name):
    with pytest.raises(UserError, match="no such"):
        api.parameter_count(name)


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_generator_has_exactly_the_references_tensors(name):
    config = recipes.generator_model(name)
    shapes = tiny.torch_shapes("generator", config)
    assert len(shapes) == MANIFESTS[name]["tensors"]
    listing = "".join(sorted(f"{n} {list(shape)}\n" for n, shape in shapes.items()))
    assert hashlib.sha256(listing.encode()).hexdigest() == MANIFESTS[name]["sha256"]


def tensors(config: GeneratorConfig) -> dict[str, np.ndarray]:
    """A checkpoint in which no two elements of a tensor are alike."""
    return tiny.numbered(tiny.torch_shapes("generator", config))


@every_variant
@pytest.mark.parametrize("qk_norm", [False, True])
def test_reference_generator_comes_back_bit_for_bit(variant, qk_norm):
    config = narrow(qk_norm=qk_norm, **variant)
    original = tensors(config)
    back = convert.to_torch("generator", convert.from_torch("generator", original, config), config)
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert back[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize(
    "changes, more",
    [
        ({"positions": "learned"}, {"positional_embedding": (10, 16)}),
        (
            {"qk_norm": True},
            {
                f"layers.{layer}.attention.{norm}.{leaf}": (8,)
                for layer in range(2)
                for norm in ("q_norm", "k_norm")
                for leaf in ("weight", "bias")
            },
        ),
        (
            {"adaln": "block"},
            {
                "final_adaLN.1.weight": (32, 16),
                "final_adaLN.1.bias": (32,),
                "layers.0.adaLN_modulation.1.weight": (96, 16),
                "layers.0.adaLN_modulation.1.bias": (96,),
                "layers.1.adaLN_modulation.1.weight": (96, 16),
                "layers.1.adaLN_modulation.1.bias": (96,),
            },
        ),
        (
            {"adaln": "shared"},
            {
                "final_adaLN.1.weight": (32, 16),
                "final_adaLN.1.bias": (32,),
                "adaLN.1.weight": (96, 16),
                "adaLN.1.bias": (96,),
                "layers.0.ada_gss": (1, 1, 6, 16),
                "layers.1.ada_gss": (1, 1, 6, 16),
            },
        ),
    ],
)
def test_options_add_the_references_tensors_and_no_others(changes, more):
    plain = {name: x.shape for name, x in tensors(narrow(positions="rotary")).items()}
    config = narrow(**({"positions": "rotary"} | changes))
    assert {name: x.shape for name, x in tensors(config).items()} == plain | more


def test_tensors_of_options_go_to_their_own_place():
    config = narrow(qk_norm=True, adaln="shared")
    file = tensors(config)
    params = convert.from_torch("generator", file, config)["params"]
    block = params["layers"]["block"]
    for layer in range(2):
        name = f"layers.{layer}"
        for theirs, ours in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            norm = block["attention"][ours]
            weight, bias = (file[f"{name}.attention.{theirs}.{x}"] for x in ("weight", "bias"))
            np.testing.assert_array_equal(norm["scale"][layer], weight)
            np.testing.assert_array_equal(norm["bias"][layer], bias)
        np.testing.assert_array_equal(block["offset"][layer], file[f"{name}.ada_gss"][0, 0])
    for theirs, ours in (("adaLN.1", "modulation"), ("final_adaLN.1", "modulation_out")):
        np.testing.assert_array_equal(params[ours]["kernel"], file[f"{theirs}.weight"].T)


def test_constants_of_old_checkpoints_are_ignored():
    config = narrow(positions="rotary")
    extra = ("freqs_cis", "causal_mask", "layers.1.attention.kv_cache.k_cache")
    old = tensors(config) | {name: np.zeros(3, np.float32) for name in extra}
    back = convert.to_torch("generator", convert.from_torch("generator", old, config), config)
    assert back.keys() == tensors(config).keys()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 3}, r"'layers\.2\..*' is missing"),
        ({"depth": 1}, r"'layers\.1\..*' of shape \[.*\] does not belong"),
        ({"positions": "rotary"}, r"'positional_embedding' of shape \[10, 16\] does not belong"),
        ({"qk_norm": True}, r"'layers\.0\.attention\.q_norm\.weight' is missing"),
        ({"codes": 16}, r"'positional_embedding' has shape \[10, 16\].* needs \[17, 16\]"),
        ({"classes": 6}, r"'cls_embedding\..*' has shape \[6, 16\].* needs \[7, 16\]"),
    ],
)
def test_checkpoint_of_another_architecture_names_the_tensor(changes, message):
    with pytest.raises(ValueError, match=message):
        convert.from_torch("generator", tensors(narrow()), narrow(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"depth": 0}, "depth: expected greater than 0, got 0"),
        ({"width": -16}, "width: expected greater than 0, got -16"),
        ({"codebook_size": 1}, "codebook_size: expected greater than or equal to 2, got 1"),
        ({"positions": "sine"}, "positions: expected 'learned', .*, got 'sine'"),
        ({"adaln": "all"}, "adaln: expected 'none', .*, got 'all'"),
        ({"dropout": 1.0}, "dropout: expected less than 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: expected greater than or equal to 0, got -0.1"),
        ({"heads": 3}, "width: expected a multiple of 3 for 3 heads and learned positions, got 16"),
        ({"width": 6, "positions": "rotary"}, "width: expected a multiple of 4 for 2 heads"),
        ({"width": 12, "positions": "rotary_2d"}, "width: expected a multiple of 8 "),
        ({"codes": 8, "positions": "rotary_2d"}, "codes: expected a square .*, got 8"),
    ],
)
def test_impossible_configuration_names_its_field(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        narrow(**changes)


def test_learned_positions_allow_any_head_and_length():
    assert narrow(width=6, codes=8).positions == "learned"
    assert narrow(width=12, codes=8, positions="rotary").codes == 8


def silu(x):
    return x / (1 + np.exp(-x))


def plain_rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * scale


def plain_layer_norm(x, norm):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]


def plain_rotation(x, config):
    """Pairs as complex numbers, turned; the class vanishes."""
    dims = x.shape[-1]
    turned = np.zeros_like(x)
    for position in range(1, x.shape[1]):
        if config.positions == "rotary":
            angles = [(position - 1) * 10_000 ** (-2 * f / dims) for f in range(dims // 2)]
        else:
            place, half = divmod(position - 1, math.isqrt(config.codes)), dims // 2
            angles = [axis * 10_000 ** (-2 * f / half) for axis in place for f in range(half // 2)]
        pairs = x[:, position, :, ::2] + 1j * x[:, position, :, 1::2]
        pairs = pairs * np.exp(1j * np.array(angles))
        turned[:, position, :, ::2], turned[:, position, :, 1::2] = pairs.real, pairs.imag
    return turned


def plain_attention(x, params, config):
    q, k, v = (
        np.einsum("btw,wnh->btnh", x, params[name]["kernel"]) for name in ("query", "key", "value")
    )
    if config.qk_norm:
        q = plain_layer_norm(q, params["query_norm"])
        k = plain_layer_norm(k, params["key_norm"])
    if config.positions != "learned":
        q, k = plain_rotation(q, config), plain_rotation(k, config)
    weights = np.exp(np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]))
    weights *= np.tri(x.shape[1])
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh,nhw->btw", weights, v, params["out"]["kernel"])


def plain_program(config, params, codes, classes):
    """All layers' outputs, the embeddings first, and the logits, in NumPy and float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = np.concatenate([params["class_embedding"][classes][:, None], params["embedding"][codes]], 1)
    if config.positions == "learned":
        x += params["positions"][: x.shape[1]]
    condition, outputs = silu(x[:, :1]), [x]
    for layer in range(config.depth):
        block = jax.tree.map(lambda x, layer=layer: x[layer], params["layers"]["block"])
        modulation = np.array([0.0, 0.0, 1.0, 0.0, 0.0, 1.0])[:, None, None, None]
        if config.adaln != "none":
            linear = (block if config.adaln == "block" else params)["modulation"]
            modulation = np.split(condition @ linear["kernel"] + linear["bias"], 6, -1)
        if config.adaln == "shared":
            modulation = np.stack(modulation) + block["offset"][:, None, None]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
        y = plain_rms_norm(x, block["norm_attention"]["scale"]) * (1 + scale) + shift
        x = x + gate * plain_attention(y, block["attention"], config)
        y = plain_rms_norm(x, block["norm_mlp"]["scale"]) * (1 + scale_mlp) + shift_mlp
        y = silu(y @ block["mlp_gate"]["kernel"]) * (y @ block["mlp_in"]["kernel"])
        x = x + gate_mlp * (y @ block["mlp_out"]["kernel"])
        outputs.append(x)
    x = plain_rms_norm(x, params["norm_out"]["scale"])
    if config.adaln != "none":
        linear = params["modulation_out"]
        shift, scale = np.split(condition @ linear["kernel"] + linear["bias"], 2, -1)
        x = x * (1 + scale) + shift
    return outputs, x @ params["head"]["kernel"]


def llamagens_program(tensors, codes, classes, depth, heads):
    """Logits of LlamaGen's generator by the tensors of its file, in NumPy and float64."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    side, width = math.isqrt(codes.shape[1] + 1), tensors["norm.weight"].size
    half = width // heads // 2  # of a head's dimensions, for rows; the others are for columns
    frequencies = 10_000 ** (-np.arange(0, half, 2) / half)
    axes = np.divmod(np.arange(side**2), side)
    angles = np.concatenate([np.outer(axis, frequencies) for axis in axes], -1)[:-1, None]
    # No angle has a cosine and a sine of 0: the class is no rotation.
    cosine, sine = (np.pad(f(angles), [(1, 0), (0, 0), (0, 0)]) for f in (np.cos, np.sin))

    def turn(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return np.stack([a * cosine - b * sine, b * cosine + a * sine], -1).reshape(x.shape)

    x = tensors["cls_embedding.embedding_table.weight"][classes][:, None]
    x = np.concatenate([x, tensors["tok_embeddings.weight"][codes]], 1)
    for layer in range(depth):
        own = {name.removeprefix(f"layers.{layer}."): t for name, t in tensors.items()}
        y = plain_rms_norm(x, own["attention_norm.weight"]) @ own["attention.wqkv.weight"].T
        q, k, v = (part.reshape(*y.shape[:2], heads, -1) for part in np.split(y, 3, -1))
        weights = np.einsum("btnh,bsnh->bnts", turn(q), turn(k)) / np.sqrt(2 * half)
        weights = np.exp(weights) * np.tri(x.shape[1])
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bnts,bsnh->btnh", weights, v).reshape(x.shape)
        x = x + y @ own["attention.wo.weight"].T
        y = plain_rms_norm(x, own["ffn_norm.weight"])
        gated = silu(y @ own["feed_forward.w1.weight"].T) * (y @ own["feed_forward.w3.weight"].T)
        x = x + gated @ own["feed_forward.w2.weight"].T
    return plain_rms_norm(x, tensors["norm.weight"]) @ tensors["output.weight"].T


def test_llamagens_file_gives_the_logits_of_its_program():
    config = narrow(positions="rotary_2d", width=24)  # a head's half has 3 frequencies: odd, as 3B
    codes, classes = inputs(config)
    rng = np.random.default_rng(2)
    file = {
        name: rng.standard_normal(shape, np.float32) * (0.3 if len(shape) > 1 else 1)
        for name, shape in tiny.torch_shapes("generator", config).items()
    }
    assert not any("freq" in name or "position" in name for name in file)
    params = convert.from_torch("generator", file, config)["params"]
    logits = run(config, params, codes[:, :-1], classes)
    expected = llamagens_program(file, codes[:, :-1], classes, config.depth, config.heads)
    assert np.std(expected) > 0.5
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS + WITH_QK_NORM)
def test_logits_equal_a_plain_program(changes):
    config = narrow(**changes)
    params, (codes, classes) = parameters(config), inputs(config)
    logits = run(config, params, codes[:, :-1], classes)
    assert logits.shape == (9, config.codes, config.codebook_size)
    _, expected = plain_program(config, params, codes[:, :-1], classes)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def cached_logits(config, params, codes, classes, dtype=jnp.float32):
    """Logits of every code by the `Decoder`, one after the other."""

    def decode(params, codes, classes):
        decoder = Decoder(config, params, classes, dtype)

        def step(cache, inputs):
            logits, cache = decoder.step(*inputs, cache)
            return cache, logits

        # What stands at the class's place and in the cache's unused part must not matter.
        before = jnp.roll(codes, 1, axis=1).T
        cache = jax.tree.map(lambda x: x + 7, decoder.empty_cache(config.codes + 2))
        return jax.lax.scan(step, cache, (before, jnp.arange(config.codes)))[1]

    return np.asarray(jit(decode)(params, codes, classes)).transpose(1, 0, 2)


@pytest.mark.parametrize("changes", VARIANTS + WITH_QK_NORM)
def test_cache_changes_no_logits(changes):
    config = narrow(**changes)
    params, (codes, classes) = parameters(config), inputs(config)
    expected = run(config, params, codes[:, :-1], classes)
    np.testing.assert_allclose(cached_logits(config, params, codes, classes), expected, atol=1e-5)


def test_half_precision_changes_logits_by_rounding_only():
    config = narrow(positions="rotary_2d", adaln="shared", qk_norm=True)
    params, (codes, classes) = parameters(config), inputs(config)
    expected = run(config, params, codes[:, :-1], classes)
    logits = cached_logits(config, params, codes, classes, jnp.bfloat16)
    assert 0 < np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


@every_variant
def test_no_logits_depend_on_their_own_code_or_a_later_one(variant):
    config = narrow(**variant)
    params, (codes, _) = parameters(config), inputs(config)
    # Row 0 as it is; row 1 + j has another code j.
    rows = np.tile(codes[:1, :-1], (config.codes, 1))
    rows[np.arange(1, config.codes), np.arange(config.codes - 1)] += 1
    rows %= config.codebook_size
    logits = run(config, params, rows, np.zeros(len(rows), np.int32))
    change = np.abs(logits - logits[0]).max(-1)
    for j in range(config.codes - 1):
        assert np.all(change[1 + j, : j + 1] <= 1e-6)
        assert np.all(change[1 + j, j + 1 :] > 1e-4)


@every_variant
def test_class_reaches_the_logits_of_every_code(variant):
    config = narrow(**variant)
    codes, classes = inputs(config)
    logits = run(config, parameters(config), np.tile(codes[:1, :-1], (9, 1)), classes)
    for other in range(1, config.null_class + 1):
        assert np.all(np.abs(logits[0] - logits[other]).max(-1) > 1e-4)


# Large enough to measure how parameters are spread.
LARGER = {"width": 64, "codebook_size": 200, "classes": 30}


@functools.cache
def fresh(config: GeneratorConfig) -> dict:
    codes, classes = inputs(config)
    init = jit(lambda key: nn.meta.unbox(Generator(config).init(key, codes[:, :-1], classes)))
    return jax.tree.map(np.asarray, init(jax.random.key(0))["params"])


@pytest.mark.parametrize("adaln", ["block", "shared"])
def test_fresh_parameters_are_spread_as_the_references(adaln):
    zero = {"head", "modulation", "modulation_out"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh(narrow(adaln=adaln, **LARGER))):
        keys = [entry.key for entry in path]
        if keys[-1] == "scale":
            np.testing.assert_array_equal(leaf, 1)
        elif zero & set(keys):
            np.testing.assert_array_equal(leaf, 0)
        else:
            std = 0.125 if keys[-1] in ("positions", "offset") else 0.02  # 0.125 = 64 ** -0.5
            assert leaf.std() == pytest.approx(std, rel=0.1), keys
            assert abs(leaf.mean()) < 4 * std / math.sqrt(leaf.size), keys


@pytest.mark.parametrize("adaln, identity", [("block", True), ("shared", False)])
def test_fresh_blocks_are_the_identity_where_gates_start_at_zero(adaln, identity):
    config = narrow(adaln=adaln, **LARGER)
    codes, classes = inputs(config)
    first, last = (
        run(config, fresh(config), codes[:, :-1], classes, method=Generator.features, layer=layer)
        for layer in (0, config.depth)
    )
    # The offsets, and so the gates, of "shared" are random from the start.
    assert np.array_equal(first, last) == identity


@pytest.mark.parametrize("adaln", ["block", "shared"])
def test_adaln_with_open_gates_and_no_shift_equals_a_generator_without_it(adaln):
    config, (codes, classes) = narrow(adaln=adaln), inputs(narrow())
    params, plain = parameters(config), parameters(narrow())
    params["modulation_out"] = jax.tree.map(np.zeros_like, params["modulation_out"])
    gates = np.array([0, 0, 1, 0, 0, 1], np.float32)  # shift, scale, gate, twice
    block = params["layers"]["block"]
    if adaln == "block":
        block["modulation"] = jax.tree.map(np.zeros_like, block["modulation"])
        block["modulation"]["bias"][:] = np.repeat(gates, config.width)
    else:
        params["modulation"] = jax.tree.map(np.zeros_like, params["modulation"])
        block["offset"][:] = gates[:, None]
    params |= plain | {"layers": {"block": block | plain["layers"]["block"]}}
    logits = run(config, params, codes[:, :-1], classes)
    expected = run(narrow(), plain, codes[:, :-1], classes)
    np.testing.assert_allclose(logits, expected, atol=1e-6)


def rotated_products(config: GeneratorConfig) -> np.ndarray:
    """Attention logits `[N, N]` of one query at all places with one key at all places."""
    rng = np.random.default_rng(2)
    dims = config.width // config.heads
    q, k = (np.tile(rng.standard_normal(dims).astype("f4"), (config.codes, 1)) for _ in range(2))
    table = rotation(config)[1:]
    q, k = (np.asarray(layers.rotate(x[None, :, None], table))[0, :, 0] for x in (q, k))
    return q @ k.T


def test_rotary_attention_sees_relative_places_only():
    products = rotated_products(narrow(positions="rotary"))
    for distance in range(-8, 9):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert len(np.unique(products[0].round(3))) == 9


def test_rotary_2d_attention_sees_relative_rows_and_columns_only():
    products = rotated_products(narrow(positions="rotary_2d")).reshape(3, 3, 3, 3)
    np.testing.assert_allclose(products[1:, :, 1:], products[:-1, :, :-1], atol=1e-5)
    np.testing.assert_allclose(products[:, 1:, :, 1:], products[:, :-1, :, :-1], atol=1e-5)
    assert len(np.unique(products[0, 0].round(3))) == 9
    # The first code of a row is not one place after the last of the row above.
    assert abs(products[0, 2, 1, 0] - products[0, 0, 0, 1]) > 1e-2


def test_rotary_2d_turns_half_the_dimensions_by_row_and_half_by_column():
    config = narrow(positions="rotary_2d", width=32, codes=25)
    table = rotation(config)[1:].reshape(5, 5, 8, 2)
    frequencies = 10_000.0 ** -(np.arange(4) / 4)
    angles = np.arange(5)[:, None] * frequencies
    expected = np.stack([np.cos(angles), np.sin(angles)], -1)
    for i in range(5):
        np.testing.assert_allclose(table[:, i, :4], expected, atol=1e-6)
        np.testing.assert_allclose(table[i, :, 4:], expected, atol=1e-6)


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d"])
def test_rotation_zeroes_the_class_and_keeps_the_length_of_codes(positions):
    table = rotation(narrow(positions=positions))
    x = np.random.default_rng(3).standard_normal((2, 10, 2, 8)).astype(np.float32)
    y = np.asarray(layers.rotate(x, table))
    np.testing.assert_array_equal(y[:, 0], 0)
    lengths = (np.linalg.norm(z[:, 1:], axis=-1) for z in (y, x))
    np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_learned_positions_rotate_nothing():
    assert rotation(narrow()) is None


def test_dropout_is_on_in_training_only():
    params, (codes, classes) = parameters(narrow()), inputs(narrow())
    args = (params, codes[:, :-1], classes)
    plain = run(narrow(), *args)
    first, again, other = (
        run(narrow(dropout=0.3), *args, train=True, seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert min(np.abs(first - plain).max(), np.abs(first - other).max()) > 1e-2
    np.testing.assert_allclose(run(narrow(dropout=0.0), *args, train=True), plain, atol=1e-6)
    np.testing.assert_array_equal(run(narrow(), *args, seed=1), plain)


def assert_dropped(values, kept, rate):
    """Each of `values` is 0, as often as the rate says, or that of `kept`, raised to make up."""
    values, kept = np.asarray(values), np.broadcast_to(kept, np.shape(values))
    dropped = np.abs(values) < 1e-6
    assert dropped.mean() == pytest.approx(rate, abs=0.03)
    np.testing.assert_allclose(values[~dropped], kept[~dropped] / (1 - rate), rtol=1e-3, atol=1e-5)


def test_dropout_applies_to_embeddings_and_both_branches():
    config = narrow(dropout=0.3)
    params, (codes, classes) = parameters(config), inputs(config)
    codes, classes = np.tile(codes[:, :-1], (10, 1)), np.tile(classes, 10)
    kept, dropped = (
        run(config, params, codes, classes, method=Generator.features, layer=0, train=train)
        for train in (False, True)
    )
    assert_dropped(dropped, kept, 0.3)

    plain, training = (
        jit(
            functools.partial(Block(config, train=train).apply, rngs={"dropout": jax.random.key(0)})
        )
        for train in (False, True)
    )
    x = np.random.default_rng(4).standard_normal((90, 9, 16)).astype(np.float32)
    for silent in ("mlp_out", "attention"):
        block = jax.tree.map(lambda x: np.array(x[0]), params["layers"]["block"])
        layer = block[silent] if silent == "mlp_out" else block[silent]["out"]
        layer["kernel"][:] = 0
        variables = {"params": block}
        assert_dropped(training(variables, x) - x, plain(variables, x) - x, 0.3)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_features_are_the_output_of_a_layer(layer):
    config = narrow(adaln="shared")
    params, (codes, classes) = parameters(config), inputs(config)
    features = run(config, params, codes[:, :-1], classes, method=Generator.features, layer=layer)
    expected, _ = plain_program(config, params, codes[:, :-1], classes)
    np.testing.assert_allclose(features, expected[layer], atol=1e-5)


def test_logits_have_the_compute_type_and_parameters_are_float32():
    config = narrow(adaln="shared", qk_norm=True)
    module, (codes, classes) = Generator(config, dtype=jnp.bfloat16), inputs(config)
    variables = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), codes, classes))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype("float32")}
    logits = jax.eval_shape(module.apply, variables, codes[:, :4], classes)
    assert (logits.shape, logits.dtype) == ((9, 5, 24), jnp.bfloat16)

    def first(params):
        decoder = Decoder(config, params, classes, jnp.bfloat16)
        return decoder.step(codes[:, 0], jnp.array(0), decoder.empty_cache(1))

    logits, cache = jax.eval_shape(first, variables["params"])
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}


@every_variant
def test_every_parameter_names_its_axes(variant):
    config = narrow(qk_norm=True, **variant)
    codes, classes = inputs(config)
    variables = jax.eval_shape(Generator(config).init, jax.random.key(0), codes, classes)
    boxes = jax.tree_util.tree_leaves_with_path(
        variables["params"], is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata)
    )
    assert len(boxes) >= 17
    known = {name for name, _ in RULES} | {None}
    for path, box in boxes:
        path = jax.tree_util.keystr(path)
        assert isinstance(box, nn.LogicallyPartitioned), path
        assert len(box.names) == box.value.ndim, path
        assert set(box.names) <= known, path
        assert (box.names[0] == "layers") == ("['layers']" in path), path
        if box.value.ndim > 1:
            assert set(box.names) - {None, "layers"}, path


OPTIONS = [{}, {"qk_norm": True, "positions": "rotary"}, {"adaln": "shared"}, {"adaln": "block"}]


@pytest.mark.parametrize("options", OPTIONS)
def test_joined_kernels_decode_the_same(options):
    config = GeneratorConfig(2, 2, 16, codes=4, codebook_size=32, classes=3, **options)
    params = tiny.fill(param_shapes(config))
    classes, codes = jnp.array([0, 2]), jnp.array([[5, 7, 9], [1, 2, 3]])

    def logits():
        decoder, rows = Decoder(config, params, classes, jnp.float32), []
        cache, last = decoder.empty_cache(4), jnp.zeros(2, jnp.int32)
        for position in range(4):
            row, cache = decoder.step(last, jnp.int32(position), cache)
            rows.append(row)
            last = codes[:, min(position, 2)]
        return jnp.stack(rows, 1)

    whole = Generator(config).apply({"params": params}, codes, classes)
    for platform in ("cpu", "gpu", "tpu"):
        with mock.patch.object(sharding, "platform", return_value=platform):
            np.testing.assert_allclose(logits(), whole, rtol=1e-5, atol=1e-5)


def test_dropout_is_uniform_over_places_and_keys():
    shape, rate = (16, 128, 256), 0.1
    x = jnp.ones(shape)
    masks = [
        np.asarray(layers.Dropout(rate).apply({}, x, rngs={"dropout": jax.random.key(n)}))
        for n in range(2)
    ]
    for mask in masks:
        np.testing.assert_allclose(np.unique(mask), [0, 1 / (1 - rate)], rtol=1e-6)
    first, second = (mask == 0 for mask in masks)
    spread = (rate * (1 - rate) / x.size) ** 0.5
    assert abs(first.mean() - rate) < 4 * spread
    for axis in range(3):  # the numbers of zeros in rows vary as if each were drawn alone
        others = tuple(a for a in range(3) if a != axis)
        expected = rate * (1 - rate) / (x.size / shape[axis])
        ratio = first.mean(others).var() / expected
        assert abs(ratio - 1) < 5 * (2 / shape[axis]) ** 0.5
        left, right = (
            first.take(range(1, shape[axis]), axis),
            first.take(range(shape[axis] - 1), axis),
        )
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 5 * x.size**-0.5
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 * x.size**-0.5
    np.testing.assert_array_equal(layers.Dropout(rate, deterministic=True).apply({}, x), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_of_cross_entropy(dtype):
    logits = (5 * jax.random.normal(jax.random.key(0), (3, 4, 11))).astype(dtype)
    targets = jax.random.randint(jax.random.key(1), (3, 4), 0, 11)
    weights = jnp.arange(12.0).reshape(3, 4)

    def plain(logits):
        p = jax.nn.log_softmax(logits.astype(jnp.float32))
        return -(jnp.take_along_axis(p, targets[..., None], -1)[..., 0] * weights).sum()

    value, found = jax.value_and_grad(lambda x: (losses.cross_entropy(x, targets) * weights).sum())(
        logits
    )
    expected_value, expected = jax.value_and_grad(plain)(logits)
    assert found.dtype == dtype and value == pytest.approx(float(expected_value), rel=1e-6)
    tolerance = 1e-6 if dtype == jnp.float32 else 0.04
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunks, shards", [(1, 1), (4, 1), (8, 3)])
def test_cross_entropy_in_chunks_is_that_of_whole_logits(chunks, shards):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (6, 8, 5)), jax.random.normal(keys[1], (5, 11))
    targets = jax.random.randint(keys[2], (6, 8), 0, 11)

    def whole(x, kernel):
        return losses.cross_entropy(x @ kernel, targets)

    def mean(x, kernel):
        return losses.mean_cross_entropy(x, kernel, targets, chunks, shards)

    values = losses.chunked_cross_entropy(x, kernel, targets, chunks)
    np.testing.assert_allclose(values, whole(x, kernel), rtol=1e-6)
    assert mean(x, kernel) == pytest.approx(float(values.mean()), rel=1e-6)
    found = jax.value_and_grad(lambda *args: 3 * mean(*args), (0, 1))(x, kernel)
    expected = jax.value_and_grad(lambda *args: 3 * whole(*args).mean(), (0, 1))(x, kernel)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * np.abs(other).max())


def test_gradient_of_cross_entropy_in_chunks_is_summed_in_float32():
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (4, 256, 8)), jax.random.normal(keys[1], (8, 16))
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    targets = jax.random.randint(keys[2], (4, 256), 0, 16)

    def gradient(chunks):
        found = jax.grad(losses.mean_cross_entropy, 1)(x, kernel, targets, chunks)
        assert found.dtype == jnp.bfloat16
        return found.astype(jnp.float32)

    one, many = gradient(1), gradient(256)
    assert np.abs(one - many).max() <= 2**-8 * np.abs(one).max()  # a rounding of the result
