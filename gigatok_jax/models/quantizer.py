"""Quantizers with a codebook: nearest-code search, gradient estimators, codebook usage.

The distance matrix of a B-L batch, 65,536 latents by 16,384 codes, would take 4 GiB. The search is
exact but computes only a chunk of rows at a time, in the forward and backward pass.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from einops import rearrange
import jax
from jax import lax
import jax.numpy as jnp

ENTROPY_TEMPERATURE = 0.01
HISTORY_LENGTH = 65_536  # assignments over which codebook usage is measured
CHUNK_ELEMENTS = 2**24  # maximum elements of the distance matrix at a time: 64 MiB in float32


class Quantized(NamedTuple):
    """Result of a quantizer in training; losses are unweighted scalars, 0 if it has none."""

    vectors: jax.Array  # `[..., D]`, what the decoder receives
    codes: jax.Array  # `[...]` int32
    codebook_loss: jax.Array | float = 0.0
    commitment_loss: jax.Array | float = 0.0
    entropy_loss: jax.Array | float = 0.0  # also 0 unless asked for


def normalize(x: jax.Array) -> jax.Array:
    """Scales the last axis to unit length; a zero vector stays zero, with a finite gradient."""
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squared, 1e-24))


@dataclasses.dataclass(frozen=True)
class VQ:
    """Vector quantization (van den Oord et al. 2017): the nearest code of a codebook.

    All quantizers have these three methods. Latents are float32 `[..., D]`.
    """

    codebook: jax.Array  # [K, D]
    unit: bool = True  # whether to compare latents and codes on the unit sphere
    gradient: str = "straight_through"  # see `pass_gradient`

    def encode(self, z: jax.Array) -> jax.Array:
        """The codes of latents, `[...]` int32."""
        return search(self._project(z), self._project(self.codebook))[0]

    def look_up(self, codes: jax.Array) -> jax.Array:
        """The vectors `[..., D]` that codes stand for."""
        return self._project(self.codebook)[codes]

    def quantize(self, z: jax.Array, *, entropy: bool = False) -> Quantized:
        """Codes, vectors through which gradients pass, and losses, for training."""
        z, codebook = self._project(z), self._project(self.codebook)
        codes, entropy_loss = search(z, codebook, entropy=entropy)
        q = codebook[codes]
        return Quantized(
            vectors=pass_gradient(z, q, self.gradient),
            codes=codes,
            codebook_loss=jnp.mean((q - lax.stop_gradient(z)) ** 2),
            commitment_loss=0.25 * jnp.mean((lax.stop_gradient(q) - z) ** 2),
            entropy_loss=entropy_loss,
        )

    def _project(self, vectors):
        return normalize(vectors) if self.unit else vectors


@dataclasses.dataclass(frozen=True)
class IBQ:
    """Index back-propagation quantization (Shi et al. 2024): the code of largest inner product.

    The vectors' gradient reaches all codes, through the softmax of the inner products. Each
    chunk's products are computed again in the backward pass.
    """

    codebook: jax.Array  # [K, D]
    chunk_elements: int = CHUNK_ELEMENTS

    def encode(self, z: jax.Array) -> jax.Array:
        chunks = _chunks(z, len(self.codebook), self.chunk_elements)
        return _unchunk(lax.map(lambda chunk: self._assign(chunk)[1], chunks), z)

    def look_up(self, codes: jax.Array) -> jax.Array:
        return self.codebook[codes]

    def quantize(self, z: jax.Array, *, entropy: bool = False) -> Quantized:
        @jax.checkpoint
        def assign(chunk, codebook):
            logits, codes, p = self._assign(chunk)
            hard = jax.nn.one_hot(codes, len(codebook))
            vectors = _product("mk,kd->md", hard - lax.stop_gradient(p) + p, codebook)
            if not entropy:
                return codes, vectors, 0.0, 0.0
            log_p = jax.nn.log_softmax(logits / ENTROPY_TEMPERATURE)
            p = jnp.exp(log_p)
            return codes, vectors, -jnp.sum(p * log_p), p.sum(0)

        def step(carry, chunk):
            codes, vectors, *sums = assign(chunk, self.codebook)
            return jax.tree.map(jnp.add, carry, tuple(sums)), (codes, vectors)

        start = (jnp.zeros(()), jnp.zeros(len(self.codebook) if entropy else ()))
        chunks = _chunks(z, len(self.codebook), self.chunk_elements)
        (total, p_sum), (codes, vectors) = lax.scan(step, start, chunks)
        codes, vectors = _unchunk(codes, z), _unchunk(vectors, z)
        mean_p = p_sum / codes.size
        e, constant = self.codebook[codes], lax.stop_gradient
        codebook_loss = jnp.mean((vectors - z) ** 2) + 0.25 * jnp.mean((e - constant(z)) ** 2)
        return Quantized(
            vectors=vectors,
            codes=codes,
            codebook_loss=codebook_loss,
            commitment_loss=jnp.mean((constant(e) - z) ** 2),
            entropy_loss=total / codes.size + jnp.sum(mean_p * jnp.log(mean_p + 1e-5)),
        )

    def _assign(self, chunk):
        """Inner products `[M, K]`, codes `[M]`, and the softmax `[M, K]`."""
        logits = _product("md,kd->mk", chunk, self.codebook)
        p = jax.nn.softmax(logits)
        # As in the reference, of the probabilities: two that round to the same number are a tie.
        return logits, jnp.argmax(p, -1).astype(jnp.int32), p


def search(
    z: jax.Array,
    codebook: jax.Array,
    *,
    entropy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[jax.Array, jax.Array]:
    """Finds each latent's nearest code and, optionally, the entropy loss.

    Args:
      z: `[..., D]` float32.
      codebook: `[K, D]` float32.
      entropy: whether to compute the entropy loss; it is 0 otherwise.
      chunk_elements: maximum elements of a chunk; a single row may exceed it.

    Returns:
      Codes `[...]` int32 (the first in a tie), and the entropy loss, a scalar: the mean of
      H(p) over all latents minus H(mean of p), where p = softmax(-squared distance / 0.01).
    """
    chunks = _chunks(z, len(codebook), chunk_elements)
    if entropy:
        indices, loss = _search_with_entropy(chunks, codebook)
    else:
        indices = lax.map(lambda chunk: _nearest(_distances(chunk, codebook)), chunks)
        loss = jnp.zeros(())
    return _unchunk(indices, z), loss


def look_up_first(
    quantizer: Any, codes: jax.Array, keep: jax.Array, codebook_size: int
) -> jax.Array:
    """Vectors of codes `[B, N]`; the mean of the codebook after the first `keep` `[B]`."""
    mean = quantizer.look_up(jnp.arange(codebook_size)).mean(0)
    kept = jnp.arange(codes.shape[1]) < keep[:, None]
    return jnp.where(kept[..., None], quantizer.look_up(codes), mean)


def chunk_count(rows: int, width: int, chunk_elements: int) -> int:
    """The fewest equal chunks of `[rows, width]` within the bound, or one for each row."""
    least = min(math.ceil(rows * width / chunk_elements), rows)
    return next(n for n in range(least, rows + 1) if rows % n == 0)


def _chunks(z: jax.Array, codes: int, chunk_elements: int) -> jax.Array:
    """Latents `[..., D]` as `[n, M, D]`, with M * codes within the bound or M = 1."""
    flat = z.reshape(-1, z.shape[-1])
    count = chunk_count(len(flat), codes, chunk_elements)
    # Chunks are strided, so that each has rows of every device's contiguous shard of the batch.
    return rearrange(flat, "(m n) d -> n m d", n=count)


def _unchunk(x: jax.Array, z: jax.Array) -> jax.Array:
    """Restores what was computed from `_chunks(z, ...)`, `[n, M, ...]`, to the order of `z`."""
    return rearrange(x, "n m ... -> (m n) ...").reshape(*z.shape[:-1], *x.shape[2:])


def _product(equation: str, *arrays: jax.Array) -> jax.Array:
    # Full precision: bfloat16 or TF32 products would change which code is nearest.
    return jnp.einsum(equation, *arrays, precision=lax.Precision.HIGHEST)


def _distances(chunk: jax.Array, codebook: jax.Array) -> jax.Array:
    """Squared distances `[M, K]`."""
    product = _product("md,kd->mk", chunk, codebook)
    squares = jnp.sum(chunk * chunk, -1)[:, None] + jnp.sum(codebook * codebook, -1)
    return squares - 2 * product


def _nearest(distances: jax.Array) -> jax.Array:
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


@jax.custom_vjp
def _search_with_entropy(chunks, codebook):
    return _search_with_entropy_forward(chunks, codebook)[0]


def _search_with_entropy_forward(chunks, codebook):
    """For latents `[n, M, D]`: codes `[n, M]`, and the entropy loss.

    With l the logits, p their softmax, a row's H(p) is log(sum of exp l) - sum of p l.
    """

    def step(carry, chunk):
        distances = _distances(chunk, codebook)
        # The reference adds 1e-5 to all logits, to which the softmax is invariant.
        largest = distances.min(-1) / -ENTROPY_TEMPERATURE
        logits = distances / -ENTROPY_TEMPERATURE - largest[:, None]
        exponentials = jnp.exp(logits)
        sums = exponentials.sum(-1)
        row_entropy = jnp.log(sums) - jnp.sum(exponentials * logits, -1) / sums
        total, p_sum = carry
        carry = total + row_entropy.sum(), p_sum + (exponentials / sums[:, None]).sum(0)
        return carry, (_nearest(distances), largest + jnp.log(sums), row_entropy)

    carry = (jnp.zeros(()), jnp.zeros(len(codebook)))
    (total, p_sum), (indices, normalizer, row_entropy) = lax.scan(step, carry, chunks)
    mean_p = p_sum / indices.size
    loss = total / indices.size + jnp.sum(mean_p * jnp.log(mean_p + 1e-5))
    return (indices, loss), (chunks, codebook, normalizer, row_entropy, mean_p)


def _search_with_entropy_backward(residuals, gradients):
    """Computes the distances of a chunk again, and their gradient in one pass.

    Sums over the codes of the logits' gradient vanish, as the softmax is invariant to an addition,
    and with them the gradient through the squares of the latents.
    """
    *scanned, codebook, normalizer, row_entropy, mean_p = residuals
    scale = gradients[1] / normalizer.size
    slope = jnp.log(mean_p + 1e-5) + mean_p / (mean_p + 1e-5)  # of the second term, by mean p

    def step(codebook_gradient, part):
        chunk, normalizer, row_entropy = part
        log_p = _distances(chunk, codebook) / -ENTROPY_TEMPERATURE - normalizer[:, None]
        p = jnp.exp(log_p)
        mean_slope = jnp.sum(p * slope, -1)
        by_logits = p * (slope - log_p - (mean_slope + row_entropy)[:, None])
        by_product = by_logits * (2 * scale / ENTROPY_TEMPERATURE)
        chunk_gradient = _product("mk,kd->md", by_product, codebook)
        # The last column is the sum that the squares of the codes need.
        extended = jnp.concatenate([chunk, jnp.ones_like(chunk[:, :1])], -1)
        codebook_gradient += _product("mk,md->kd", by_product, extended)
        return codebook_gradient, chunk_gradient

    width = codebook.shape[1]
    start = jnp.zeros((len(codebook), width + 1))
    found, chunk_gradients = lax.scan(step, start, (*scanned, normalizer, row_entropy))
    return chunk_gradients, found[:, :width] - found[:, width:] * codebook


_search_with_entropy.defvjp(_search_with_entropy_forward, _search_with_entropy_backward)


def pass_gradient(z: jax.Array, quantized: jax.Array, rule: str = "straight_through") -> jax.Array:
    """Returns `quantized`, the codes nearest to `z`, but passes the gradient to `z`.

    The rule "straight_through" copies the gradient. "rotation" rotates it from the direction of the
    code to that of z (Fifty et al. 2024, "Restructuring Vector Quantization with the Rotation
    Trick").
    """
    if rule == "straight_through":
        return z + lax.stop_gradient(quantized - z)
    constant_z, q = lax.stop_gradient((z, quantized))
    u_hat, q_hat = normalize(constant_z), normalize(q)
    w = normalize(u_hat + q_hat)
    scale = jnp.linalg.norm(q, axis=-1, keepdims=True) / jnp.maximum(
        jnp.linalg.norm(constant_z, axis=-1, keepdims=True), 1e-6
    )
    along_w = jnp.sum(z * w, axis=-1, keepdims=True)
    along_u = jnp.sum(z * u_hat, axis=-1, keepdims=True)
    return scale * (z - 2 * along_w * w + 2 * along_u * q_hat)


def empty_history() -> jax.Array:
    """A history without assignments: `[65536]` int32, all -1."""
    return jnp.full((HISTORY_LENGTH,), -1, jnp.int32)


def update_history(history: jax.Array, codes: jax.Array) -> jax.Array:
    """Appends `codes` (any shape) to `history`, dropping the oldest assignments."""
    return jnp.concatenate([history, codes.reshape(-1)])[-history.shape[0] :]


def codebook_usage(history: jax.Array, codebook_size: int) -> jax.Array:
    """Fraction of the codes that occur in `history`, in [0, 1]; ignores entries of -1."""
    seen = jnp.zeros(codebook_size, bool).at[jnp.where(history < 0, codebook_size, history)]
    return seen.set(True, mode="drop").mean(dtype=jnp.float32)
