"""Metrics of images from anywhere, compared with real ones."""

from collections.abc import Iterable
import os
from typing import Any

import numpy as np

from gigatok_jax import files, pictures
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import fid, protocol
from gigatok_jax.evaluation.features import Extractor, load

PUBLISHED = 50_000  # images, as in published numbers


def evaluate(
    samples: files.Path, reference: str, extractor: Extractor, *, batch_size: int
) -> dict[str, Any]:
    """Compares stored images with stored real images or their statistics.

    Args:
      samples: an `.npz` file with images as `arr_0`, uint8 `[n, H, W, 3]`, or a folder of images.
      reference: the same, or an `.npz` file with statistics, see `fid.load_reference`.
      extractor: the network whose features are compared.
      batch_size: images per batch; does not affect the metrics.

    Returns:
      "images", the metrics of `fid.compare`, "protocol" (see `protocol.stamp`), and "remark" if
      there are fewer images than a metric needs.

    Raises:
      UserError: images are missing, cannot be read or differ in size, or the reference has the
        features of another network.
    """
    return _compare(fid.read_images(samples, batch_size), reference, extractor, batch_size)


def compare(
    images: Any, reference: str | files.Path, features: str = "inception", batch_size: int = 64
) -> dict[str, Any]:
    """Compares images with real ones: FID, sFID, Inception Score, precision and recall.

    Args:
      images: uint8 `[n, H, W, 3]`, or the path of a folder or `.npz` file of such images.
      reference: folder of images, or `.npz` file in ADM's layout: images, statistics or both.
      features: "inception", FID's network, or the name of a teacher.
      batch_size: images per batch; does not affect the metrics.

    Returns:
      The metrics by name, "images" (their number), "protocol" (how they were measured), and
      "remark" if there are fewer images than a metric needs. The features of a teacher give its
      distance ("fd_dinov2" or "fd_teacher") in place of "fid".

    Raises:
      UserError: images are missing, cannot be read or differ in size, the reference has the
        features of another network, or the network's weights cannot be had.
    """
    if not isinstance(reference, str | os.PathLike):
        found = type(reference).__name__
        raise UserError(f"reference: expected the path of a folder or an .npz file, got {found}")
    extractor = load(features)
    if isinstance(images, str | os.PathLike):
        samples = files.as_path(images, "images")
        return evaluate(samples, str(reference), extractor, batch_size=batch_size)
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        found = f"{images.dtype} {list(images.shape)}"
        raise UserError(f"images: expected uint8 [n, H, W, 3], got {found}")
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    return _compare(batches, str(reference), extractor, batch_size)


def _compare(
    batches: Iterable[np.ndarray], reference: str, extractor: Extractor, batch_size: int
) -> dict[str, Any]:
    if not reference:
        raise UserError("reference: missing, expected a folder of images or an .npz file")
    real = files.as_path(reference, "reference")
    if not real.exists():  # before all samples pass the network
        raise UserError(f"{real}: no such file or folder, expected real images")
    found, count, size = fid.FeatureSet(extractor, members=True), 0, 0
    digest = pictures.PixelDigest()
    for images in batches:
        found.add(images)
        digest.add(images)
        count, size = count + len(images), images.shape[1]
    if count < 2:
        raise UserError(f"samples: expected at least 2 images, got {count}")
    real = fid.read_reference(
        reference, None, extractor, count=count, image_size=size, batch_size=batch_size
    )
    result = {"images": count} | fid.compare(found, real, extractor.distance)
    sets = {"images": count}
    if real.members is not None:
        result["reference_images"] = sets["reference images"] = len(real.members)
    rank = extractor.widths["pool"]
    remarks = [
        f"{number:,} {name}: a covariance of full rank needs more than {rank:,}"
        for name, number in sets.items()
        if number <= rank
    ]
    if count < PUBLISHED:
        remarks.append(f"{count:,} images: published numbers have {PUBLISHED:,}")
    result["protocol"] = protocol.stamp(
        "samples",
        reference=real.described,
        images=count,
        image_size=size,
        pixels=digest.text(),
        crop="none",
        features=protocol.features(extractor),
    )
    return result | ({"remark": "; ".join(remarks)} if remarks else {})
