"""Distances between sets of images: FID and its relatives, as ADM's evaluator defines them.

How FID is computed, in the order of this file:

1. A frozen network (`features.Extractor`) maps each image to feature vectors. Inception gives
   "pool" for FID, "spatial" for sFID and "log_probabilities" for the Inception Score; a ViT gives
   "pool" only.
2. `Moments` sums the vectors and their outer products batch by batch. The sums yield a `Gaussian`:
   the mean and the unbiased covariance of the set.
3. `frechet_distance` compares two Gaussians.
4. `FeatureSet` collects the features of generated images, and `load_reference` those of real
   images, from a data set, a folder, or one of ADM's `.npz` files.
5. `compare` computes all metrics.

Sums are accumulated on the host in float64 and need the memory of one covariance matrix. Results
do not depend on batch size or order, up to rounding.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
from typing import Any
import zipfile
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gigatok_jax import distributed, pictures
from gigatok_jax.data import crops, pipeline
from gigatok_jax.data.folders import image_paths
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.evaluation.features import Extractor
from gigatok_jax.files import Path, as_path, cache_dir, local_copy, write_npz

logger = logging.getLogger(__name__)

NEIGHBORS = 3  # k of precision and recall
ROWS = 1_000  # rows of a distance matrix in memory at once
MEMBERS = 10_000  # real images that precision and recall use, as in ADM
CACHE_VERSION = 1  # bump to invalidate cached references
SUFFIXES = {"pool": "", "spatial": "_s"}  # of mu and sigma in ADM's files
ROUNDING = 1e-4  # error of float32 statistics, relative to the largest entry of the covariance


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean `[D]` and covariance `[D, D]`, float64."""

    mean: np.ndarray
    covariance: np.ndarray


class Moments:
    """Running sums over feature vectors of `width` entries."""

    def __init__(self, width: int):
        self.count = 0
        self.total = np.zeros(width)
        self.outer = np.zeros((width, width))  # sum of outer products

    def add(self, features: np.ndarray) -> None:
        """Adds vectors `[n, D]`.

        Raises:
          UserError: a feature is not finite.
        """
        finite = np.isfinite(features).all(axis=1)
        if not finite.all():
            number = self.count + finite.argmin()
            raise UserError(f"image {number}: expected finite features, got NaN or inf")
        features = np.asarray(features, np.float64)
        self.count += len(features)
        self.total += features.sum(axis=0)
        self.outer += features.T @ features

    def gather(self) -> None:
        """Adds the sums of all other processes."""
        sums = distributed.sums({"count": self.count, "total": self.total, "outer": self.outer})
        self.count, self.total, self.outer = sums["count"], sums["total"], sums["outer"]

    def gaussian(self, origin: str = "images") -> Gaussian:
        """Mean and unbiased covariance.

        Raises:
          UserError: fewer than two vectors were added; the message names their origin.
        """
        if self.count < 2:
            raise UserError(
                f"{origin}: expected at least 2 images that can be read, for a covariance, "
                f"got {self.count}"
            )
        mean = self.total / self.count
        covariance = (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance)


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with Inception's pool features the FID.

    With roots Si = Ai Ai', the trace of (S1 S2)^(1/2) is the sum of the singular values of A1' A2.
    Unlike a matrix square root, they are real and stable at any rank.
    """
    difference = first.mean - second.mean
    cross = np.linalg.svd(_root(first.covariance).T @ _root(second.covariance), compute_uv=False)
    spread = np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross.sum()
    return float(max(difference @ difference + spread, 0.0))


def _root(covariance: np.ndarray) -> np.ndarray:
    """`[D, r]` A with A A' = covariance, r its rank."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(log_probabilities: np.ndarray, split: int = 5_000) -> float:
    """Exponential of the mean KL divergence of predictions from their mean, averaged over splits.

    Args:
      log_probabilities: `[n, K]`, the log softmax of each image.
      split: consecutive images per split; the last split may be smaller.
    """
    scores = []
    for start in range(0, len(log_probabilities), split):
        part = log_probabilities[start : start + split].astype(np.float64)
        probabilities = np.exp(part)
        marginal = np.log(np.maximum(probabilities.mean(axis=0), np.finfo(np.float64).tiny))
        divergence = np.sum(probabilities * (part - marginal), axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, neighbors: int = NEIGHBORS
) -> tuple[float, float]:
    """Share of each set inside the manifold of the other (Kynkaanniemi et al. 2019).

    The manifold of a set is the union of balls around its members. Each ball reaches to the
    member's `neighbors`-th nearest other member.

    Args:
      reference: features `[n, D]` of more than k real images.
      samples: features `[m, D]` of more than k generated images.
      neighbors: k.

    Returns:
      Precision and recall, in [0, 1].
    """
    reference, samples = jnp.asarray(reference), jnp.asarray(samples)
    return _coverage(samples, reference, neighbors), _coverage(reference, samples, neighbors)


