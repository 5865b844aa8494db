"""Bundles: a directory with weights, `config.json` and what made them, all that using one needs."""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from gigatok_jax import distributed
from gigatok_jax.config import from_mapping
from gigatok_jax.errors import UserError
from gigatok_jax.files import write_json

FORMAT = 1


class Bundle(NamedTuple):
    """A bundle's content.

    Attributes:
      config: the architecture.
      weights: nested dictionaries of NumPy arrays.
      made_by: what made it.
    """

    config: Any
    weights: dict[str, Any]
    made_by: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """See `fingerprint`."""
        return fingerprint(self.weights["params"])


def save(
    directory: pathlib.Path, kind: str, config: Any, weights: Any, made_by: Mapping[str, Any]
) -> None:
    """Writes a bundle, replacing one that is there only when it is complete.

    All processes of a run call this, and each writes the parts of arrays that it holds.

    Args:
      directory: where.
      kind: "tokenizer", "dinov2", "lpips", ...
      config: the architecture, a dataclass, or None where there is only one.
      weights: pytree of arrays.
      made_by: what made it, as JSON can hold it.
    """
    config = dataclasses.asdict(config) if config is not None else {}
    with distributed.replacing(directory) as aside:
        aside = aside.absolute()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(aside / "weights", weights)
        record = {"format": FORMAT, "kind": kind, "config": config, "made_by": dict(made_by)}
        if distributed.is_main():
            write_json(aside / "config.json", record)


def fingerprint(params: Any) -> str:
    """Sixteen hex digits that tell these parameters from any others."""
    digest = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    for path, array in leaves:
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def load(directory: str | pathlib.Path, kind: str, config_type: type | None = None) -> Bundle:
    """Reads a bundle, its arrays whole in the memory of each process.

    All processes of a run call this together: one reads for all, and Orbax waits for each.

    Args:
      directory: of the bundle, or the workdir of the run that wrote it.
      kind: what it must hold.
      config_type: the architecture's dataclass; None leaves the mapping of the file.

    Raises:
      UserError: there is no bundle, or one of another kind.
    """
    directory = _find(pathlib.Path(directory))
    config, made_by = _describe(directory, kind, config_type)
    path = (directory / "weights").absolute()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree
            # Orbax takes types and shapes from these; they have no memory.
            abstract = jax.tree.map(
                lambda array: np.broadcast_to(np.zeros((), array.dtype), array.shape), stored
            )
            weights = checkpointer.restore(path, abstract)
    except Exception as error:  # Orbax raises half a dozen types for damaged files, bare ones too
        reason = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{path}: unreadable weights ({reason[0]})") from error
    return Bundle(config, weights, made_by)


def load_config(directory: str | pathlib.Path, kind: str, config_type: type) -> Any:
    """Reads a bundle's architecture only; arguments and errors are those of `load`."""
    return _describe(_find(pathlib.Path(directory)), kind, config_type)[0]


def _describe(directory: pathlib.Path, kind: str, config_type: type | None):
    """A bundle's architecture, and what made it."""
    record = read_config(directory)
    if record["kind"] != kind:
        raise UserError(f"{directory}: holds a {record['kind']}, expected a {kind}")
    config = record["config"]
    if config_type is not None:
        config = from_mapping(config_type, config, f"{directory}/config.json: config")
    return config, record["made_by"]


def _find(directory: pathlib.Path) -> pathlib.Path:
    """The bundle that `directory` is, or holds, as a run's workdir does."""
    if (directory / "bundle").is_dir():
        return directory / "bundle"
    if (directory / "checkpoints").is_dir():
        raise UserError(
            f"{directory}: this run has written no bundle yet; it does at its end, and when it is "
            "stopped by SIGTERM"
        )
    return directory


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """A bundle's `config.json`: "format", "kind", "config", "made_by".

    Raises:
      UserError: `directory` is not a bundle.
    """
    path = directory / "config.json"
    try:
        record = json.loads(path.read_text())
    except OSError:
        raise UserError(f"{directory}: not a bundle, it has no config.json") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    whole = isinstance(record, dict) and record.keys() >= {"kind", "config", "made_by"}
    if not whole or record.get("format") != FORMAT:
        raise UserError(f"{path}: not a bundle's description (format {FORMAT})")
    return record
