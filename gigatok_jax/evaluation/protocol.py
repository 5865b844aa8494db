"""Protocols: how a number was measured.

Every `metrics.json` has one under "protocol". Two numbers can be compared if their protocols agree
in all but `INCIDENTAL` fields.
"""

from collections.abc import Mapping
import importlib.metadata
import platform
from typing import Any

from flax.traverse_util import flatten_dict
import jax

from gigatok_jax.evaluation.features import Extractor

LIBRARIES = ("gigatok_jax", "jax", "flax", "numpy", "pillow")

# They do not change a number, or belong to the model. Where images lie is one: a digest says more.
# Times depend on the machine, which a report names beside them.
INCIDENTAL = (
    "versions",
    "device",
    "seed",
    "sampling.guidance",
    "data",
    "reference.name",
    "lpips",
    "time",
)


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
        if not any(f".{field}." in f".{name}." for field in INCIDENTAL)
    }


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What keeps two results of `comparable` apart, one text per field; empty if nothing does."""
    names = dict.fromkeys([*expected, *found])
    missing = "not recorded"
    differing = {
        name: f"{name} {found.get(name, missing)}, not {expected.get(name, missing)}"
        for name in names
        if found.get(name, missing) != expected.get(name, missing)
    }
    for name in list(differing):  # other images have other pixels, which need not be said
        prefix, dot, last = name.rpartition(".")
        if last in ("images", "members"):
            differing.pop(f"{prefix}{dot}pixels", None)
    return list(differing.values())
