"""Vector quantization: nearest-code search, gradient estimators, codebook usage.

The distance matrix of a B-L batch, 65,536 latents by 16,384 codes, would take 4 GiB. The search is
exact but computes only a chunk of rows at a time, in the forward and backward pass.
"""

import math

from einops import rearrange
import jax
from jax import lax
import jax.numpy as jnp

ENTROPY_TEMPERATURE = 0.01
HISTORY_LENGTH = 65_536  # assignments over which codebook usage is measured
CHUNK_ELEMENTS = 2**24  # maximum elements of the distance matrix at a time: 64 MiB in float32


def normalize(x: jax.Array) -> jax.Array:
    """Scales the last axis to unit length; a zero vector stays zero, with a finite gradient."""
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squared, 1e-24))


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
    chunks = _chunks(z, codebook, chunk_elements)
    if entropy:
        indices, loss = _search_with_entropy(chunks, codebook)
    else:
        indices = lax.map(lambda chunk: _nearest(_distances(chunk, codebook)), chunks)
        loss = jnp.zeros(())
    return _join(indices, z.shape[:-1]), loss


def most_probable(
    z: jax.Array, codebook: jax.Array, *, chunk_elements: int = CHUNK_ELEMENTS
) -> jax.Array:
    """Finds the code with the largest softmax of inner products with each latent.

    This is the choice of index backpropagation (Shi et al. 2024, "Scalable Image Tokenization with
    Index Backpropagation Quantization"). As in the authors' program, probabilities are compared,
    not products: of those that are the same number in float32, the first is chosen.

    Args:
      z: `[..., D]` float32.
      codebook: `[K, D]` float32.
      chunk_elements: as for `search`.

    Returns:
      Codes `[...]` int32.
    """

    def choose(chunk):
        probabilities = jax.nn.softmax(_products(chunk, codebook))
        return jnp.argmax(probabilities, axis=-1).astype(jnp.int32)

    return _join(lax.map(choose, _chunks(z, codebook, chunk_elements)), z.shape[:-1])


def bits_to_codes(z: jax.Array) -> jax.Array:
    """Maps latents `[..., D]` to codes `[...]` int32 by the signs of their channels.

    This is lookup-free quantization as in Open-MAGVIT2 (Luo et al. 2024): bit d of a code is set if
    channel d is positive, so channel 0 is the least significant bit. Other programs differ.
    """
    bits = (z > 0).astype(jnp.int32)
    return jnp.sum(bits << jnp.arange(z.shape[-1]), axis=-1, dtype=jnp.int32)


def codes_to_bits(codes: jax.Array, width: int) -> jax.Array:
    """The inverse of `bits_to_codes`: `[...]` to `[..., width]` float32, each -1 or 1."""
    bits = (codes[..., None] >> jnp.arange(width)) & 1
    return jnp.where(bits == 1, 1.0, -1.0)


def _chunks(z: jax.Array, codebook: jax.Array, chunk_elements: int) -> jax.Array:
    """Latents `[..., D]` as `[n, M, D]`, so that M rows by all codes have `chunk_elements`."""
    codes, width = codebook.shape
    flat = z.reshape(-1, width)
    rows = flat.shape[0]
    # The fewest chunks of equal size within the bound, or single rows.
    least = min(math.ceil(rows * codes / chunk_elements), rows)
    count = next(n for n in range(least, rows + 1) if rows % n == 0)
    # Chunks are strided, so that each has rows of every device's contiguous shard of the batch.
    return rearrange(flat, "(m n) d -> n m d", n=count)


def _join(codes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The codes `[n, M]` of chunks in the latents' `shape`."""
    return rearrange(codes, "n m -> (m n)").reshape(shape)


def _products(chunk: jax.Array, codebook: jax.Array) -> jax.Array:
    """Inner products `[M, K]`."""
    # Full precision: bfloat16 or TF32 products would change which code is chosen.
    return jnp.einsum("md,kd->mk", chunk, codebook, precision=lax.Precision.HIGHEST)


def _distances(chunk: jax.Array, codebook: jax.Array) -> jax.Array:
    """Squared distances `[M, K]`."""
    squares = jnp.sum(chunk * chunk, -1)[:, None] + jnp.sum(codebook * codebook, -1)
    return squares - 2 * _products(chunk, codebook)


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
        highest = {"precision": lax.Precision.HIGHEST}
        chunk_gradient = jnp.einsum("mk,kd->md", by_product, codebook, **highest)
        # The last column is the sum that the squares of the codes need.
        extended = jnp.concatenate([chunk, jnp.ones_like(chunk[:, :1])], -1)
        codebook_gradient += jnp.einsum("mk,md->kd", by_product, extended, **highest)
        return codebook_gradient, chunk_gradient

    width = codebook.shape[1]
    start = jnp.zeros((len(codebook), width + 1))
    found, chunk_gradients = lax.scan(step, start, (*scanned, normalizer, row_entropy))
    return chunk_gradients, found[:, :width] - found[:, width:] * codebook


_search_with_entropy.defvjp(_search_with_entropy_forward, _search_with_entropy_backward)


def pass_gradient(z: jax.Array, quantized: jax.Array, rule: str) -> jax.Array:
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
