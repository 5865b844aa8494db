"""Drawing codes from a generator: guidance, truncation, and the decode loop."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.models import layers
from gigatok_jax.models.generator import Decoder, GeneratorConfig

SCHEDULES = (
    *("constant", "step", "linear", "reversed_linear"),
    *("triangular", "rectangular", "cosine"),
)
NEAR_ONE = 1e-4  # what the reference adds to scales that would otherwise be 1
STAGES = 4  # lengths that the cache of keys and values grows through


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn.

    Attributes:
      guidance: scale s of classifier-free guidance, logits = uncond + s (cond - uncond); 1: none.
      schedule: how the scale of code j depends on r = j / (N - 1); code 0 always has all of it.
        "constant"; "step": 1 before `schedule_start`; "rectangular": 1 outside `schedule_start` to
        `schedule_end`; "linear": from 1 to s; "reversed_linear": from s to 1; "triangular": from 1
        over s in the middle to 1; "cosine": from s to 1.
      schedule_start, schedule_end: in [0, 1].
      temperature: divides the logits; 0 takes the arg-max.
      top_k: only the k likeliest codes are drawn; 0: all.
      top_p: only the likeliest codes are drawn, as many as it takes for their probability to
        exceed p; 1: all.
    """

    guidance: float = 1.0
    schedule: str = "constant"
    schedule_start: float = 0.18
    schedule_end: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}, got {self.schedule!r}")
        if not (math.isfinite(self.guidance) and self.guidance >= 1):
            raise ValueError(f"guidance must be at least 1, which is none, got {self.guidance}")
        if not 0 <= self.schedule_start <= self.schedule_end <= 1:
            raise ValueError(
                "schedule_start and schedule_end must be in order in [0, 1], got "
                f"{self.schedule_start} and {self.schedule_end}"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def scales(self, codes: int) -> np.ndarray | None:
        """Guidance scale of each of `codes` codes, float32 `[N]`; None without guidance.

        The reference's 1e-4 is kept: it can decide between codes that are nearly as likely.
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


def truncate(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Logits `[..., K]` with -inf where a code must not be drawn; see `SamplingConfig`."""
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(descending), axis=-1)[..., :-1]  # before the next code
        count = 1 + jnp.sum(before <= top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(descending, count - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def draw(logits: jax.Array, keys: jax.Array, settings: SamplingConfig) -> jax.Array:
    """One code each, int32 `[B]`, of float32 logits `[B, K]` and as many keys."""
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
) -> jax.Array:
    """Draws the codes of images.

    Another guidance or schedule needs no new compilation.

    Args:
      config: the generator's architecture.
      params: its parameters.
      classes: `[B]` int32.
      keys: `[B]` random keys; an image depends on its own only.
      settings: how to draw.
      dtype: type of the computation; logits are float32.

    Returns:
      int32 `[B, N]`.
    """
    scales = settings.scales(config.codes)
    plain = SamplingConfig(
        temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
    )
    return _sample(config, params, classes, keys, plain, scales, dtype)


@functools.partial(jax.jit, static_argnames=("config", "settings", "dtype"))
def _sample(
    config: GeneratorConfig,
    params: Any,
    classes: jax.Array,
    keys: jax.Array,
    settings: SamplingConfig,
    scales: jax.Array | None,
    dtype: layers.Dtype,
) -> jax.Array:
    """The whole loop in one program; `scales`, `[N]`, is None where nothing guides."""
    rows = classes
    if scales is not None:
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
        return codes.at[:, position].set(code), cache

    # The cache grows in stages, as attention reads all of it at each step.
    ends = [-(-config.codes * stage // STAGES) for stage in range(STAGES + 1)]
    cache = decoder.empty_cache(0)
    codes = jnp.zeros((len(classes), config.codes), jnp.int32)
    for start, end in itertools.pairwise(ends):
        padding = ((0, 0), (0, 0), (0, end - start), (0, 0))
        cache = jax.tree.map(functools.partial(jnp.pad, pad_width=padding), cache)
        codes, cache = jax.lax.fori_loop(start, end, step, (codes, cache))
    return codes
