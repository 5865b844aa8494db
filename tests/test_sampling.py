"""Sampling codes: frequencies, truncation, guidance, keys, and what is compiled."""

import functools
import itertools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gigatok_jax import api, sampling
from gigatok_jax.models.generator import Generator, GeneratorConfig, param_shapes
from gigatok_jax.sampling import SamplingConfig

import jaxprs
import tiny


def narrow(**changes) -> GeneratorConfig:
    """Nine codes of 24, which the stages of the cache do not divide evenly."""
    options = {"depth": 1, "heads": 2, "width": 8, "codes": 9, "codebook_size": 24, "classes": 5}
    return GeneratorConfig(**(options | changes))


def parameters(config: GeneratorConfig) -> dict:
    """Random, and of an opinion: logits of a few units, which the class has a part in."""
    params = tiny.fill(param_shapes(config))
    params["head"]["kernel"] *= 2
    params["class_embedding"] *= 2
    return jax.tree.map(jnp.asarray, params)


# Optimizations take longer than what is run.
OPTIONS = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


@functools.cache
def program(config, settings):
    sample = functools.partial(sampling.sample, config, settings=settings)
    return jax.jit(sample, compiler_options=OPTIONS)


def draw_codes(config, params, classes, keys, settings) -> np.ndarray:
    codes = program(config, settings)(params, classes, keys)
    assert (codes.shape, codes.dtype) == ((len(classes), config.codes), jnp.int32)
    return np.asarray(codes)


@pytest.fixture(scope="module")
def config():
    return narrow()


@pytest.fixture(scope="module")
def params(config):
    return parameters(config)


def softmax(logits):
    x = np.exp(logits - logits.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def chance(counts, probabilities) -> float:
    """Probability of counts at least as odd as these (Pearson's chi-square test)."""
    counts, expected = np.asarray(counts, np.float64), probabilities * np.sum(counts)
    assert np.all(counts[expected == 0] == 0)
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = np.sum((counts - expected) ** 2 / expected)
    return float(jax.scipy.stats.chi2.sf(statistic, len(counts) - 1))


@pytest.mark.parametrize(
    "settings, probabilities",
    [
        ({}, [0.3, 0.25, 0.2, 0.15, 0.07, 0.03]),
        ({"temperature": 0.5}, np.array([900, 625, 400, 225, 49, 9]) / 2208),
        ({"top_k": 3}, [0.4, 1 / 3, 4 / 15, 0, 0, 0]),
        ({"top_p": 0.8}, np.array([6, 5, 4, 3, 0, 0]) / 18),
        # The truncation sees what the temperature leaves: 0.69 and 0.87 after two and three.
        ({"temperature": 0.5, "top_p": 0.8}, np.array([900, 625, 400, 0, 0, 0]) / 1925),
    ],
)
def test_frequencies_of_codes_are_their_probabilities(settings, probabilities):
    draws, probabilities = 40_000, np.array(probabilities)
    logits = jnp.tile(jnp.log(jnp.array([0.3, 0.25, 0.2, 0.15, 0.07, 0.03])) + 5, (draws, 1))
    keys = jax.random.split(jax.random.key(0), draws)
    codes = jax.jit(sampling.draw, static_argnames="settings")(
        logits, keys, SamplingConfig(**settings)
    )
    assert (codes.shape, codes.dtype) == ((draws,), jnp.int32)
    counts = np.bincount(codes, minlength=6)
    assert chance(counts, probabilities) > 1e-3
    # Two hundredths more of one code, and less of another, would have been noticed.
    wrong = probabilities + np.array([0.02, -0.02, 0, 0, 0, 0])
    assert chance(counts, wrong) < 1e-6


def kept(logits, top_k, top_p) -> set[int]:
    """The codes that may be drawn, by the definition, in float64."""
    order = sorted(range(len(logits)), key=lambda code: -logits[code])
    if top_k:
        order = order[:top_k]
    probabilities = softmax(np.asarray(logits, np.float64)[order])
    if top_p < 1:
        size = 1
        while size < len(order) and probabilities[:size].sum() <= top_p:
            size += 1
        order = order[:size]
    return set(order)


@pytest.mark.parametrize("top_k", [0, 1, 2, 7, 50, 51])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1.0])
def test_truncation_leaves_exactly_the_likeliest_codes(top_k, top_p):
    rng = np.random.default_rng(5)
    spread = rng.uniform(0.1, 5, (300, 1))
    logits = (spread * rng.standard_normal((300, 50))).astype(np.float32)
    truncated = np.asarray(sampling.truncate(jnp.asarray(logits), top_k, top_p))
    for row, out in zip(logits, truncated, strict=True):
        codes = kept(row, top_k, top_p)
        assert set(np.flatnonzero(out > -np.inf)) == codes
        np.testing.assert_array_equal(out[list(codes)], row[list(codes)])


