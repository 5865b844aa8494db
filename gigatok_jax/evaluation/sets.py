"""A set of images as its features tell of it, and the sets that others are compared with."""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import logging
import pathlib

import numpy as np
from tqdm import tqdm

from gigatok_jax import distributed
from gigatok_jax.data import pipeline
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import archives, distribution
from gigatok_jax.evaluation.archives import Archive
from gigatok_jax.evaluation.distribution import Gaussian, InceptionScore, Moments
from gigatok_jax.evaluation.features import Extractor
from gigatok_jax.files import cache_dir

logger = logging.getLogger(__name__)

MEMBERS = 10_000  # of a reference, whose features precision and recall need
GAUSSIANS = ("pool", "spatial")
FORMAT = 1  # of what is computed of a reference; the cache's older ones are not taken for it


class FeatureSet:
    """Collects what the metrics need of images.

    Its memory does not grow with their number, unless `members` are kept: D float32 an image.

    Args:
      extractor: of the features.
      names: of the features whose Gaussians are wanted, as far as the extractor has them.
      members: whether the pool features of all images are kept, for precision and recall.
    """

    def __init__(
        self, extractor: Extractor, *, names: Sequence[str] = GAUSSIANS, members: bool = False
    ):
        self._extractor = extractor
        self._moments = {
            name: Moments.empty(extractor.widths[name])
            for name in names
            if name in extractor.widths
        }
        self._inception_score: InceptionScore | None = None
        self._members: list[np.ndarray] | None = [] if members else None

    def add(self, images: np.ndarray) -> None:
        """Takes in uint8 images `[B, H, W, 3]`."""
        self.add_features(self._extractor(images))

    def add_features(self, features: dict[str, np.ndarray]) -> None:
        """Takes in what the extractor gives."""
        for name, moments in self._moments.items():
            moments.add(features[name])
        if "log_probabilities" in features:
            self._inception_score = self._inception_score or InceptionScore()
            self._inception_score.add(features["log_probabilities"])
        if self._members is not None:
            self._members.append(features["pool"])

    def gaussians(self) -> dict[str, Gaussian]:
        """Of "pool" and, where the extractor has it, "spatial"."""
        return {name: moments.gaussian() for name, moments in self._moments.items()}

    def gather(self) -> None:
        """Takes in what the other processes have, members and Inception Score apart."""
        for name, moments in self._moments.items():
            self._moments[name] = Moments(**distributed.sums(dataclasses.asdict(moments)))

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
      name: tells it from any other.
    """

    gaussians: dict[str, Gaussian]
    members: np.ndarray | None
    name: str

    def check(self, extractor: Extractor, count: int) -> None:
        """Refuses what `compare` could not compare with, before it is drawn.

        Args:
          extractor: of the samples' features.
          count: number of samples.

        Raises:
          UserError: other features, or too few images on either side.
        """
        for name, gaussian in self.gaussians.items():
            width = extractor.widths.get(name, gaussian.mean.size)
            if width != gaussian.mean.size:
                raise UserError(
                    f"{self.name}: statistics of {gaussian.mean.size} features, but "
                    f"{extractor.distance} is over {width}"
                )
        if "pool" not in self.gaussians:
            raise UserError(f"{self.name}: expected statistics of the pool features, mu and sigma")
        sizes = {"samples": count}
        if self.members is not None:
            sizes[self.name] = len(self.members)
        least = 2 if self.members is None else distribution.NEIGHBOURS + 1
        for name, size in sizes.items():
            if size < least:
                raise UserError(f"{name}: expected at least {least} images, got {size}")


def load_reference(
    npz: str,
    data: DataConfig | None,
    extractor: Extractor,
    *,
    count: int,
    image_size: int,
    batch_size: int,
    train: bool = False,
) -> Reference | None:
    """What `reference_of_npz` reads; where `npz` is "", what `reference_of_data` does.

    Only process 0 compares: the others wait, and get None.

    Raises:
      UserError: what these raise, or `Reference.check` for `count` samples.
    """

    def load():
        if npz:
            found = reference_of_npz(pathlib.Path(npz), extractor, batch_size, image_size)
        else:
            found = reference_of_data(
                data, extractor, image_size=image_size, batch_size=batch_size, train=train
            )
        found.check(extractor, count)
        return found

    return distributed.in_main(load)


def reference_of_npz(
    path: pathlib.Path, extractor: Extractor, batch_size: int, image_size: int
) -> Reference:
    """The reference in an `.npz` of ADM's: `arr_0`, images; `mu`, `sigma`, `mu_s`, `sigma_s`.

    Statistics in the file go before those of its images, where they are of as many features.
    Images of another size than `image_size`, that of the samples, are resized like these, with a
    warning.

    Raises:
      UserError: the file cannot be used.
    """
    archive = Archive(path)
    stored = archive.gaussians()
    if not archive.images:
        return Reference(stored, None, archive.name)
    if archive.image_shape[1:3] != (image_size, image_size):
        height, width = archive.image_shape[1:3]
        logger.warning("%s: images of %dx%d, samples of %d pixels", path, height, width, image_size)
    found = FeatureSet(extractor, members=True)
    steps = -(-archive.images // batch_size)
    for images in tqdm(archive.batches(batch_size), total=steps, desc=path.name, disable=None):
        found.add(images)
    gaussians = found.gaussians()
    for name, gaussian in stored.items():
        if name in gaussians and gaussian.mean.shape == gaussians[name].mean.shape:
            gaussians[name] = gaussian
    return Reference(gaussians, found.members(), archive.name)


def reference_of_data(
    data: DataConfig, extractor: Extractor, *, image_size: int, batch_size: int, train: bool
) -> Reference:
    """The evaluation (or training) images of a data set, centre crops.

    What was once computed of them is kept in the cache.

    Raises:
      UserError: the data cannot be read, or are codes.
    """
    batches = pipeline.eval_images(data, image_size=image_size, batch_size=batch_size, train=train)
    check_count(batches.examples, "length" if train else "eval_length")
    identity = [FORMAT, batches.version(), image_size, extractor.fingerprint]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    name = f"{data.source}_{'train' if train else 'eval'}_{digest}"
    path = cache_dir() / "references" / f"{name}.npz"
    if not path.exists():
        count = batches.examples
        # At random: in order, they might all be of the classes that are drawn in turn.
        kept = np.random.default_rng(0).permutation(count)[:MEMBERS]
        found, members = FeatureSet(extractor), []
        with batches:
            for batch in tqdm(batches, total=-(-count // batch_size), desc=name, disable=None):
                valid = batch["valid"]
                if valid.any():
                    features = extractor(batch["image"][valid])
                    found.add_features(features)
                    members.append(features["pool"][np.isin(batch["index"][valid], kept)])
        gaussians = found.gaussians()
        archives.write_statistics(path, gaussians, {"members": np.concatenate(members)})
    gaussians = Archive(path).gaussians()  # first, as it says of a damaged file which one it is
    with np.load(path) as file:
        return Reference(gaussians, file["members"], name)


def check_count(examples: int, field: str) -> None:
    """Refuses data of one image, which has no covariance."""
    if examples < 2:
        raise UserError(f"config.data.{field}: expected at least 2 images, there is {examples}")


def compare(samples: FeatureSet, reference: Reference, distance: str) -> dict[str, float]:
    """All metrics of generation that features and reference allow.

    Args:
      samples: the generated images, with their members.
      reference: real ones, which `Reference.check` has let pass.
      distance: `Extractor.distance`.

    Returns:
      "gfid" or its like, "sfid", "inception_score", "precision", "recall".
    """
    gaussians = samples.gaussians()
    distances = {
        name: distribution.frechet_distance(gaussians[name], reference.gaussians[name])
        for name in GAUSSIANS
        if name in gaussians and name in reference.gaussians
    }
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
