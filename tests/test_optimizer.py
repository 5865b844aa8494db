"""Schedules, AdamW, clipping and weight averaging."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gigatok_jax.training import optimizer
from gigatok_jax.training.optimizer import OptimizerConfig

import synth

SCHEDULES = {
    "cosine_warmup50": OptimizerConfig(warmup_steps=50),
    "cosine_warmup0": OptimizerConfig(),
    "wsd_warmup50_decay20": OptimizerConfig(schedule="warmup_stable_decay", warmup_steps=50),
}


def resolved(config):
    return config.resolve(batch_size=1, epoch_images=1)


def updates(config, gradients, params=1.0, steps=100, **kwargs):
    """Updates that a scalar parameter gets for a series of gradients, as a float64 array."""
    transformation = optimizer.make_optimizer(resolved(config), steps, **kwargs)
    params = jnp.asarray(params)
    state, result = transformation.init(params), []
    for gradient in gradients:
        update, state = transformation.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, update)
        result.append(update)
    return np.asarray(result, np.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_matches_reference_at_every_step(name):
    expected = synth.expected("schedules.npz")[name]
    rates = optimizer.learning_rate(resolved(SCHEDULES[name]), 1_000)(jnp.arange(1_001))
    assert len(expected) == 1_001
    np.testing.assert_allclose(rates, expected, rtol=0, atol=1e-9)


def test_constant_schedule_is_constant_after_its_warmup():
    rates = optimizer.learning_rate(OptimizerConfig(schedule="constant", warmup_steps=10), 100)(
        jnp.arange(101)
    )
    np.testing.assert_allclose(
        rates[jnp.array([0, 5, 10, 100])], [1e-6, 5.05e-5, 1e-4, 1e-4], rtol=1e-6
    )


def test_cosine_stays_at_its_end_beyond_the_last_step():
    rates = optimizer.learning_rate(resolved(OptimizerConfig()), 100)(jnp.arange(100, 200))
    np.testing.assert_allclose(rates, 1e-5, rtol=1e-6)


def test_updates_follow_the_written_rule_of_adamw():
    config = OptimizerConfig(rate=1e-2, warmup_steps=3, weight_decay=0.1, clip=100.0)
    gradients, rates = [0.5, -1.0, 2.0, 0.1], optimizer.learning_rate(config, 100)
    parameter, mean, square, expected = 1.0, 0.0, 0.0, []
    for i, gradient in enumerate(gradients):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        corrected = mean / (1 - 0.9 ** (i + 1)), square / (1 - 0.95 ** (i + 1))
        direction = corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        expected.append(-float(rates(i)) * (direction + 0.1 * parameter))
        parameter += expected[-1]
    np.testing.assert_allclose(updates(config, gradients), expected, rtol=1e-4)


def test_first_update_has_the_first_rate_of_the_warmup():
    config = OptimizerConfig(rate=1e-2, warmup_steps=10, weight_decay=0.0)
    np.testing.assert_allclose(updates(config, [3.0]), -1e-4, rtol=1e-5)


def test_updates_that_start_late_have_the_rates_of_their_steps():
    config = OptimizerConfig(warmup_steps=10, weight_decay=0.0)
    rates = optimizer.learning_rate(config, 100)(jnp.arange(60, 63))
    np.testing.assert_allclose(updates(config, [1.0] * 3, start=60), -rates, rtol=1e-4)


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimizerConfig(rate=1.0, schedule="constant", weight_decay=0.0, clip=1.0)
    transformation = optimizer.make_optimizer(resolved(config), 100)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    state = transformation.init(params)
    _, state = transformation.update({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, state, params)
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose([moments["a"][0], moments["b"][0]], [0.06, 0.08], rtol=1e-5)
    _, state = transformation.update({"a": jnp.array([0.3]), "b": jnp.array([0.4])}, state, params)
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(moments["a"][0], 0.9 * 0.06 + 0.1 * 0.3, rtol=1e-5)


def test_weights_decay_without_a_gradient():
    config = OptimizerConfig(rate=0.1, schedule="constant", weight_decay=0.5)
    np.testing.assert_allclose(updates(config, [0.0], params=2.0), -0.1 * 0.5 * 2, rtol=1e-6)


@pytest.mark.parametrize("step, expected", [(0, [2.8, 0.2]), (10_000, [1.2, 1.8])])
def test_average_moves_by_one_minus_a_decay_that_grows(step, expected):
    old, new = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 0.0])}
    average = optimizer.moving_average(old, new, 0.9, step)
    np.testing.assert_allclose(average["w"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    "field, value",
    [
        ("rate", 0.0),
        ("clip", -1.0),
        ("warmup_steps", -1),
        ("b2", 1.0),
        ("decay_share", 1.5),
        ("schedule", "linear"),
    ],
)
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: .*{value}"):
        OptimizerConfig(**{field: value})


def test_rate_and_warmup_follow_the_batch_unless_they_are_given():
    free = OptimizerConfig(rate=None, base_rate=0.1, warmup_epochs=2.0)
    found = free.resolve(batch_size=512, epoch_images=10_000)
    assert (found.rate, found.warmup_steps) == (0.2, 39)
    given = OptimizerConfig(rate=0.3, warmup_steps=7, warmup_epochs=2.0)
    assert given.resolve(batch_size=512, epoch_images=10_000) == given
