"""Sampling codes from a generator: guidance, truncation, and the decode loop."""

import functools
import itertools
import logging
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, model_validator

from gigatok_jax import sharding
from gigatok_jax.config import configclass
from gigatok_jax.models import layers
from gigatok_jax.models.generator import Decoder, GeneratorConfig

logger = logging.getLogger(__name__)

Schedule = Literal[
    "constant", "step", "linear", "reversed_linear", "triangular", "rectangular", "cosine"
]
NEAR_ONE = 1e-4  # the reference adds this to scales that would otherwise be 1
STAGES, CPU_STAGES = 8, 4  # how often the cache of keys and values grows to its full length

Share = Annotated[float, Field(ge=0, le=1)]


@configclass
class SamplingConfig:
    """How codes are sampled.

    Classifier-free guidance with scale s computes logits = uncond + s (cond - uncond). Under a
    schedule, the scale of code j depends on r = j / (N - 1), except that code 0 always has scale s:

      constant:         s
      step:             1 before `schedule_start`, then s
      rectangular:      s from `schedule_start` to `schedule_end`, 1 outside
      linear:           from 1 to s
      reversed_linear:  from s to 1
      triangular:       from 1 to s in the middle, and back to 1
      cosine:           from s to 1
    """

    guidance: Annotated[float, Field(ge=1, le=1_000)] = 1.0  # the scale s; 1: no guidance
    schedule: Schedule = "constant"  # how guidance varies over the codes of an image, see above
    schedule_start: Share = 0.18  # r where the guidance of "step" and "rectangular" begins
    schedule_end: Share = 1.0  # r where the guidance of "rectangular" ends
    temperature: NonNegativeFloat = 1.0  # divides the logits; 0: arg-max
    top_k: NonNegativeInt = 0  # sample from the k most likely codes only; 0: from all
    # Sample only from the fewest codes whose probabilities sum to more than p.
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check(self):
        if 0 < self.temperature < 1e-4:  # logits would overflow
            raise ValueError(
                f"temperature: expected 0 or at least 0.0001, got {self.temperature:g}"
            )
        if self.schedule_start > self.schedule_end:
            raise ValueError(
                f"schedule_start: expected at most schedule_end={self.schedule_end}, got "
                f"{self.schedule_start}"
            )
        return self

    def check_schedule(self, prefix: str = "") -> None:
        """Raises ValueError for a schedule of no guidance; `prefix` precedes names of fields."""
        if self.schedule != "constant" and self.guidance == 1:
            raise ValueError(
                f"{prefix}guidance: expected more than 1 with {prefix}schedule={self.schedule}, "
                "got 1"
            )

    def scales(self, codes: int) -> np.ndarray | None:
        """Guidance scale of each of `codes` codes, float32 `[N]`; None without guidance.

        The reference adds 1e-4 to some scales. It is kept because it can change which of two nearly
        equally likely codes is sampled.
        """
        if self.guidance == 1:
            return None
        r = np.arange(codes) / max(codes - 1, 1)
        s, start, end = self.guidance, self.schedule_start, self.schedule_end
        ramps = {"linear": r, "reversed_linear": 1 - r, "triangular": 1 - np.abs(2 * r - 1)}
        if self.schedule in ramps:
            scales = 1 + (s - 1) * ramps[self.schedule] + NEAR_ONE
        elif self.schedule == "cosine":
            scales = 1 + (s - 1) * (1 + np.cos(np.pi * r)) / 2
        else:
            windows = {"constant": (0, 1), "step": (start, 1), "rectangular": (start, end)}
            first, last = windows[self.schedule]
            scales = np.where((r >= first) & (r <= last), s, 1 + NEAR_ONE)
        scales[0] = s
        return scales.astype(np.float32)


def check_null_class(settings: SamplingConfig, class_dropout: float | None) -> bool:
    """Warns of guidance by a null class that was not trained; returns whether it did."""
    untrained = settings.guidance > 1 and class_dropout == 0
    if untrained:
        logger.warning(
            "guidance compares with the null class, which this generator was not trained on: its "
            "run has class_dropout=0"
        )
    return untrained


