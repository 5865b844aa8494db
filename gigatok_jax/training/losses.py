"""Training losses, each a pure function.

Scalars are means over the batch, so that computing a batch in parts (`accumulate`) gives the same
value. The L2 loss is inline in `training.tokenizer`.
"""

from collections.abc import Sequence
import functools

from einops import rearrange
import jax
import jax.numpy as jnp

from gigatok_jax import sharding
from gigatok_jax.models.quantizer import normalize


def hinge_discriminator(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """0.5 (mean relu(1 - real) + mean relu(1 + fake))."""
    return 0.5 * (jax.nn.relu(1 - logits_real).mean() + jax.nn.relu(1 + logits_fake).mean())


def hinge_generator(logits_fake: jax.Array) -> jax.Array:
    return -logits_fake.mean()


def semantic(features: jax.Array, target: jax.Array) -> jax.Array:
    """Negative cosine similarity of projected features and the teacher's, both `[B, T, C]`.

    Averaged over tokens. The paper's formula has the opposite sign; this one is minimized.
    """
    return -jnp.sum(normalize(features) * normalize(target), axis=-1).mean()


def feature_distance(first: Sequence[jax.Array], second: Sequence[jax.Array]) -> jax.Array:
    """Perceptual distance between two batches of images, from a frozen network's features.

    As in LPIPS, but without learned weights: tokens are normalized to unit length, and squared
    differences are summed over channels and averaged over tokens and layers. Computed in float32,
    and differentiable where the images are equal.

    Args:
      first, second: features `[B, T, C]` of each layer, such as the taps of `models.vit.ViT`; T and
        C may differ between layers.

    Returns:
      `[B]`, in [0, 4].
    """

    def layer(x, y):
        x, y = (normalize(a.astype(jnp.float32)) for a in (x, y))
        return jnp.square(x - y).sum(axis=-1).mean(axis=-1)

    return jnp.stack([layer(x, y) for x, y in zip(first, second, strict=True)]).mean(axis=0)


@jax.custom_vjp
def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy of targets `[...]` under logits `[..., K]` of any type, float32 `[...]`.

    The conversion to float32 fuses into the reduction, so the logits are not copied. The gradient
    has the type of the logits, and is written in one pass.
    """
    return _cross_entropy(logits, targets)[0]


def _cross_entropy(logits, targets):
    normalizer = logsumexp(logits)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return normalizer - picked.astype(jnp.float32), (logits, targets, normalizer)


def logsumexp(x: jax.Array) -> jax.Array:
    """Of the last axis, in float32, and in a single pass where passes over memory count."""
    x = x.astype(jnp.float32)
    if sharding.platform() == "cpu":
        return jax.nn.logsumexp(x, axis=-1)

    def combine(first, second):
        largest = jnp.maximum(first[0], second[0])
        return largest, sum(total * jnp.exp(top - largest) for top, total in (first, second))

    start = (jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0))
    largest, total = jax.lax.reduce((x, jnp.ones_like(x)), start, combine, (x.ndim - 1,))
    return largest + jnp.log(total)


def _cross_entropy_gradient(residuals, gradient):
    logits, targets, normalizer = residuals
    p = jnp.exp(logits.astype(jnp.float32) - normalizer[..., None])
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    p = jnp.where(hit == targets[..., None], p - 1, p)
    return (p * gradient[..., None]).astype(logits.dtype), None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_gradient)


def chunked_cross_entropy(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, chunks: int
) -> jax.Array:
    """`cross_entropy` of the logits `x @ kernel`, float32 `[B, N]`, with a part of them at a time.

    Args:
      x: `[B, N, W]`.
      kernel: `[W, K]` of the same type.
      targets: int32 `[B, N]`.
      chunks: number of parts, a divisor of N; each has positions of the whole batch, which keeps
        its sharding.
    """

    def step(_, chunk):
        x, targets = chunk
        return None, cross_entropy(x @ kernel, targets)

    _, values = jax.lax.scan(step, None, _split((x, targets), chunks))
    return _join(values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def mean_cross_entropy(
    x: jax.Array, kernel: jax.Array, targets: jax.Array, chunks: int, shards: int = 1
) -> jax.Array:
    """Mean of `chunked_cross_entropy`, a scalar that can be differentiated without more memory.

    All codes have the same weight in a mean, so a chunk's gradients are computed along with its
    loss, and its logits only once.

    Args:
      x, kernel, targets, chunks: as there.
      shards: of the batch, a divisor of B. Each adds up a gradient of the kernel of its own: a
        common one would be summed over devices in every chunk.
    """
    return chunked_cross_entropy(x, kernel, targets, chunks).mean()


def _mean_cross_entropy(x, kernel, targets, chunks, shards):
    def step(total, chunk):
        x, targets = chunk
        values, residuals = _cross_entropy(x @ kernel, targets)
        by_logits, _ = _cross_entropy_gradient(residuals, jnp.ones_like(values))
        by_x = jnp.einsum("bnk,wk->bnw", by_logits, kernel)
        parts = (rearrange(y, "(s b) n c -> s (b n) c", s=shards) for y in (x, by_logits))
        # A sum in bfloat16 would be rounded after each chunk.
        total += jnp.einsum("smw,smk->swk", *parts, preferred_element_type=jnp.float32)
        return sharding.constrain(total, *axes), (values, by_x)

    axes = "batch" if shards > 1 else None, None, "vocab"
    start = sharding.constrain(jnp.zeros((shards, *kernel.shape), jnp.float32), *axes)
    total, (values, by_x) = jax.lax.scan(step, start, _split((x, targets), chunks))
    return values.mean(), (_join(by_x), total.sum(0))


def _mean_cross_entropy_gradient(chunks, shards, residuals, gradient):
    by_x, by_kernel = residuals
    scale = gradient / (by_x.shape[0] * by_x.shape[1])
    return (scale * by_x).astype(by_x.dtype), (scale * by_kernel).astype(by_x.dtype), None


mean_cross_entropy.defvjp(_mean_cross_entropy, _mean_cross_entropy_gradient)


def _split(arrays, chunks):
    return jax.tree.map(lambda x: rearrange(x, "b (c n) ... -> c b n ...", c=chunks), arrays)


def _join(x):
    return rearrange(x, "c b n ... -> b (c n) ...")
