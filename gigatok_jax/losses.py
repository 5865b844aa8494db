"""Training losses of the tokenizer, each a pure function (SPEC 2)."""

import jax
import jax.numpy as jnp


def hinge_discriminator(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """0.5 (mean relu(1 - real) + mean relu(1 + fake))."""
    return 0.5 * (jax.nn.relu(1 - logits_real).mean() + jax.nn.relu(1 + logits_fake).mean())


def hinge_generator(logits_fake: jax.Array) -> jax.Array:
    return -logits_fake.mean()


def semantic(features: jax.Array, target: jax.Array) -> jax.Array:
    """-mean cosine between `[B, T, C]` projected features and the teacher's, a token at a time.

    The paper's formula has the sign the other way; it is minimised.
    """

    def unit(x):
        squared = jnp.sum(x * x, axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))

    return -jnp.sum(unit(features) * unit(target), axis=-1).mean()
