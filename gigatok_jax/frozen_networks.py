"""The frozen networks by name: semantic teachers, DINO, LPIPS and FID's Inception.

The embedded teacher comes with the program; `gigatok weights fetch` brings the others.
"""

from pathlib import Path
from typing import Any

import numpy as np

from gigatok_jax import bundles
from gigatok_jax.errors import UserError
from gigatok_jax.models import vit
from gigatok_jax.weights import fetch

EMBEDDED = Path(__file__).parent / "assets" / "teacher"


def load_teacher(name: str) -> tuple[vit.ViTConfig, dict[str, Any]]:
    """Loads a teacher.

    Args:
      name: "embedded", the small ViT that `tools/train_embedded_teacher.py` trains on the
        drawings; a published one of `models.vit.PUBLISHED`; or a bundle of either.

    Returns:
      The architecture, and the float32 parameters of `vit.ViT`.

    Raises:
      UserError: the name is unknown, or the files are missing or not a teacher's.
    """
    bundle = bundles.load(_teacher(name), tuple(vit.FAMILIES), vit.ViTConfig)
    return bundle.config, bundle.weights["params"]


def architecture(name: str) -> vit.ViTConfig:
    """A teacher's architecture; a published teacher's files need not be there."""
    if name in vit.PUBLISHED:
        return vit.PUBLISHED[name]
    return bundles.load_config(_teacher(name), tuple(vit.FAMILIES), vit.ViTConfig)


def _teacher(name: str) -> Path:
    """The directory of a teacher's bundle."""
    if name in vit.PUBLISHED:
        return fetch.fetched(name)
    directory = EMBEDDED if name == "embedded" else Path(name)
    if not (directory / "config.json").exists():
        known = ", ".join(["embedded", *vit.PUBLISHED])
        raise UserError(f"teacher is {name!r}, expected one of {known}, or a teacher's directory")
    return directory


def load_dino() -> dict[str, Any]:
    """Loads the parameters of `vit.DINO["dino_vits16"]`.

    The keys' biases are zeroed, as in the reference: attention does not depend on them, and half
    precision has more left for what it does depend on.
    """
    params = _load("dino_vits16", "dino")
    key = params["layers"]["block"]["self_attention"]["key"]
    key["bias"] = np.zeros_like(key["bias"])
    return params


def has_lpips() -> bool:
    """Whether `load_lpips` has something to load."""
    return fetch.bundle_path("lpips_vgg16").exists()


def load_lpips() -> dict[str, Any]:
    """Loads the parameters of `models.lpips.LPIPS`."""
    return _load("lpips_vgg16", "lpips")


def load_inception() -> dict[str, Any]:
    """Loads the parameters of `models.inception.Inception`."""
    return _load("inception_fid", "inception")


def _load(name: str, kind: str) -> dict[str, Any]:
    return bundles.load(fetch.fetched(name), kind).weights["params"]
