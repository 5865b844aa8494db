"""Quantizers without a codebook: a code is computed from the latent, channel by channel.

FSQ rounds each channel to one of a few levels. LFQ and BSQ keep its sign, one bit per channel. All
have the interface of `quantizer.VQ`.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.models.quantizer import Quantized, normalize, pass_gradient

LFQ_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True)
class FSQ:
    """Finite scalar quantization (Mentzer et al. 2023): channel i is rounded to `levels[i]` values.

    The form of vector-quantize-pytorch. The paper's own code bounds the latents a little more
    tightly and shifts even levels by a tangent, so that latents between two levels can get other
    codes there. There are no losses. The first channel is the least significant digit of a code.
    """

    levels: tuple[int, ...]

    def encode(self, z: jax.Array) -> jax.Array:
        return self._codes(jnp.round(self._bounded(z)))

    def look_up(self, codes: jax.Array) -> jax.Array:
        levels, half = np.int32(self.levels), np.int32(self.levels) // 2
        digits = codes[..., None] // self._places() % levels
        return ((digits - half) / half).astype(jnp.float32)

    def quantize(self, z: jax.Array, *, entropy: bool = False) -> Quantized:
        bounded = self._bounded(z)
        rounded = jnp.round(bounded)
        vectors = pass_gradient(bounded, rounded) / (np.float32(self.levels) // 2)
        return Quantized(vectors, self._codes(rounded))

    def _bounded(self, z):
        """The latents in an interval with `levels` whole numbers."""
        levels = np.array(self.levels)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = np.where(levels % 2, 0, 0.5)
        shift = np.arctanh(offset / half)
        return jnp.tanh(z + np.float32(shift)) * np.float32(half) - np.float32(offset)

    def _codes(self, rounded):
        digits = rounded.astype(jnp.int32) + np.int32(self.levels) // 2
        return jnp.sum(digits * self._places(), axis=-1)

    def _places(self):
        return np.cumprod([1, *self.levels[:-1]]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class LFQ:
    """Lookup-free quantization (Yu et al. 2023): the sign of each channel, as -1 or 1.

    The form of Open-MAGVIT2, whose first channel is the least significant bit of a code;
    vector-quantize-pytorch has it as the most significant. The losses are those of all 2^bits
    codes, the entropy at temperature 0.01.
    """

    bits: int
    first_is_most_significant: bool = False

    def encode(self, z: jax.Array) -> jax.Array:
        return jnp.sum((z > 0) * self._places(), axis=-1, dtype=jnp.int32)

    def look_up(self, codes: jax.Array) -> jax.Array:
        return jnp.where(codes[..., None] & self._places(), 1.0, -1.0)

    def quantize(self, z: jax.Array, *, entropy: bool = False) -> Quantized:
        signs = jnp.where(z > 0, 1.0, -1.0)
        commitment = 0.25 * jnp.mean((signs - z) ** 2)
        found = Quantized(pass_gradient(z, signs), self.encode(z), commitment_loss=commitment)
        if entropy:
            sample, batch = bit_entropies(4 * z / LFQ_TEMPERATURE, group=self.bits, epsilon=1e-5)
            found = found._replace(entropy_loss=sample - batch)
        return found

    def _places(self):
        places = 2 ** np.arange(self.bits, dtype=np.int32)
        return places[::-1] if self.first_is_most_significant else places


@dataclasses.dataclass(frozen=True)
class BSQ:
    """Binary spherical quantization (Zhao et al. 2024): LFQ on the unit sphere.

    The form of bsq-vit. Latents and codes have unit length. The first channel is the most
    significant bit of a code. Straight-through gradients are scaled by bits^-0.5, as the vectors
    are. The entropy of the batch is that of each channel, added up: an upper bound, which needs the
    least memory.
    """

    bits: int

    def encode(self, z: jax.Array) -> jax.Array:
        return self._signs.encode(z)

    def look_up(self, codes: jax.Array) -> jax.Array:
        return self._signs.look_up(codes) * self.bits**-0.5

    def quantize(self, z: jax.Array, *, entropy: bool = False) -> Quantized:
        return self.quantize_unit(normalize(z), entropy=entropy)

    def quantize_unit(self, z: jax.Array, *, entropy: bool = False) -> Quantized:
        """As `quantize`, for latents that have unit length already."""
        scale = self.bits**-0.5
        signs = jnp.where(z > 0, 1.0, -1.0)
        commitment = 0.25 * jnp.mean(jnp.sum((signs * scale - z) ** 2, axis=-1))
        vectors = pass_gradient(z, signs) * scale
        found = Quantized(vectors, self.encode(z), commitment_loss=commitment)
        if entropy:
            sample, batch = bit_entropies(4 * scale * z, group=1, epsilon=1e-8)
            found = found._replace(entropy_loss=sample - batch)
        return found

    @property
    def _signs(self):
        return LFQ(self.bits, first_is_most_significant=True)


def bit_entropies(logits: jax.Array, *, group: int, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Entropies of codes whose bits are independent, given the latent.

    Args:
      logits: log-odds of each bit, `[..., bits]`.
      group: bits in a group, a divisor of their number.
      epsilon: added to the probabilities of the second entropy inside the logarithm.

    Returns:
      The mean entropy of a latent's code, and the entropy of the mean distribution of a group,
      added up over groups.
    """
    size = jnp.abs(logits)
    each = jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size)
    bits = logits.shape[-1]
    rows = jax.nn.sigmoid(logits).reshape(-1, bits // group, group)  # [T, groups, bits]
    # The joint probability of all bits is a product of that of two halves. So the mean over latents
    # is a matrix product, and 2^bits probabilities need not be stored for every latent.
    first, second = _joint(rows[..., : group // 2]), _joint(rows[..., group // 2 :])
    mean = jnp.einsum("tgi,tgj->gij", first, second, precision=lax.Precision.HIGHEST) / len(rows)
    return each.sum(-1).mean(), -jnp.sum(mean * jnp.log(mean + epsilon))


def _joint(p):
    """Probabilities `[..., 2^n]` of all combinations of n independent bits `[..., n]`."""
    joint = jnp.ones((*p.shape[:-1], 1))
    for i in range(p.shape[-1]):
        bit = p[..., i, None]
        joint = jnp.concatenate([joint * (1 - bit), joint * bit], axis=-1)
    return joint
