"""AdamW and LARS, gradient clipping, learning-rate schedules and weight averaging."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from gigatok_jax.config import configclass

SMALL = 2**16  # elements of an array that is not worth a kernel of its own
TRUST = 1e-3  # LARS: norm of an update relative to its parameter's norm, at rate 1
Fraction = Annotated[float, Field(ge=0, lt=1)]


@configclass
class OptimizerConfig:
    """An optimizer and its schedule; the defaults are the tokenizer's."""

    # LARS (You et al. 2017) scales each matrix's update relative to the norm of the matrix.
    algorithm: Literal["adamw", "lars"] = "adamw"
    rate: PositiveFloat | None = 1e-4  # peak learning rate; None: base_rate * batch_size / 256
    base_rate: PositiveFloat = 0.1  # used only if rate is None
    final_rate: NonNegativeFloat = 1e-5  # where the cosine ends
    # "warmup_stable_decay" is constant and then decays to 0.
    schedule: Literal["cosine", "warmup_stable_decay", "constant"] = "cosine"
    warmup_steps: NonNegativeInt | None = None  # linear from 1 % of rate; None: from warmup_epochs
    warmup_epochs: NonNegativeFloat = 0.0  # used only if warmup_steps is None
    decay_share: Fraction = 0.2  # fraction of all steps over which "warmup_stable_decay" decays
    b1: Fraction = 0.9  # momentum, also in LARS
    b2: Fraction = 0.95  # decay of AdamW's mean of squared gradients
    weight_decay: NonNegativeFloat = 1e-4  # decoupled in AdamW, part of the gradient in LARS
    decayed: Literal["all", "matrices"] = "all"  # "matrices" excludes biases and norm gains
    clip: NonNegativeFloat = 10.0  # maximum global norm of the gradient; 0 turns clipping off

    def resolve(self, batch_size: int, epoch_images: int) -> "OptimizerConfig":
        """Fills in `rate` and `warmup_steps` where they follow from the batch size."""
        rate, warmup = self.rate, self.warmup_steps
        if rate is None:
            rate = self.base_rate * batch_size / 256
        if warmup is None:
            warmup = int(self.warmup_epochs * epoch_images / batch_size)
        return dataclasses.replace(self, rate=rate, warmup_steps=warmup)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at step 0, 1, ... of `steps` (`tests/data/parity/schedules.npz`).

    The reference sets the rate after each step, so its very first step runs at the full base rate.
    Here the schedule applies to the first step too.
    """
    warmup = config.warmup_steps

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        if config.schedule == "cosine":
            progress = (step - warmup) / max(steps - warmup, 1)
            cosine = 0.5 * (1 + jnp.cos(math.pi * jnp.clip(progress, 0, 1)))
            value = config.final_rate + (config.rate - config.final_rate) * cosine
        elif config.schedule == "warmup_stable_decay":
            decay_steps = config.decay_share * steps
            progress = (step - (steps - decay_steps)) / max(decay_steps, 1)
            value = config.rate * (1 - jnp.sqrt(jnp.clip(progress, 0, 1)))
        else:
            value = config.rate
        ramp = config.rate * (0.01 + 0.99 * step / max(warmup, 1))
        return jnp.where(step < warmup, ramp, value)

    return rate


def make_optimizer(
    config: OptimizerConfig, steps: int, start: int = 0
) -> optax.GradientTransformation:
    """Gradient clipping followed by the algorithm.

    Args:
      config: resolved settings, see `OptimizerConfig.resolve`.
      steps: length of the schedule.
      start: step of the run at which the optimizer makes its first update.
    """
    schedule = learning_rate(config, steps)

    def rate(count):
        return schedule(start + count)

    decayed = is_matrix if config.decayed == "matrices" else None
    if config.algorithm == "adamw":
        algorithm = optax.adamw(
            rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed
        )
    else:
        # The order is that of MAE's linear probing: the rate scales the momentum, not its input.
        algorithm = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.masked(optax.scale_by_trust_ratio(trust_coefficient=TRUST), is_matrix),
            optax.trace(config.b1),
            optax.scale_by_learning_rate(rate),
        )
    clip = [_clip(config.clip)] if config.clip else []
    return optax.chain(*clip, algorithm)


def _clip(limit: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with this module's `global_norm`."""

    def update(gradients, state, params=None):
        del params
        norm = global_norm(gradients)
        clipped = jax.tree.map(lambda g: jnp.where(norm < limit, g, g / norm * limit), gradients)
        return clipped, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def global_norm(tree: Any) -> jax.Array:
    """Root of the sum of all squares, float32; small arrays are joined before they are summed."""
    small, large = [], []
    for array in jax.tree.leaves(tree):
        (small if array.size < SMALL else large).append(array)
    squares = [jnp.sum(jnp.square(array)) for array in large]
    if small:
        squares.append(jnp.sum(jnp.square(jnp.concatenate([jnp.ravel(array) for array in small]))))
    return jnp.sqrt(sum(squares))


def is_matrix(params: Any) -> Any:
    """Whether each parameter has two or more dimensions within its layer.

    Decided by name, because layers are stacked and even biases have two dimensions here.
    """

    def decide(path, _):
        names = [entry.key for entry in path if hasattr(entry, "key")]  # Flax's boxes have no key
        return names[-1] not in ("scale", "bias")

    return jax.tree.map_with_path(decide, params)


def moving_average(average: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """The exponential moving average of the weights after step number `step` (from 0).

    The reference's decay is constant. Here it rises to that value as (1 + step) / (10 + step), so
    that short runs forget their initial weights.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
