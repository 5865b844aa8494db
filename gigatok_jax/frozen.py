"""The frozen networks: the teachers by name, what their files hold and how they are read.

A teacher's directory has `config.json` (the architecture, and what made the weights) and
`weights.safetensors` (the parameters of `models.vit.ViT` in float16, named by their path).
"""

from collections.abc import Mapping
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from flax import traverse_util
import numpy as np
from safetensors import SafetensorError
import safetensors.numpy

from gigatok_jax import bundles
from gigatok_jax.errors import UserError
from gigatok_jax.files import replacing, write_json
from gigatok_jax.models import vit
from gigatok_jax.weights import kinds

EMBEDDED = Path(__file__).parent / "assets" / "teacher"


class Teacher(NamedTuple):
    """A ViT's architecture and its float32 parameters, the `{"params": params}` of `vit.ViT`."""

    config: vit.ViTConfig
    params: dict[str, Any]


def save_teacher(
    directory: str | os.PathLike, teacher: Teacher, record: Mapping[str, Any] | None = None
) -> None:
    """Writes a teacher's directory, replacing one that is there only when it is complete.

    Args:
      directory: where.
      teacher: what to write; parameters are rounded to float16.
      record: what made the weights and how good they are, for `config.json`.
    """
    flat = traverse_util.flatten_dict(teacher.params, sep="/")
    weights = {name: np.asarray(value, np.float16) for name, value in flat.items()}
    with replacing(directory) as aside:
        aside.mkdir()
        safetensors.numpy.save_file(weights, aside / "weights.safetensors")
        config = {"architecture": dataclasses.asdict(teacher.config), **(record or {})}
        write_json(aside / "config.json", config)


def _read(directory: Path) -> Teacher:
    try:
        config = vit.ViTConfig(
            **json.loads((directory / "config.json").read_text())["architecture"]
        )
        weights = safetensors.numpy.load_file(directory / "weights.safetensors")
    except OSError as error:
        raise UserError(
            f"{directory}: expected a teacher's config.json and weights.safetensors ({error})"
        ) from None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{directory}: not a teacher's directory ({error})") from None
    flat = {name: value.astype(np.float32) for name, value in weights.items()}
    return Teacher(config, traverse_util.unflatten_dict(flat, sep="/"))


def load_teacher(name: str) -> Teacher:
    """Reads a teacher by its name.

    Args:
      name: "embedded", the small ViT that `training.embedded_teacher` trains on the drawings; a
        published one of `models.vit.PUBLISHED`, once `gigatok weights fetch` has brought it; or
        the directory of either.

    Raises:
      UserError: the name is unknown, or the files are missing or not a teacher's.
    """
    if name == "embedded":
        return _read(EMBEDDED)
    if name in vit.PUBLISHED:
        return _bundled(kinds.fetched_or_refuse(name))
    directory = Path(name)
    if (directory / "weights.safetensors").exists():
        return _read(directory)
    if (directory / "config.json").exists():
        return _bundled(directory)
    known = ", ".join(["embedded", *vit.PUBLISHED])
    raise UserError(f"teacher is {name!r}, expected one of {known}, or a teacher's directory")


def architecture(name: str) -> vit.ViTConfig:
    """A teacher's architecture; of a published one no file is needed. See `load_teacher`."""
    return vit.PUBLISHED[name] if name in vit.PUBLISHED else load_teacher(name).config


def _bundled(directory: Path) -> Teacher:
    kind = bundles.read_config(directory)["kind"]
    if kind not in vit.FAMILIES:
        raise UserError(f"{directory}: holds a {kind}, expected one of {', '.join(vit.FAMILIES)}")
    bundle = bundles.load(directory, kind, vit.ViTConfig)
    return Teacher(bundle.config, bundle.weights)


def load_dino() -> dict[str, Any]:
    """The parameters of `vit.DINO["dino_vits16"]`, once `gigatok weights fetch` has brought them.

    The keys' biases are zeroed, as in the reference: attention does not depend on them, and half
    precision has more left for what it does depend on.

    Raises:
      UserError: they are not there.
    """
    params = bundles.load(kinds.fetched_or_refuse("dino_vits16"), "dino").weights
    key = params["layers"]["block"]["self_attention"]["key"]
    key["bias"] = np.zeros_like(key["bias"])
    return params


def has_lpips() -> bool:
    """Whether `load_lpips` has something to load."""
    return kinds.fetched("lpips_vgg16").exists()


def load_lpips() -> dict[str, Any]:
    """The parameters of `models.lpips.LPIPS`, once `gigatok weights fetch` has brought them.

    Raises:
      UserError: they are not there.
    """
    return bundles.load(kinds.fetched_or_refuse("lpips_vgg16"), "lpips").weights
