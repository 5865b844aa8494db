"""Vector quantization: exact code search in chunks, gradient rules, entropy, usage."""

import math

from einops import rearrange
import jax
from jax import lax
import jax.numpy as jnp

ENTROPY_TEMPERATURE = 0.01
HISTORY_LENGTH = 65_536  # assignments over which codebook usage is measured
CHUNK_ELEMENTS = 2**24  # largest piece of the distance matrix held at once: 64 MiB in float32
GRADIENTS = ("straight_through", "rotation")


def normalize(x: jax.Array) -> jax.Array:
    """Scales the last axis to unit length; a zero vector stays zero, as does its gradient."""
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(squared, 1e-24))


def _distances(z: jax.Array, codebook: jax.Array) -> jax.Array:
    """Squared distances `[M, K]` between rows of `[M, D]` and `[K, D]`, in full float32."""
    product = jnp.einsum("md,kd->mk", z, codebook, precision=lax.Precision.HIGHEST)
    return jnp.sum(z * z, -1)[:, None] + jnp.sum(codebook * codebook, -1) - 2 * product


def _chunks(rows: int, codes: int, limit: int) -> int:
    """Smallest divisor of `rows` that keeps a chunk within `limit`, or one row a chunk."""
    wanted = min(math.ceil(rows * codes / limit), rows)
    return next(n for n in range(wanted, rows + 1) if rows % n == 0)


def search(
    z: jax.Array,
    codebook: jax.Array,
    *,
    entropy: bool = False,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[jax.Array, jax.Array]:
    """Finds each latent's nearest code and, if asked, the entropy loss.

    The distance matrix is formed a chunk of rows at a time, and again in the backward pass.

    Args:
      z: `[..., D]` float32.
      codebook: `[K, D]` float32.
      entropy: whether to compute the entropy loss; it is 0 otherwise.
      chunk_elements: bound on the elements of a chunk; a single row may exceed it.

    Returns:
      Codes `[...]` int32 (the first one in a tie), and the entropy loss, a scalar:
      mean of H(p) - H(mean of p), p = softmax(-distance / 0.01), over all latents.
    """
    codes, width = codebook.shape
    flat = z.reshape(-1, width)
    rows = flat.shape[0]
    count = _chunks(rows, codes, chunk_elements)
    # Strided chunks: each takes rows from every device's contiguous shard of the batch.
    chunks = rearrange(flat, "(m n) d -> n m d", n=count)

    def step(carry, chunk):
        distances = _distances(chunk, codebook)
        indices = jnp.argmin(distances, axis=-1).astype(jnp.int32)
        if not entropy:
            return carry, indices
        # The reference adds 1e-5 to the logits of the log-softmax, where it changes nothing.
        log_p = jax.nn.log_softmax(-distances / ENTROPY_TEMPERATURE)
        p = jnp.exp(log_p)
        row_entropy, p_sum = carry
        return (row_entropy - jnp.sum(p * log_p), p_sum + p.sum(0)), indices

    carry = (jnp.zeros(()), jnp.zeros(codes)) if entropy else ()
    carry, indices = lax.scan(jax.checkpoint(step, prevent_cse=False), carry, chunks)
    indices = rearrange(indices, "n m -> (m n)").reshape(z.shape[:-1])
    if not entropy:
        return indices, jnp.zeros(())
    row_entropy, p_sum = carry
    mean_p = p_sum / rows
    return indices, row_entropy / rows + jnp.sum(mean_p * jnp.log(mean_p + 1e-5))


def pass_gradient(z: jax.Array, quantized: jax.Array, rule: str) -> jax.Array:
    """Returns `quantized` in the forward pass, with a gradient to `z` in the backward pass.

    Args:
      z: `[..., D]`.
      quantized: `[..., D]`, the nearest code vectors.
      rule: "straight_through" copies the gradient; "rotation" rotates it from the code's
        direction to that of z (Fifty et al. 2024, "Restructuring Vector Quantization with the
        Rotation Trick").
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
    """The usage history before any assignment: `[65536]` int32 of -1."""
    return jnp.full((HISTORY_LENGTH,), -1, jnp.int32)


def update_history(history: jax.Array, codes: jax.Array) -> jax.Array:
    """Appends `codes` (any shape) to `history`, dropping the oldest assignments."""
    return jnp.concatenate([history, codes.reshape(-1)])[-history.shape[0] :]


def codebook_usage(history: jax.Array, codebook_size: int) -> jax.Array:
    """Share of the codes that occur in `history`, in [0, 1]; entries of -1 do not count."""
    seen = jnp.zeros(codebook_size, bool).at[jnp.where(history < 0, codebook_size, history)]
    return seen.set(True, mode="drop").mean(dtype=jnp.float32)
