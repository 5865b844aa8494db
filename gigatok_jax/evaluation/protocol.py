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

# Fields that may differ between numbers that can be compared. A name may differ where a digest of
# the pixels does not. Guidance is the model's own; times depend on the machine, which a report
# names beside them.
INCIDENTAL = (
    "versions",
    "device",
    "seed",
    "sampling.guidance",
    "data",
    "reference.name",
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
    differing = {}
    for name in dict.fromkeys([*expected, *found]):
        if name not in expected:
            differing[name] = f"{name} {found[name]}, where the other has none"
        elif name not in found:
            differing[name] = f"no {name}, where the other has {expected[name]}"
        elif name.endswith("lpips") and None in (expected[name], found[name]):
            continue  # without its weights, LPIPS is not measured
        elif found[name] != expected[name]:
            differing[name] = f"{name} {found[name]}, not {expected[name]}"
    for name in list(differing):  # other images have other pixels, which need not be said
        prefix, dot, last = name.rpartition(".")
        if last in ("images", "members"):
            differing.pop(f"{prefix}{dot}pixels", None)
    return list(differing.values())