def truncate(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Sets logits `[..., K]` outside top-k and top-p to -inf; see `SamplingConfig`."""
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        # Mass before codes 1, 2, ...
        before = jnp.cumsum(jax.nn.softmax(descending), axis=-1)[..., :-1]
        count = 1 + jnp.sum(before <= top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(descending, count - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(logits: jax.Array, keys: jax.Array, settings: SamplingConfig) -> jax.Array:
    """Samples codes, int32 `[B]`, from float32 logits `[B, K]`, with one key per row."""
    if settings.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = truncate(logits / settings.temperature, settings.top_k, settings.top_p)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def sample(
    config: GeneratorConfig,
    params: Any,
    classes: jax.Array,
    keys: jax.Array,
    settings: SamplingConfig,
    dtype: layers.Dtype = jnp.float32,
    prefix: jax.Array | None = None,
    keep: int | jax.Array = 0,
) -> jax.Array:
    """Samples the codes of images, or completes them.

    Changing the guidance scale, the schedule or `keep` does not recompile.

    Args:
      config: the generator's architecture.
      params: its parameters.
      classes: `[B]` int32.
      keys: `[B]` random keys; an image depends only on its own.
      settings: how to sample.
      dtype: type of the computation; logits are float32.
      prefix: int32 `[B, N]`, whose first `keep` codes are taken; the others are sampled as if the
        generator had drawn the first ones too. None: all codes are sampled.
      keep: 0 to N.

    Returns:
      int32 `[B, N]`.
    """
    given = None if prefix is None else (prefix, jnp.asarray(keep, jnp.int32))
    scales = settings.scales(config.codes)
    # Guidance enters the compiled program only as the array `scales`.
    unguided = SamplingConfig(
        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    mesh = sharding.mesh_in_use()
    return _sample(config, params, classes, keys, unguided, scales, given, dtype, mesh)


@functools.partial(jax.jit, static_argnames=("config", "settings", "dtype", "mesh"))
def _sample(config, params, classes, keys, settings, scales, given, dtype, mesh):
    """The decode loop as one program.

    `scales` is an array `[N]`, or None without guidance; `given` the codes to complete and how many
    of them to keep, or None. The program depends on the mesh that it is traced for.
    """
    del mesh
    rows = classes
    if scales is not None:  # conditional rows, then unconditional ones
        rows = jnp.concatenate([classes, jnp.full_like(classes, config.null_class)])
    decoder = Decoder(config, params, rows, dtype)

    def step(position, carry):
        codes, cache = carry
        last = jax.lax.dynamic_index_in_dim(codes, position - 1, axis=1, keepdims=False)
        last = jnp.tile(last, len(rows) // len(classes))
        logits, cache = decoder.step(last, position, cache)
        if scales is not None:
            cond, uncond = jnp.split(logits, 2)
            logits = uncond + scales[position] * (cond - uncond)
        position_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        code = draw(logits, position_keys, settings)
        if given is not None:
            prefix, keep = given
            code = jnp.where(position < keep, prefix[:, position], code)
        return codes.at[:, position].set(code), cache

    # Attention reads the whole cache at every step, so a cache that grows saves time.
    stages = CPU_STAGES if sharding.platform() == "cpu" else STAGES
    ends = [math.ceil(config.codes * stage / stages) for stage in range(stages + 1)]
    cache = decoder.empty_cache(0)
    codes = jnp.zeros((len(classes), config.codes), jnp.int32)
    for start, end in itertools.pairwise(ends):
        padding = ((0, 0), (0, 0), (0, end - start), (0, 0))
        cache = jax.tree.map(functools.partial(jnp.pad, pad_width=padding), cache)
        codes, cache = jax.lax.fori_loop(start, end, step, (codes, cache))
    return codes
