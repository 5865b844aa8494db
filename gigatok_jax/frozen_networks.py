"""Frozen networks by name: semantic teachers, DINO, LPIPS, and the Inception network of FID.

The package includes the embedded teacher; `gigatok weights fetch` downloads the others.
"""

from pathlib import Path
from typing import Any

import numpy as np

from gigatok_jax import bundles
from gigatok_jax.errors import UserError
from gigatok_jax.models import vit
from gigatok_jax.weights import fetch

EMBEDDED = Path(__file__).parent / "assets" / "teacher"
DINO = "dino_vits16"  # under the "dino" discriminator
TEACHER = "config.objective.teacher"  # the field that names a teacher in training


def load_teacher(
    name: str, field: str = TEACHER, *others: str
) -> tuple[vit.ViTConfig, dict[str, Any]]:
    """Loads a semantic teacher.

    Args:
      name: "embedded", the small ViT that `tools/train_embedded_teacher.py` trains on the
        drawings; a key of `models.vit.PUBLISHED`; or the directory of a teacher's bundle.
      field: the flag or field that holds the name, for messages.
      others: names that the field takes besides those of teachers, for messages.

    Returns:
      The architecture, and the float32 parameters of `vit.ViT`.

    Raises:
      UserError: the name is unknown, or the files are missing or hold no teacher.
    """
    bundle = bundles.load(_teacher(name, field, *others), tuple(vit.FAMILIES), vit.ViTConfig)
    return bundle.config, bundle.weights["params"]


def architecture(name: str) -> vit.ViTConfig:
    """A teacher's architecture; a published teacher need not be downloaded."""
    if name in vit.PUBLISHED:
        return vit.PUBLISHED[name]
    return bundles.load_config(_teacher(name), tuple(vit.FAMILIES), vit.ViTConfig)


def _teacher(name: str, field: str = TEACHER, *others: str) -> Path:
    if name in vit.PUBLISHED:
        return fetch.fetched(name)
    directory = EMBEDDED if name == "embedded" else Path(name)
    if not (directory / "config.json").exists():
        known = ", ".join([*others, "embedded", *vit.PUBLISHED])
        raise UserError(f"{field}: expected {known} or a teacher's bundle, got {name!r}")
    return directory


def load_dino() -> dict[str, Any]:
    """Loads the parameters of `vit.DINO[DINO]`.

    Key biases are zeroed, as in the reference. They shift all of a query's logits equally, so
    attention does not depend on them, and half precision loses less to rounding without them.
    """
    params = _load(DINO, "dino")
    key = params["layers"]["block"]["self_attention"]["key"]
    key["bias"] = np.zeros_like(key["bias"])
    return params


def has_lpips() -> bool:
    """Whether LPIPS has been downloaded."""
    return fetch.bundle_path("lpips_vgg16").exists()


def load_lpips() -> dict[str, Any]:
    """Loads the parameters of `models.lpips.LPIPS`."""
    return _load("lpips_vgg16", "lpips")


def load_inception() -> dict[str, Any]:
    """Loads the parameters of `models.inception.Inception`."""
    return _load("inception_fid", "inception")


def _load(name: str, kind: str) -> dict[str, Any]:
    return bundles.load(fetch.fetched(name), kind).weights["params"]
