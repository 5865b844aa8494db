"""Frozen networks by name: semantic teachers, DINO, LPIPS, and the Inception network of FID.

The package includes the embedded teacher. The others are downloaded when they are first needed.
"""

from typing import Any

import numpy as np

from gigatok_jax import bundles, locate
from gigatok_jax.models import vit
from gigatok_jax.weights import fetch

KINDS = tuple(vit.FAMILIES)  # of teachers
DINO = "dino_vits16"  # under the "dino" discriminator
TEACHER = "config.objective.teacher"  # the field that names a teacher in training


def load_teacher(
    name: str, field: str = TEACHER, *others: str
) -> tuple[vit.ViTConfig, dict[str, Any]]:
    """Loads a semantic teacher.

    Args:
      name: any name that `locate.find` takes, such as "dinov2_vitb14", or "embedded", the small ViT
        that `tools/train_embedded_teacher.py` trains on the drawings.
      field: the flag or field that holds the name, for messages.
      others: names that the field takes besides those of teachers, for messages.

    Returns:
      The architecture, and the float32 parameters of `vit.ViT`.

    Raises:
      UserError: the name is unknown, the files cannot be downloaded, or they hold no teacher.
    """
    directory = locate.find(name, KINDS, where=field, others=others)
    bundle = bundles.load(directory, KINDS, vit.ViTConfig)
    return bundle.config, bundle.weights["params"]


def architecture(name: str) -> vit.ViTConfig:
    """A teacher's architecture; its weights need not be downloaded."""
    return bundles.load_config(name, KINDS, vit.ViTConfig, where=TEACHER)


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
    return fetch.is_there("lpips_vgg16")


def load_lpips() -> dict[str, Any]:
    """Loads the parameters of `models.lpips.LPIPS`."""
    return _load("lpips_vgg16", "lpips")


def load_inception() -> dict[str, Any]:
    """Loads the parameters of `models.inception.Inception`."""
    return _load("inception_fid", "inception")


def _load(name: str, kind: str) -> dict[str, Any]:
    return bundles.load(name, kind).weights["params"]