def _coverage(points: jax.Array, members: jax.Array, neighbors: int) -> float:
    """Share of `points` inside the manifold of `members`."""

    def distances(features):
        """Squared distances of blocks of `features` to all members, `[b, n]`."""
        for start in range(0, len(features), ROWS):
            yield _squared_distances(features[start : start + ROWS], members)

    # One more neighbor, because the nearest member is the vector itself.
    nearest = [jax.lax.top_k(-block, neighbors + 1)[0] for block in distances(members)]
    radii = -jnp.concatenate(nearest)[:, -1]
    inside = [jnp.any(block <= radii, axis=1) for block in distances(points)]
    return float(np.concatenate(inside).mean())


@jax.jit
def _squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    product = jnp.matmul(x, y.T, precision="highest")
    norms = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)
    return jnp.maximum(norms - 2 * product, 0)


class FeatureSet:
    """Collects the features of a set of images that the metrics need.

    Args:
      extractor: maps images to features.
      members: keep the pool features of every image, for precision and recall.
      predictions: keep the log probabilities of every image, for the Inception Score.
    """

    def __init__(self, extractor: Extractor, *, members: bool = False, predictions: bool = True):
        self._extractor = extractor
        self._moments = {
            name: Moments(extractor.widths[name]) for name in SUFFIXES if name in extractor.widths
        }
        self._rows: dict[str, list[np.ndarray]] = {}
        if members:
            self._rows["pool"] = []
        if predictions and "log_probabilities" in extractor.widths:
            self._rows["log_probabilities"] = []

    def add(self, images: np.ndarray) -> None:
        """Adds uint8 images `[B, H, W, 3]`."""
        self.add_features(self._extractor(images))

    def add_features(self, features: dict[str, np.ndarray]) -> None:
        """Adds the extractor's output for a batch."""
        for name, moments in self._moments.items():
            moments.add(features[name])
        for name, rows in self._rows.items():
            rows.append(features[name])

    def gaussians(self, origin: str = "images") -> dict[str, Gaussian]:
        """Gaussians of "pool" and, if the extractor has it, "spatial"; see `Moments.gaussian`."""
        return {name: moments.gaussian(origin) for name, moments in self._moments.items()}

    def inception_score(self) -> float | None:
        """The Inception Score, or None without class predictions."""
        rows = self._rows.get("log_probabilities")
        return inception_score(np.concatenate(rows)) if rows else None

    def members(self) -> np.ndarray:
        """Pool features `[n, D]` of all images."""
        return np.concatenate(self._rows["pool"])


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images, as the metrics of generation need them."""

    gaussians: dict[str, Gaussian]  # of "pool" and perhaps "spatial"
    members: np.ndarray | None  # pool features [n, D]; None if only statistics are known
    name: str  # identifies the content
    data: Mapping[str, str] | None = None  # if it is a data set: name, split, crop and pixels

    @property
    def described(self) -> dict[str, Any]:
        """For `protocol.stamp`; the same wherever the files lie, but for the name."""
        images = None if self.members is None else len(self.members)
        name, _, digest = self.name.rpartition(" ")
        return {"members": images} | dict(self.data or {"name": name, "digest": digest})


def load_reference(*what: Any, **options: Any) -> Reference | None:
    """`read_reference` in process 0, which computes the metrics; None in all others."""
    return distributed.in_main(lambda: read_reference(*what, **options))


def read_reference(
    stored: str,
    data: DataConfig | None,
    extractor: Extractor,
    *,
    count: int,
    image_size: int,
    batch_size: int,
    train: bool = False,
) -> Reference:
    """Loads the real images that samples are compared with, or their statistics.

    Args:
      stored: a file in ADM's layout (statistics, images or both), a folder of images, or "" to use
        `data`.
      data: the data set whose evaluation images are the reference, as center crops. Results are
        cached.
      extractor: the network whose features are compared.
      count: number of samples that will be compared.
      image_size: side of the samples in pixels.
      batch_size: images per batch.
      train: use the training images of `data` instead.

    Raises:
      UserError: the reference cannot be read or has other features, or too few images are given or
        requested.
    """
    if stored:
        reference = _stored_reference(as_path(stored), extractor, image_size, batch_size)
    else:
        reference = _data_reference(data, extractor, image_size, batch_size, train)
    for name, gaussian in reference.gaussians.items():
        width = extractor.widths.get(name, gaussian.mean.size)
        if width != gaussian.mean.size:
            raise UserError(
                f"{reference.name}: expected statistics of the {width} features of "
                f"{extractor.distance}, got {gaussian.mean.size}"
            )
    sizes, least = {"samples": count}, 2
    if reference.members is not None:
        name = f"the reference {reference.name.split()[0]}"
        sizes[name], least = len(reference.members), NEIGHBORS + 1
    for name, size in sizes.items():
        if size < least:
            raise UserError(f"{name}: expected at least {least} images, got {size}")
    return reference


def describe(path: Path) -> str:
    """The name and digest of an `.npz` file or a folder of images, which identify its content."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in image_paths(path):
            digest.update(file.read_bytes())
    else:
        with _readable(path), path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256")
    return f"{path.name} {digest.hexdigest()[:16]}"


