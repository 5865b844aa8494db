"""Distances between sets of images, from features of each; definitions of ADM's evaluator.

Sums are float64 on the host, whose memory they take is that of one covariance: features of each
batch come from all devices, and neither order nor batch size matters to more than rounding.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax.errors import UserError

NEIGHBOURS = 3
ROWS = 1_000  # of a distance matrix at once


@dataclasses.dataclass
class Moments:
    """Running sums of feature vectors.

    Attributes:
      count: number of vectors, n.
      total: their sum, float64 `[D]`.
      outer: sum of their outer products, float64 `[D, D]`.
    """

    count: int
    total: np.ndarray
    outer: np.ndarray

    @classmethod
    def empty(cls, width: int) -> "Moments":
        return cls(0, np.zeros(width), np.zeros((width, width)))

    def add(self, features: np.ndarray) -> None:
        """Takes in `[n, D]`.

        Raises:
          UserError: a feature is not finite.
        """
        if not np.isfinite(features).all():
            bad = int(np.argmin(np.isfinite(features).all(axis=1)))
            raise UserError(f"features of image {self.count + bad} are not finite")
        features = np.asarray(features, np.float64)
        self.count += len(features)
        self.total += features.sum(axis=0)
        self.outer += features.T @ features

    def gaussian(self) -> "Gaussian":
        """Mean and unbiased covariance.

        Raises:
          UserError: fewer than two vectors.
        """
        if self.count < 2:
            raise UserError(f"a covariance needs at least 2 images, got {self.count}")
        mean = self.total / self.count
        covariance = (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean `[D]` and covariance `[D, D]`, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), the FID where features are Inception's.

    The last trace is the sum of the singular values of A1' A2, where Si = Ai Ai': stable for
    covariances of any rank, real and without a matrix root.

    Raises:
      ValueError: the Gaussians differ in dimension.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"features have {first.mean.size} dimensions on one side, {second.mean.size} on the "
            "other"
        )
    difference = first.mean - second.mean
    roots = [_root(gaussian.covariance) for gaussian in (first, second)]
    cross = np.linalg.svd(roots[0].T @ roots[1], compute_uv=False).sum()
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross
    return float(max(difference @ difference + spread, 0.0))


def _root(covariance: np.ndarray) -> np.ndarray:
    """`[D, r]` A with A A' = covariance, r its rank."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, kept] * np.sqrt(values[kept])


class InceptionScore:
    """exp of the mean KL divergence of predictions from their mean, averaged over splits.

    Args:
      split: images of a split, in the order in which they come; the last may be smaller.
    """

    def __init__(self, split: int = 5_000):
        self._split, self._scores = split, []
        self._count, self._entropy, self._total = 0, 0.0, 0.0

    def add(self, log_probabilities: np.ndarray) -> None:
        """Takes in the log softmax `[n, K]` of the next images."""
        while len(log_probabilities):
            part = np.asarray(log_probabilities[: self._split - self._count], np.float64)
            log_probabilities = log_probabilities[len(part) :]
            probabilities = np.exp(part)
            self._count += len(part)
            self._entropy += np.sum(probabilities * part)
            self._total += probabilities.sum(axis=0)
            if self._count == self._split:
                self._close()

    def _close(self):
        mean = self._total / self._count
        marginal = np.sum(mean * np.log(np.maximum(mean, np.finfo(np.float64).tiny)))
        self._scores.append(np.exp(self._entropy / self._count - marginal))
        self._count, self._entropy, self._total = 0, 0.0, 0.0

    def result(self) -> float:
        if self._count:
            self._close()
        return float(np.mean(self._scores))


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, neighbours: int = NEIGHBOURS
) -> tuple[float, float]:
    """Shares of each set inside the other's manifold (Kynkaanniemi et al. 2019).

    A set's manifold is the union of balls around its members, each as wide as the distance to its
    `neighbours`-th nearest other member.  Distances are taken in blocks of rows.

    Args:
      reference, samples: features `[n, D]`, `[m, D]`.
      neighbours: k.

    Raises:
      UserError: a set has no more than k members.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbours:
            raise UserError(
                f"precision and recall need more than {neighbours} images, got {len(features)} "
                f"in the {name}"
            )
    reference, samples = jnp.asarray(reference), jnp.asarray(samples)
    radii = [_radii(features, neighbours) for features in (reference, samples)]
    precision = _share_inside(samples, reference, radii[0])
    recall = _share_inside(reference, samples, radii[1])
    return precision, recall


@jax.jit
def _squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    product = jnp.matmul(x, y.T, precision="highest")
    norms = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)
    return jnp.maximum(norms - 2 * product, 0)


def _blocks(features: jax.Array):
    return (features[start : start + ROWS] for start in range(0, len(features), ROWS))


def _radii(features: jax.Array, neighbours: int) -> jax.Array:
    """Squared distance of each vector to its k-th nearest other one, `[n]`."""

    def of(block):
        # The nearest is the vector itself.
        return -jax.lax.top_k(-_squared_distances(block, features), neighbours + 1)[0][:, -1]

    return jnp.concatenate([of(block) for block in _blocks(features)])


def _share_inside(features: jax.Array, others: jax.Array, radii: jax.Array) -> float:
    """Share of `features` in any ball of squared `radii` around `others`."""
    inside = [
        np.asarray(jnp.any(_squared_distances(block, others) <= radii, axis=1))
        for block in _blocks(features)
    ]
    return float(np.concatenate(inside).mean())
