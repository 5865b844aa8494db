"""AdamW and LARS, gradient clipping, learning-rate schedules and weight averaging."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("cosine", "warmup_stable_decay", "constant")
ALGORITHMS = ("adamw", "lars")
DECAYED = ("all", "matrices")
TRUST = 1e-3  # of LARS: length of an update, as a share of its parameter's, at rate 1


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its schedule; the defaults are the tokenizer's.

    Attributes:
      algorithm: "adamw", or "lars" (You et al. 2017), which scales each matrix's update to a share
        of the matrix's norm.
      rate: base learning rate.
      final_rate: where the cosine ends.
      schedule: "cosine" over all steps, "warmup_stable_decay" (constant, then to 0), "constant".
      warmup_steps: linear from 1 % of the base rate.
      decay_share: share of all steps over which "warmup_stable_decay" decays.
      b1, b2: Adam's momenta; b1 is LARS's too.
      weight_decay: of AdamW decoupled, times the rate; of LARS a part of the gradient.
      decayed: parameters that it applies to: "all", or "matrices", not norms' gains and biases.
      clip: largest global norm of the gradient; 0: any.
    """

    algorithm: str = "adamw"
    rate: float = 1e-4
    final_rate: float = 1e-5
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_share: float = 0.2
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 1e-4
    decayed: str = "all"
    clip: float = 10.0

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {ALGORITHMS}, got {self.algorithm!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        if self.decayed not in DECAYED:
            raise ValueError(f"decayed must be one of {DECAYED}, got {self.decayed!r}")
        if not self.rate > 0:
            raise ValueError(f"rate must be positive, got {self.rate}")
        for name in ("final_rate", "warmup_steps", "weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("b1", "b2", "decay_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, ... of `steps` (`tests/data/parity/schedules.npz`).

    The reference sets the rate after each step, so that its very first runs at the full base
    rate; here the schedule holds from the first step on.
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


def optimizer(config: OptimizerConfig, steps: int, start: int = 0) -> optax.GradientTransformation:
    """The clipped gradient, and the algorithm's update of it.

    Args:
      config: its settings.
      steps: length of the schedule.
      start: the run's step that its first update belongs to.
    """
    rate = schedule(config, steps)

    def shifted(count):
        return rate(start + count)

    decayed = _matrices if config.decayed == "matrices" else None
    if config.algorithm == "adamw":
        algorithm = optax.adamw(
            shifted,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    else:
        # As MAE's linear probing has it: the rate multiplies the momentum, not what goes into it.
        algorithm = optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.masked(optax.scale_by_trust_ratio(trust_coefficient=TRUST), _matrices),
            optax.trace(config.b1),
            optax.scale_by_learning_rate(shifted),
        )
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*clip, algorithm)


def _matrices(params):
    """Which parameters have two or more dimensions, told by name: layers are stacked here."""

    def is_matrix(path, _):
        names = [entry.key for entry in path if hasattr(entry, "key")]  # boxes have none
        return names[-1] not in ("scale", "bias")

    return jax.tree.map_with_path(is_matrix, params)


def moving_average(average, params, decay: float, step):
    """Exponential moving average of the weights after step number `step`, from 0.

    The reference's decay is constant.  Here it grows towards that value, (1 + step) / (10 + step)
    at most, so that short runs leave their first weights behind.
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
