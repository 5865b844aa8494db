"""The frozen teachers, by name: what their files hold and how they are read.

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

from gigatok_jax.errors import UserError
from gigatok_jax.files import replacing, write_json
from gigatok_jax.models import vit

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


def _embedded(path: str) -> Teacher:
    return _read(Path(path) if path else EMBEDDED)


# Each takes `load_teacher`'s path.
LOADERS = {"embedded": _embedded}


def load_teacher(name: str, path: str = "") -> Teacher:
    """Reads a teacher by its name.

    Args:
      name: "embedded", the small ViT that `training.embedded_teacher` trains on the drawings.
      path: directory of its files; "" means those that come with the package.

    Raises:
      UserError: the name is unknown, or the files are missing or not a teacher's.
    """
    if name not in LOADERS:
        raise UserError(f"teacher is {name!r}, expected one of {', '.join(LOADERS)}")
    return LOADERS[name](path)