def test_probability_must_exceed_p():
    logits = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
    for top_p, count in ((0.25, 1), (0.49, 1), (0.5, 2), (0.51, 2), (0.75, 4), (0.9, 4)):
        assert np.isfinite(sampling.truncate(logits, 0, top_p)).sum() == count


def test_zero_temperature_takes_the_likeliest_code():
    logits = np.random.default_rng(6).standard_normal((50, 30)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 50)
    for settings in (
        SamplingConfig(temperature=0),
        SamplingConfig(temperature=0, top_k=3, top_p=0.5),
    ):
        codes = sampling.draw(jnp.asarray(logits), keys, settings)
        assert codes.dtype == jnp.int32
        np.testing.assert_array_equal(codes, logits.argmax(-1))


ONE = 1.0001
SCALES = [
    ({}, [3, 3, 3, 3, 3]),
    ({"schedule": "step"}, [3, 3, 3, 3, 3]),
    ({"schedule": "step", "schedule_start": 0.3}, [3, ONE, 3, 3, 3]),
    ({"schedule": "step", "schedule_start": 0.75}, [3, ONE, ONE, 3, 3]),
    ({"schedule": "step", "schedule_end": 0.3}, [3, 3, 3, 3, 3]),
    ({"schedule": "linear"}, [3, 1.5001, 2.0001, 2.5001, 3.0001]),
    ({"schedule": "reversed_linear"}, [3, 2.5001, 2.0001, 1.5001, 1.0001]),
    ({"schedule": "triangular"}, [3, 2.0001, 3.0001, 2.0001, 1.0001]),
    (
        {"schedule": "rectangular", "schedule_start": 0.5, "schedule_end": 0.75},
        [3, ONE, 3, 3, ONE],
    ),
    (
        {"schedule": "rectangular", "schedule_start": 0.0, "schedule_end": 0.3},
        [3, 3, ONE, ONE, ONE],
    ),
    ({"schedule": "cosine"}, [3, 2.7071068, 2, 1.2928932, 1]),
]


@pytest.mark.parametrize("settings, expected", SCALES)
def test_scales_follow_the_schedule(settings, expected):
    scales = SamplingConfig(guidance=3.0, **settings).scales(5)
    assert scales.dtype == np.float32
    np.testing.assert_allclose(scales, expected, rtol=1e-6)


def test_every_schedule_is_tested():
    tried = {settings.get("schedule", "constant") for settings, _ in SCALES}
    assert tried == set(get_args(sampling.Schedule)) and len(tried) == 7


@pytest.mark.parametrize("schedule", get_args(sampling.Schedule))
def test_a_single_code_has_the_full_scale(schedule):
    np.testing.assert_array_equal(SamplingConfig(2.0, schedule).scales(1), [2.0])


@pytest.mark.parametrize("schedule", get_args(sampling.Schedule))
def test_guidance_of_one_is_none(schedule):
    assert SamplingConfig(1.0, schedule).scales(5) is None


