"""Reading and writing PyTorch checkpoints: `.safetensors`, and `.pt`/`.pth` through PyTorch."""

import argparse
import collections
from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import pathlib
import re
from typing import Any
import zipfile

import jax.numpy as jnp
import numpy as np
import safetensors

from gigatok_jax.errors import UserError
from gigatok_jax.files import read_json, replacing, unwritable, write_safetensors

WRAPPERS = ("model", "state_dict", "module")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")

# What people store beside the weights, and what cannot run code: settings, paths and scalars.
HARMLESS = [
    argparse.Namespace,
    collections.defaultdict,
    np.dtype,
    *(getattr(np.dtypes, name) for name in dir(np.dtypes) if name.endswith("DType")),
    *((kind, f"builtins.{kind.__name__}") for kind in (list, dict, set, int, float)),
    *((pathlib.PurePath, f"pathlib.{kind}Path") for kind in ("Posix", "Windows", "PurePosix")),
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # NumPy 1
]


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file by name, read on access; floating-point tensors become float32."""

    def __init__(self, stored: Mapping[str, Any]):
        """`stored` maps names to PyTorch tensors, or to functions that read a NumPy array."""
        self._stored = stored

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._stored[name]
        if callable(tensor):
            array = tensor()
            floating = jnp.issubdtype(array.dtype, jnp.floating)
            return array.astype(np.float32, copy=False) if floating else array
        tensor = tensor.detach()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def read(path: str | pathlib.Path, weights: str = "auto") -> Tensors:
    """Opens a checkpoint.

    Code in `.pt` files never runs. Tensors may be nested under "model", "state_dict" or "module".
    The prefixes that `DistributedDataParallel` ("module.") and `torch.compile` ("_orig_mod.") add
    to names are removed. Other content is ignored.

    Args:
      path: a `.safetensors` file, or one from `torch.save` (`.pt`, `.pth`, `.bin`, ...).
      weights: "auto": the EMA if the file has one, as in the reference, else the model; "model";
        or the key of other weights in the file, such as "ema" or "discriminator".

    Raises:
      UserError: the file is missing or unreadable, or does not hold these weights.
    """
    path = pathlib.Path(path)
    if not path.is_file() or not path.stat().st_size:
        fault = "is empty" if path.is_file() else "no such file"
        fault = "is a directory" if path.is_dir() else fault
        raise UserError(f"{path}: {fault}; expected a .pt or .safetensors checkpoint")
    load = _load_safetensors if path.suffix == ".safetensors" else _load_torch
    content = _unwrap(load(path), weights, path)
    tensors = {
        name.replace("_orig_mod.", ""): tensor
        for name, tensor in content.items()
        if isinstance(name, str) and (callable(tensor) or hasattr(tensor, "is_floating_point"))
    }
    if not tensors:
        raise UserError(f"{path}: expected a model's tensors, {_describe(content)}")
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return Tensors(tensors)


def shards(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that a Hugging Face index (`*.index.json`) lists; any other file stands alone.

    Raises:
      UserError: the index is damaged.
    """
    if not path.name.endswith(".index.json"):
        return [path]
    places = read_json(path, "the shards of a checkpoint").get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise UserError(f"{path}: expected a weight_map of tensors to files, got {places!r}")
    return [path.with_name(str(name)) for name in sorted(set(map(str, places.values())))]


def _load_safetensors(path: pathlib.Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        file = safetensors.safe_open(path, "np")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file, or truncated ({error})") from error

    def get(name: str) -> np.ndarray:
        try:
            return file.get_tensor(name)
        except AttributeError as error:  # an 8-bit float
            raise UserError(f"{path}: tensor {name!r} cannot be read ({error})") from error

    return {name: functools.partial(get, name) for name in file.keys()}  # noqa: SIM118


def _load_torch(path: pathlib.Path) -> Any:
    torch = import_torch(path)
    _check_sums(path)
    try:
        with torch.serialization.safe_globals(HARMLESS):
            # Mapping avoids reading optimizer states, which are twice the size of the weights. The
            # format before PyTorch 1.6, which VGG-16 was published in, cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many types for files of other kinds
        code = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        reason = f"it would run code of {code[1]}" if code else "another format, or truncated"
        raise UserError(f"{path}: not a PyTorch checkpoint of plain tensors ({reason})") from error


def _check_sums(path: pathlib.Path) -> None:
    """Rejects a damaged file; PyTorch writes checksums, but does not compare them."""
    if not zipfile.is_zipfile(path):
        return
    damaged = "its directory"
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise UserError(f"{path}: not a PyTorch checkpoint of plain tensors ({damaged} is damaged)")


def import_torch(path: str | pathlib.Path) -> Any:
    """Imports PyTorch, or raises UserError: the file at `path` needs it."""
    try:
        import torch
    except ImportError as error:
        suffix = pathlib.Path(path).suffix
        raise UserError(
            f"{path}: reading and writing {suffix} files needs PyTorch: pip install torch"
        ) from error
    return torch


def _unwrap(content: Any, weights: str, path: pathlib.Path) -> Mapping:
    """The mapping of tensors that `weights` selects; see `read`."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a state_dict")
    if weights == "auto":
        weights = "ema" if isinstance(content.get("ema"), Mapping) else "model"
    if weights != "model":
        if not isinstance(content.get(weights), Mapping):
            raise UserError(f"{path}: has no {weights!r} weights, {_describe(content)}")
        content = content[weights]
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            return _unwrap(content[key], "model", path)
    return content


def _describe(content: Mapping) -> str:
    keys = ", ".join(map(str, list(content)[:6]))
    return f"found {keys}{', ...' if len(content) > 6 else ''}" if content else "found nothing"


def write(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a `.safetensors` file, or a `.pt` file with the tensors under "model".

    The write is atomic.

    Raises:
      UserError: the suffix is unknown.
      OSError: the file cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a file name that ends in {', '.join(SUFFIXES)}")
    torch = None if path.suffix == ".safetensors" else import_torch(path)
    # Copies read-only arrays, such as JAX's, which torch would warn about.
    tensors = {name: np.require(t, requirements=("C", "W")) for name, t in tensors.items()}
    with replacing(path) as aside:
        if torch is None:
            return write_safetensors(aside, tensors)
        try:
            torch.save({"model": {k: torch.from_numpy(v) for k, v in tensors.items()}}, aside)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise unwritable(aside, error, size) from error