def _stored_reference(
    path: Path, extractor: Extractor, image_size: int, batch_size: int
) -> Reference:
    name, statistics = describe(path), {}
    if not path.is_dir():
        path = local_copy(path)
        with _readable(path):
            arrays = zipfile.ZipFile(path).namelist()
        statistics = _read_statistics(path)
        if "arr_0.npy" not in arrays:
            if "pool" in statistics:
                return Reference(statistics, None, name)
            raise UserError(
                f"{path}: expected images as arr_0, or statistics as mu and sigma, found "
                f"{', '.join(arrays) or 'nothing'}"
            )
    found = FeatureSet(extractor, members=True, predictions=False)
    for images in read_images(path, batch_size):
        found.add(images)
    height, width = images.shape[1:3]
    if (height, width) != (image_size, image_size):
        sizes = (height, width, image_size)
        logger.warning("%s: images of %dx%d pixels, but samples of %d", path, *sizes)
    gaussians = found.gaussians(str(path))
    for feature, gaussian in statistics.items():
        # The file's statistics may cover more images, unless they are those of another network.
        if feature in gaussians and gaussian.mean.shape == gaussians[feature].mean.shape:
            gaussians[feature] = gaussian
    return Reference(gaussians, found.members(), name)


def _data_reference(
    data: DataConfig, extractor: Extractor, image_size: int, batch_size: int, train: bool
) -> Reference:
    batches = pipeline.eval_images(data, image_size, batch_size, train=train)
    check_count(batches.examples, "length" if train else "eval_length")
    identity = [CACHE_VERSION, batches.version(), image_size, extractor.fingerprint]
    if data.eval_resize != "adm":  # caches older than this field have none
        identity.append(data.eval_resize)
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    name = f"{data.source}_{'train' if train else 'eval'}_{digest}"
    path = cache_dir() / "references" / f"{name}.npz"
    described = {
        "name": data.described,
        "split": "training" if train else "evaluation",
        "crop": data.eval_resize,
    }
    if path.exists():
        cached = local_copy(path)
        with _readable(path), np.load(cached) as file:
            members, pixels = file["members"], file.get("pixels")
        if pixels is not None:  # caches of older programs have none
            described["pixels"] = str(pixels)
            return Reference(_read_statistics(cached), members, name, described)
    # Chosen at random, because data sets are often sorted by class.
    chosen = np.random.default_rng(0).permutation(batches.examples)[:MEMBERS]
    found, members = FeatureSet(extractor, predictions=False), []
    digest = pictures.PixelDigest()
    steps = math.ceil(batches.examples / batch_size)
    with batches:
        for batch in tqdm(batches, total=steps, desc=name, unit="batch", disable=None):
            valid = batch["valid"]
            if valid.any():
                features = extractor(batch["image"][valid])
                digest.add(batch["image"][valid])
                found.add_features(features)
                members.append(features["pool"][np.isin(batch["index"][valid], chosen)])
    gaussians = found.gaussians(data.path or data.source)
    members = np.concatenate(members)
    described["pixels"] = digest.text()
    arrays = {"members": members, "pixels": np.array(described["pixels"])}
    for feature, gaussian in gaussians.items():
        arrays[f"mu{SUFFIXES[feature]}"] = gaussian.mean
        arrays[f"sigma{SUFFIXES[feature]}"] = gaussian.covariance
    try:
        write_npz(path, arrays)
    except OSError as error:
        logger.warning("%s: the reference is not kept for the next time (%s)", path, error)
    return Reference(gaussians, members, name, described)