def test_step_starts_at_the_share_of_the_paper():
    scales = SamplingConfig(1.75, "step").scales(256)
    np.testing.assert_allclose(scales[1:46], ONE)  # 45 / 255 = 0.176
    np.testing.assert_array_equal(scales[46:], 1.75)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"guidance": 0.9}, "guidance: expected greater than or equal to 1, got 0.9"),
        ({"guidance": float("inf")}, "guidance: expected a finite number, got inf"),
        ({"guidance": float("nan")}, "guidance: expected a finite number, got nan"),
        (
            {"schedule": "quadratic"},
            "schedule: expected 'constant', .*, got 'quadratic'",
        ),
        ({"schedule_start": -0.1}, "schedule_start: expected greater than or equal to 0, got -0.1"),
        ({"schedule_end": 1.1}, "schedule_end: expected less than or equal to 1, got 1.1"),
        (
            {"schedule_start": 0.6, "schedule_end": 0.5},
            "schedule_start: expected at most schedule_end=0.5, got 0.6",
        ),
        ({"schedule_start": float("nan")}, "schedule_start: expected a finite number, got nan"),
        ({"temperature": -0.1}, "temperature: expected greater than or equal to 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature: expected a finite number"),
        ({"top_k": -1}, "top_k: expected greater than or equal to 0, got -1"),
        ({"top_p": 0.0}, "top_p: expected greater than 0, got 0.0"),
        ({"top_p": 1.1}, "top_p: expected less than or equal to 1, got 1.1"),
        ({"top_p": float("nan")}, "top_p: expected a finite number, got nan"),
        ({"topp": 0.9}, "topp: no such field; known: guidance, "),
    ],
)
def test_wrong_setting_names_its_field(generator, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingConfig(**settings)
    with pytest.raises(ValueError, match=f"^{message}"):
        generator.sample([0], jax.random.key(0), **settings)


@functools.cache
def uncached(config):
    return jax.jit(Generator(config).apply, compiler_options=OPTIONS)


def greedy(config, params, classes, scales) -> np.ndarray:
    """Arg-max decoding without a cache, the two halves of guidance written out."""
    codes = np.zeros((len(classes), config.codes), np.int32)
    null = np.full_like(classes, config.null_class)
    for j in range(config.codes):
        # Causal: what stands from code j on has no say in its logits.
        args = {"params": params}, codes[:, :-1]
        cond, uncond = (np.asarray(uncached(config)(*args, c))[:, j] for c in (classes, null))
        scale = 1 if scales is None else scales[j]
        codes[:, j] = (uncond + scale * (cond - uncond)).argmax(-1)
    return codes


@pytest.mark.parametrize(
    "settings, changes",
    [
        ({"guidance": 1.0}, {"depth": 2}),
        ({"guidance": 4.0, "schedule": "linear"}, {}),
        ({"guidance": 4.0}, {"positions": "rotary_2d", "adaln": "block"}),
        ({"guidance": 4.0, "schedule": "step", "schedule_start": 0.5}, {"adaln": "shared"}),
    ],
)
def test_greedy_codes_equal_a_plain_loop_without_a_cache(settings, changes):
    config = narrow(**changes)
    params, classes = parameters(config), np.arange(6, dtype=np.int32)
    keys = jax.random.split(jax.random.key(0), 6)
    settings = SamplingConfig(temperature=0, **settings)
    codes = draw_codes(config, params, classes, keys, settings)
    np.testing.assert_array_equal(
        codes, greedy(config, params, classes, settings.scales(config.codes))
    )
    assert len(np.unique(codes)) > 3
    if settings.guidance > 1:
        assert np.any(codes != greedy(config, params, classes, None))
        # Of the null class, both halves are the same.
        plain = greedy(config, params, classes, None)
        np.testing.assert_array_equal(codes[-1], plain[-1])


def test_frequencies_of_images_are_the_guided_probabilities():
    config = narrow(codes=2, codebook_size=4)
    params, draws, scale = parameters(config), 20_000, 2.0
    firsts = np.arange(4, dtype=np.int32)[:, None]
    cond, uncond = (
        np.asarray(uncached(config)({"params": params}, firsts, np.full(4, c, np.int32)))
        for c in (3, config.null_class)
    )
    one = softmax((uncond + scale * (cond - uncond))[0, 0])
    two = softmax((uncond + scale * (cond - uncond))[:, 1])
    keys = jax.random.split(jax.random.key(1), draws)
    classes = jnp.full(draws, 3, jnp.int32)
    codes = draw_codes(config, params, classes, keys, SamplingConfig(scale))
    counts = np.bincount(4 * codes[:, 0] + codes[:, 1], minlength=16)
    assert chance(counts, (one[:, None] * two).ravel()) > 1e-3
    unguided = softmax(cond[0, 0])[:, None] * softmax(cond[:, 1])
    assert chance(counts, unguided.ravel()) < 1e-6


def rows(config, params, settings) -> set[int]:
    """Numbers of rows that the program's matrix products have, for five images."""
    classes, keys = jnp.zeros(5, jnp.int32), jax.random.split(jax.random.key(0), 5)
    program = jax.make_jaxpr(sampling.sample, static_argnums=(0, 4))(
        config, params, classes, keys, settings
    )
    products = [e for e in jaxprs.equations(program) if e.primitive.name == "dot_general"]
    assert len(products) > 4
    return {equation.outvars[0].aval.shape[0] for equation in products}


def test_unconditional_half_is_computed_only_with_guidance(config, params):
    assert rows(config, params, SamplingConfig()) == {5}
    assert rows(config, params, SamplingConfig(schedule="linear")) == {5}
    assert rows(config, params, SamplingConfig(guidance=2.0)) == {10}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_codes_depend_on_an_images_own_key_and_class_only(config, params, guidance):
    settings = SamplingConfig(guidance=guidance)
    classes = np.array([0, 1, 2, 3, 1, 1], np.int32)
    keys = jax.random.split(jax.random.key(2), 6)

    def sample(classes, keys):
        return draw_codes(config, params, classes, keys, settings)

    codes = sample(classes, keys)
    order = np.array([3, 5, 0, 1, 4, 2])
    np.testing.assert_array_equal(sample(classes[order], keys[order]), codes[order])
    np.testing.assert_array_equal(sample(classes[4:5], keys[4:5]), codes[4:5])
    other = sample(classes, keys.at[2].set(jax.random.key(9)))
    changed = np.any(other != codes, axis=1)
    np.testing.assert_array_equal(changed, np.arange(6) == 2)
    # Three images of one class have three keys, and a key serves each place anew.
    assert len(np.unique(codes[classes == 1], axis=0)) == 3
    assert np.all(np.any(codes != codes[:, :1], axis=1))


def test_new_guidance_or_schedule_needs_no_compilation(config, params):
    classes, keys = np.zeros(6, np.int32), jax.random.split(jax.random.key(0), 6)

    def compiled(**settings):
        sampling.sample(config, params, classes, keys, SamplingConfig(**settings))
        return sampling._sample._cache_size()

    count = compiled(guidance=2.0)
    for schedule, guidance in itertools.product(get_args(sampling.Schedule), (1.5, 7.0)):
        assert compiled(guidance=guidance, schedule=schedule, schedule_start=0.4) == count
    assert compiled(guidance=2.0, top_k=2) == count + 1


@pytest.fixture(scope="module")
def generator(config, params):
    return api.PretrainedGenerator(config, {"params": params}, dtype="float32")


@pytest.mark.parametrize(
    "classes, message",
    [
        ([0, 6], r"classes: expected 0\.\.4, or 5 for none, got 6"),
        ([-1], r"classes: expected 0\.\.4, or 5 for none, got -1"),
        ([[0, 1]], r"classes: expected integers \[B\], got \[1, 2\] int64"),
        (3, r"classes: expected integers \[B\], got \[\] int64"),
        ([0.5], r"classes: expected integers \[B\], got \[1\] float64"),
        ([], r"classes: expected integers \[B\], got \[0\] float64"),
    ],
)
def test_classes_out_of_range_are_rejected(generator, classes, message):
    with pytest.raises(ValueError, match=message):
        generator.sample(classes, jax.random.key(0))


def test_sample_uses_all_its_settings(config, params, generator):
    settings = {
        "guidance": 3.0,
        "schedule": "rectangular",
        "schedule_start": 0.2,
        "schedule_end": 0.7,
        "temperature": 0.8,
        "top_k": 9,
        "top_p": 0.95,
    }
    keys = jax.random.split(jax.random.key(4), 6)
    classes = np.arange(6, dtype=np.int32)
    expected = draw_codes(config, params, classes, keys, SamplingConfig(**settings))
    np.testing.assert_array_equal(generator.sample(classes, keys, **settings), expected)


def test_one_key_is_split_among_the_images(generator):
    classes = [1] * 6
    codes = np.asarray(generator.sample(classes, jax.random.key(5)))
    assert (codes.shape, codes.dtype) == ((6, 9), np.int32)
    assert codes.min() >= 0 and codes.max() < 24
    assert len(np.unique(codes, axis=0)) == 6
    keys = jax.random.split(jax.random.key(5), 6)
    np.testing.assert_array_equal(codes, generator.sample(classes, keys))
    assert np.any(codes != generator.sample(classes, jax.random.key(6)))


def test_raw_keys_are_accepted(generator):
    classes, raw = [1] * 6, jax.random.PRNGKey(5)
    codes = np.asarray(generator.sample(classes, jax.random.key(5)))
    np.testing.assert_array_equal(generator.sample(classes, raw), codes)
    np.testing.assert_array_equal(generator.sample(classes, jax.random.split(raw, 6)), codes)


def test_number_of_keys_must_match_the_images(generator):
    with pytest.raises(ValueError, match=r"key: expected 1 or 2 keys, got \[3\]"):
        generator.sample([0, 1], jax.random.split(jax.random.key(0), 3))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_own_codes_are_completed_to_the_same_sample(generator, guidance):
    classes, key = np.arange(5), jax.random.key(7)
    codes = np.asarray(generator.sample(classes, key, guidance=guidance))
    for keep in (0, 4, 9):
        completed = generator.sample(classes, key, guidance=guidance, prefix=codes, keep=keep)
        np.testing.assert_array_equal(completed, codes)


def test_completions_follow_from_the_codes_that_are_kept(generator):
    classes, key = np.arange(5), jax.random.key(0)
    prefix = np.random.default_rng(0).integers(0, 24, (5, 9))
    settings = {"temperature": 0.0, "prefix": prefix}
    plain = np.asarray(generator.sample(classes, key, temperature=0.0))
    for keep in (0, 1, 5, 9):
        codes = np.asarray(generator.sample(classes, key, **settings, keep=keep))
        np.testing.assert_array_equal(codes[:, :keep], prefix[:, :keep])
        likeliest = np.asarray(generator.logits(codes, classes)).argmax(-1)
        np.testing.assert_array_equal(codes[:, keep:], likeliest[:, keep:])
    np.testing.assert_array_equal(generator.sample(classes, key, **settings, keep=0), plain)


def test_any_number_of_codes_is_kept_by_one_program(generator):
    classes, key = np.arange(3), jax.random.key(0)
    prefix = np.zeros((3, 9), int)
    generator.sample(classes, key, prefix=prefix, keep=1)
    before = sampling._sample._cache_size()
    for keep in (0, 2, 9):
        generator.sample(classes, key, prefix=prefix, keep=keep)
    assert sampling._sample._cache_size() == before


@pytest.mark.parametrize(
    "given, message",
    [
        ({"keep": 1}, r"^prefix: expected codes, because keep=1, got None$"),
        ({"prefix": np.zeros((2, 9), int), "keep": 10}, r"^keep: expected 0\.\.9, got 10$"),
        ({"prefix": np.zeros((2, 9), int), "keep": 0.5}, r"^keep: expected 0\.\.9, got 0\.5$"),
        ({"prefix": np.zeros((2, 9), int)}, r"^keep: expected 0\.\.9, got None$"),
        (
            {"prefix": np.zeros((3, 9), int), "keep": 0},
            r"^prefix: expected 2 rows of codes, got 3$",
        ),
        ({"prefix": np.full((2, 9), 24), "keep": 0}, r"codes: expected 0\.\.23"),
    ],
)
def test_prefixes_that_do_not_fit_are_rejected(generator, given, message):
    with pytest.raises(ValueError, match=message):
        generator.sample([0, 1], jax.random.key(0), **given)
