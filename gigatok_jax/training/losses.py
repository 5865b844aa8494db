"""Training losses, each a pure function.

Scalars are means over the batch, so that a batch in parts (`accumulate`) gives the same. Others
keep the axes that their docstrings name. L2 is in `training.tokenizer`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gigatok_jax.models.quantizer import normalize


def hinge_discriminator(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """0.5 (mean relu(1 - real) + mean relu(1 + fake))."""
    return 0.5 * (jax.nn.relu(1 - logits_real).mean() + jax.nn.relu(1 + logits_fake).mean())


def hinge_generator(logits_fake: jax.Array) -> jax.Array:
    return -logits_fake.mean()


def semantic(features: jax.Array, target: jax.Array) -> jax.Array:
    """-mean cosine between `[B, T, C]` projected features and the teacher's, a token at a time.

    The paper's formula has the sign the other way; it is minimised.
    """
    return -jnp.sum(normalize(features) * normalize(target), axis=-1).mean()


def feature_distance(first: Sequence[jax.Array], second: Sequence[jax.Array]) -> jax.Array:
    """Perceptual distance of two batches of images from a frozen network's features.

    As in LPIPS, without its learned weights: every token is normalised to unit length, squared
    differences are summed over its channels, and the mean is taken over tokens and layers. Lies in
    [0, 4], is computed in float32, and is differentiable where the images are equal.

    Args:
      first, second: a layer's features `[B, T, C]` each, such as the taps of `models.vit.ViT`;
        T and C may differ between layers.

    Returns:
      `[B]`.
    """

    def layer(x, y):
        x, y = (normalize(a.astype(jnp.float32)) for a in (x, y))
        return jnp.square(x - y).sum(axis=-1).mean(axis=-1)

    return jnp.stack([layer(x, y) for x, y in zip(first, second, strict=True)]).mean(axis=0)


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax of the targets, float32 `[...]`, of logits `[..., K]` of any type.

    The conversion to float32 is part of the reduction: no copy of the logits is made.
    """
    normalizer = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return normalizer - picked.astype(jnp.float32)
