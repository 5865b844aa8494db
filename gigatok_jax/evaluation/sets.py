"""A set of images as its features tell of it, and the sets that others are compared with."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np
from tqdm import tqdm

from gigatok_jax.data import pipeline
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import distribution
from gigatok_jax.evaluation.distribution import Gaussian, InceptionScore, Moments
from gigatok_jax.evaluation.features import Extractor
from gigatok_jax.files import cache_dir

MEMBERS = 10_000  # of a reference, whose features precision and recall need
GAUSSIANS = ("pool", "spatial")


class FeatureSet:
    """Collects what the metrics need of images, in memory that their number does not change.

    Args:
      extractor: of the features.
      members: whether the pool features of all images are kept, for precision and recall.
    """

    def __init__(self, extractor: Extractor, *, members: bool = False):
        self._extractor = extractor
        self._moments: dict[str, Moments] = {}
        self._inception_score: InceptionScore | None = None
        self._members: list[np.ndarray] | None = [] if members else None

    def add(self, images: np.ndarray) -> None:
        """Takes in uint8 images `[B, H, W, 3]`."""
        self.add_features(self._extractor(images))

    def add_features(self, features: dict[str, np.ndarray]) -> None:
        """Takes in what the extractor gives."""
        for name in GAUSSIANS:
            if name in features:
                width = features[name].shape[1]
                self._moments.setdefault(name, Moments.empty(width)).add(features[name])
        if "log_probabilities" in features:
            self._inception_score = self._inception_score or InceptionScore()
            self._inception_score.add(features["log_probabilities"])
        if self._members is not None:
            self._members.append(features["pool"])

    def gaussians(self) -> dict[str, Gaussian]:
        """Of "pool" and, where the extractor has it, "spatial"."""
        if not self._moments:
            raise UserError("a covariance needs at least 2 images, got 0")
        return {name: moments.gaussian() for name, moments in self._moments.items()}

    def inception_score(self) -> float | None:
        """None where the extractor predicts no classes."""
        return None if self._inception_score is None else self._inception_score.result()

    def members(self) -> np.ndarray:
        """Pool features `[n, D]` of all images."""
        return np.concatenate(self._members)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images, as the metrics of generation need them.

    Attributes:
      gaussians: of "pool" and perhaps "spatial".
      members: pool features `[n, D]`, or None where only statistics are known.
      name: what it was made of.
    """

    gaussians: dict[str, Gaussian]
    members: np.ndarray | None
    name: str


def load_reference(
    npz: str,
    data: DataConfig | None,
    extractor: Extractor,
    *,
    image_size: int,
    batch_size: int,
    train: bool = False,
) -> Reference:
    """What `reference_of_npz` reads; where `npz` is "", what `reference_of_data` does."""
    if npz:
        return reference_of_npz(pathlib.Path(npz), extractor, batch_size)
    return reference_of_data(
        data, extractor, image_size=image_size, batch_size=batch_size, train=train
    )


def reference_of_npz(path: pathlib.Path, extractor: Extractor, batch_size: int) -> Reference:
    """The reference in an `.npz` of ADM's: `arr_0`, images; `mu`, `sigma`, `mu_s`, `sigma_s`.

    Statistics in the file are taken as they are, so they must be of the same features; of images,
    all that is missing is computed.

    Raises:
      UserError: the file cannot be used.
    """
    gaussians = distribution.read_statistics(path)
    with distribution.open_npz(path) as file:
        images = dict(file).get("arr_0")
    if images is None:
        return Reference(gaussians, None, path.name)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise UserError(
            f"{path}: expected arr_0 to be uint8 [n, H, W, 3], got {images.dtype} "
            f"{list(images.shape)}"
        )
    found = FeatureSet(extractor, members=True)
    for start in tqdm(range(0, len(images), batch_size), desc=path.name, disable=None):
        found.add(images[start : start + batch_size])
    return Reference(found.gaussians() | gaussians, found.members(), path.name)


def reference_of_data(
    data: DataConfig, extractor: Extractor, *, image_size: int, batch_size: int, train: bool
) -> Reference:
    """The evaluation (or training) images of a data set, centre crops.

    What was once computed of them is kept in the cache.

    Raises:
      UserError: the data cannot be read.
    """
    batches = pipeline.eval_batches(data, image_size=image_size, batch_size=batch_size, train=train)
    seen = [batches.examples, batches.class_names]  # the data may have changed in their place
    identity = [data.content(), seen, image_size, train, extractor.fingerprint]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    name = f"{data.source}_{'train' if train else 'eval'}_{digest}"
    path = cache_dir() / "references" / f"{name}.npz"
    if not path.exists():
        stride = max(1, batches.examples // MEMBERS)  # over all classes
        found, members = FeatureSet(extractor), []
        steps = -(-batches.examples // batch_size)
        with batches:
            for batch in tqdm(batches, total=steps, desc="reference", disable=None):
                keep = batch["valid"]
                if keep.any():
                    features = extractor(batch["image"][keep])
                    found.add_features(features)
                    members.append(features["pool"][batch["index"][keep] % stride == 0])
        arrays = {"members": np.concatenate(members)}
        distribution.write_statistics(path, found.gaussians(), arrays)
    with np.load(path) as file:
        members = file["members"]
    return Reference(distribution.read_statistics(path), members, name)


def compare(samples: FeatureSet, reference: Reference, distance: str) -> dict[str, float]:
    """All metrics of generation that features and reference allow.

    Args:
      samples: the generated images, with their members.
      reference: real ones.
      distance: `Extractor.distance`.

    Returns:
      "gfid" or its like, "sfid", "inception_score", "precision", "recall".

    Raises:
      UserError: the reference's statistics are of other features.
    """
    gaussians = samples.gaussians()
    try:
        distances = {
            name: distribution.frechet_distance(gaussians[name], reference.gaussians[name])
            for name in GAUSSIANS
            if name in gaussians and name in reference.gaussians
        }
    except ValueError as error:
        raise UserError(f"{reference.name}: {error}") from error
    result = {f"g{distance}": distances["pool"]}
    if "spatial" in distances:
        result[f"s{distance}"] = distances["spatial"]
    score = samples.inception_score()
    if score is not None:
        result["inception_score"] = score
    if reference.members is not None:
        precision, recall = distribution.precision_recall(reference.members, samples.members())
        result |= {"precision": precision, "recall": recall}
    return result