def check_count(examples: int, field: str) -> None:
    """Rejects data of fewer than two images, which have no covariance."""
    if examples < 2:
        raise UserError(f"config.data.{field}: expected at least 2 images, got {examples}")


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Reports a damaged or wrong file in one line that names it."""
    try:
        yield
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a usable .npz file: {first_line(error)}") from error


def _read_statistics(path: Path) -> dict[str, Gaussian]:
    """The Gaussians in an `.npz` file: "pool", "spatial", both or none."""
    found = {}
    with _readable(path), np.load(path) as file:
        for name, suffix in SUFFIXES.items():
            if f"mu{suffix}" in file and f"sigma{suffix}" in file:
                found[name] = _checked(file[f"mu{suffix}"], file[f"sigma{suffix}"])
    return found


def _checked(mean: np.ndarray, covariance: np.ndarray) -> Gaussian:
    """The Gaussian; raises ValueError or TypeError if the arrays do not describe one."""
    mean = np.asarray(mean).astype(np.float64, casting="same_kind")
    covariance = np.asarray(covariance).astype(np.float64, casting="same_kind")
    if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        shapes = f"{list(mean.shape)} and {list(covariance.shape)}"
        raise ValueError(f"expected mu [D] and sigma [D, D], got {shapes}")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("mu or sigma is not finite")
    tolerance = ROUNDING * np.abs(covariance).max()
    symmetric = np.abs(covariance - covariance.T).max() <= tolerance
    if not symmetric or np.linalg.eigvalsh(covariance).min() < -tolerance:
        raise ValueError("expected sigma to be symmetric and without negative eigenvalues")
    return Gaussian(mean, covariance)


def read_images(path: Path, batch_size: int) -> Iterator[np.ndarray]:
    """Yields images of one size, uint8 `[b, H, W, 3]`, one batch in memory at a time.

    Args:
      path: an `.npz` file with the images as `arr_0`, or a folder, searched recursively, whose
        images are read in the order of their names.
      batch_size: b of all batches but the last.

    Raises:
      UserError: an image cannot be read or has another size than the first, or there are none.
    """
    if path.is_dir():
        yield from _read_folder(path, batch_size)
        return
    path = local_copy(path)
    with _readable(path):
        arrays = zipfile.ZipFile(path).namelist()
    if "arr_0.npy" not in arrays:
        found = ", ".join(arrays) or "nothing"
        raise UserError(f"{path}: expected images as arr_0, found {found}")
    with _readable(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("arr_0 has an unknown .npy format")
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
        right = dtype == np.uint8 and len(shape) == 4 and shape[-1] == 3 and 0 not in shape
        if right and columns_first:
            raise ValueError("expected arr_0 in C order, got Fortran order: np.ascontiguousarray")
        if not right:
            raise ValueError(f"expected arr_0 to be uint8 [n, H, W, 3], got {dtype} {list(shape)}")
        for start in tqdm(range(0, shape[0], batch_size), desc=path.name, disable=None):
            chosen = (min(batch_size, shape[0] - start), *shape[1:])
            yield np.frombuffer(file.read(math.prod(chosen)), np.uint8).reshape(chosen)


def _read_folder(folder: Path, batch_size: int) -> Iterator[np.ndarray]:
    paths, first = image_paths(folder), None
    for start in tqdm(range(0, len(paths), batch_size), desc=folder.name, disable=None):
        batch = []
        for path in paths[start : start + batch_size]:
            try:
                image = np.asarray(crops.load(path))
            except crops.BadImage as error:
                raise UserError(f"{path}: {error}") from error
            first = image.shape if first is None else first
            if image.shape != first:
                sizes = ["x".join(map(str, shape[:2])) for shape in (first, image.shape)]
                raise UserError(
                    f"{path}: expected {sizes[0]} pixels, as in {paths[0].name}, got {sizes[1]}"
                )
            batch.append(image)
        yield np.stack(batch)


def compare(samples: FeatureSet, reference: Reference, distance: str) -> dict[str, float]:
    """All metrics of generation that the features and the reference allow.

    Args:
      samples: the generated images, with their members if the reference has any.
      reference: the real images, from `load_reference`.
      distance: `Extractor.distance`.

    Returns:
      "gfid" (or "gfd_dinov2", ...), "sfid", "inception_score", "precision", "recall".
    """
    result, gaussians = {}, samples.gaussians()
    for name, letter in (("pool", "g"), ("spatial", "s")):
        if name in gaussians and name in reference.gaussians:
            value = frechet_distance(gaussians[name], reference.gaussians[name])
            result[f"{letter}{distance}"] = value
    score = samples.inception_score()
    if score is not None:
        result["inception_score"] = score
    if reference.members is not None:
        precision, recall = precision_recall(reference.members, samples.members())
        result |= {"precision": precision, "recall": recall}
    return result
