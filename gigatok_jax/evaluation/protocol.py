"""Protocols: how a number was measured.

Every `metrics.json` has one under "protocol". Two numbers can be compared if their protocols agree
in all but `INCIDENTAL` fields.
"""

from collections.abc import Mapping
import hashlib
import importlib.metadata
import platform
from typing import Any

from flax.traverse_util import flatten_dict
import jax
import numpy as np

from gigatok_jax.evaluation.features import Extractor

LIBRARIES = ("gigatok_jax", "jax", "flax", "numpy", "pillow")

# They identify what was measured, or should not change a number. Times depend on the machine, which
# a report names beside them.
INCIDENTAL = ("versions", "device", "seed", "sampling.guidance", "time")

# How the images of a data set become squares, see `crops.center_crop`.
CENTER_CROP = "center, as in ADM: halved by boxes, then bicubic"


def stamp(measure: str, **how: Any) -> dict[str, Any]:
    """A protocol, to be stored beside the metrics as {"protocol": ...}.

    Args:
      measure: what was measured, such as "reconstruction".
      how: whatever the metrics depend on besides the model.
    """
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "measure": measure,
        **how,
        "versions": {"python": platform.python_version(), **versions},
        "device": jax.devices()[0].device_kind,
    }


def features(extractor: Extractor) -> dict[str, str]:
    """The distance between features, and the digest of the network's weights."""
    return {"distance": extractor.distance, "weights": extractor.fingerprint}


def comparable(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The fields on which numbers depend, by dotted name."""
    flat = flatten_dict(protocol, sep=".")
    return {
        name: value
        for name, value in flat.items()
        if not any(f".{name}.".find(f".{field}.") >= 0 for field in INCIDENTAL)
    }


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What keeps two results of `comparable` apart, one text per field; empty if nothing does."""
    names = dict.fromkeys([*expected, *found])
    missing = "not recorded"
    return [
        f"{name} {found.get(name, missing)}, not {expected.get(name, missing)}"
        for name in names
        if found.get(name, missing) != expected.get(name, missing)
    ]


class PixelDigest:
    """A digest of a set of images, in any order, split over any number of processes.

    Attributes:
      total: sum of the images' own digests, which wraps around; sums of several sets add up.
    """

    def __init__(self):
        self.total = np.uint64(0)

    def add(self, images: np.ndarray) -> None:
        """Adds uint8 images `[n, H, W, 3]`."""
        for image in images:
            digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest()
            with np.errstate(over="ignore"):
                self.total += np.frombuffer(digest, np.uint64)[0]


def hexadecimal(total: np.uint64) -> str:
    """Sixteen hex digits of a `PixelDigest`'s total."""
    return f"{int(total):016x}"
