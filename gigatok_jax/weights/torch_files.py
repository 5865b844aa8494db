"""Reading and writing PyTorch checkpoints: `.safetensors`, and `.pt`/`.pth` through PyTorch."""

import argparse
from collections.abc import Callable, Iterator, Mapping
import functools
import pathlib
import re
from typing import Any
import zipfile

import jax.numpy as jnp
import numpy as np
import safetensors

from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import replacing, write_safetensors

WRAPPERS = ("model", "state_dict", "module")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


class Tensors(Mapping[str, np.ndarray]):
    """A file's tensors by name; each is read when it is asked for, floating types as float32."""

    def __init__(self, stored: Mapping[str, Any]):
        """Takes PyTorch tensors, or functions that read a NumPy array."""
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

    No code in a `.pt` file is run. The tensors may be wrapped under "model", "state_dict" or
    "module". The prefixes that `DistributedDataParallel` ("module.") and `torch.compile`
    ("_orig_mod.") give to names are removed. Whatever else is in the file is ignored.

    Args:
      path: a `.safetensors` file, or one that `torch.save` wrote (`.pt`, `.pth`, `.bin`, ...).
      weights: "auto": the EMA where the file has one, as in the reference; "model": not the EMA;
        or the key of other weights in the file, such as "ema" or "discriminator".

    Raises:
      UserError: the file is missing, unreadable, or holds no such tensors.
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


def _load_safetensors(path: pathlib.Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        file = safetensors.safe_open(path, "np")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file, or cut short ({error})") from error

    def get(name: str) -> np.ndarray:
        try:
            return file.get_tensor(name)
        except AttributeError as error:  # an 8-bit float
            raise UserError(f"{path}: tensor {name!r} cannot be read ({error})") from error

    return {name: functools.partial(get, name) for name in file.keys()}  # noqa: SIM118


def _load_torch(path: pathlib.Path) -> Any:
    torch = import_torch(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, optimizer states, twice the size of the weights, are not read.  The format
            # before PyTorch 1.6, in which VGG-16 was published, cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises half a dozen types for files of other kinds
        code = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        reason = f"it asks for the code of {code[1]}" if code else "another kind, or cut short"
        raise UserError(f"{path}: not a PyTorch checkpoint of plain tensors ({reason})") from error


def import_torch(path: str | pathlib.Path) -> Any:
    """PyTorch, or a UserError that says that the file at `path` needs it."""
    try:
        import torch
    except ImportError as error:
        suffix = pathlib.Path(path).suffix
        raise UserError(
            f"{path}: reading and writing {suffix} files needs PyTorch: pip install torch"
        ) from error
    return torch


def _unwrap(content: Any, weights: str, path: pathlib.Path) -> Mapping:
    """The mapping of tensors that `weights` (see `read`) means."""
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
    """Writes tensors as `.safetensors`, or under "model" in a `.pt`, by the file's suffix.

    The file appears whole or not at all.

    Raises:
      UserError: another suffix, or a place that cannot be written to.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a name that ends in one of {', '.join(SUFFIXES)}")
    torch = None if path.suffix == ".safetensors" else import_torch(path)
    # Read-only arrays (JAX's) are copied: torch would warn of them.
    tensors = {name: np.require(t, requirements=("C", "W")) for name, t in tensors.items()}
    try:
        with replacing(path) as aside:
            if torch is None:
                write_safetensors(aside, tensors)
            else:
                torch.save({"model": {k: torch.from_numpy(v) for k, v in tensors.items()}}, aside)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from error
