"""Reading and writing PyTorch checkpoints: `.safetensors`, and `.pt`/`.pth` through torch.

Files are mapped where the format allows, so that what is not asked for (optimizer states, twice
the size of the weights) is not read.
"""

import argparse
from collections.abc import Mapping
import json
import pathlib
import re
import zipfile

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from gigatok_jax.errors import UserError
from gigatok_jax.files import replacing

WRAPPERS = ("model", "state_dict", "module")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
BFLOAT16 = jnp.dtype("bfloat16")  # NumPy itself has none
SAFETENSORS_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": BFLOAT16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read(path: str | pathlib.Path, weights: str = "auto") -> dict[str, np.ndarray]:
    """Reads a checkpoint's tensors.

    A `.pt` file is read with `torch.load(weights_only=True)`: no code in it is run.  The tensors
    may be wrapped under "model", "state_dict" or "module", or be all that there is; prefixes that
    `DistributedDataParallel` ("module.") and `torch.compile` ("_orig_mod.") give to names are
    removed.  Whatever else is in the file (optimizer states, an argparse namespace, the number of
    steps) is ignored.

    Args:
      path: a `.safetensors` file, or one of `torch.save`'s (`.pt`, `.pth`, `.bin`, ...).
      weights: "auto": the EMA where the file has one, as the reference does; "model": not the EMA;
        or the key of other weights in the file, such as "ema" or "discriminator".

    Returns:
      Name to array: float32 for any floating type, other types as they are.  Arrays may be mapped
      to the file: copy what must outlive it.

    Raises:
      UserError: the file is missing, unreadable, or holds no such tensors.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a directory; expected a .pt or .safetensors checkpoint")
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a .pt or .safetensors checkpoint")
    if not path.stat().st_size:
        raise UserError(f"{path}: is empty; expected a .pt or .safetensors checkpoint")
    load = _load_safetensors if path.suffix == ".safetensors" else _load_torch
    content = _unwrap(load(path), weights, path)
    tensors = {name: t for name, t in content.items() if isinstance(name, str) and _is_tensor(t)}
    if not tensors:
        raise UserError(f"{path}: expected a model's tensors, {_describe(content)}")
    return {name: _to_numpy(tensor) for name, tensor in _strip_prefixes(tensors).items()}


def _load_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, "np"):  # validates; its own tensors have no bfloat16
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file, or cut short ({error})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, mode="r")[8 + length :] if header else None
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFETENSORS_TYPES:
            raise UserError(f"{path}: tensor {name!r} is of type {entry['dtype']}, not supported")
        begin, end = entry["data_offsets"]
        flat = np.asarray(data[begin:end]).view(SAFETENSORS_TYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def _load_torch(path: pathlib.Path):
    torch = _torch(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # The format before PyTorch 1.6, in which VGG-16 was published, cannot be mapped.
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises half a dozen types for files of other kinds
        code = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
        reason = f"it asks for the code of {code[1]}" if code else "another kind, or cut short"
        raise UserError(f"{path}: not a PyTorch checkpoint of plain tensors ({reason})") from error


def check_readable(name: str) -> None:
    """Raises UserError where a file called `name` needs PyTorch, which is not there."""
    if not name.endswith(".safetensors"):
        _torch(pathlib.Path(name))


def _torch(path: pathlib.Path):
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading and writing {path.suffix} files needs PyTorch: pip install torch"
        ) from error
    return torch


def _is_tensor(value) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "is_floating_point")


def _to_numpy(tensor) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        floating = tensor.dtype.kind == "f" or tensor.dtype == BFLOAT16
        return tensor.astype(np.float32, copy=False) if floating else tensor
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _unwrap(content, weights: str, path: pathlib.Path) -> Mapping:
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
    keys = [str(key) for key in content]
    if not keys:
        return "found nothing"
    return f"found {', '.join(keys[:6])}{', ...' if len(keys) > 6 else ''}"


def _strip_prefixes(tensors: Mapping) -> dict:
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def write(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as `.safetensors`, or under "model" in a `.pt`, by the file's suffix.

    The file appears whole or not at all.

    Raises:
      UserError: another suffix, or a place that cannot be written to.
    """
    path = pathlib.Path(path)
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        expected = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise UserError(f"{path}: expected a name that ends in one of {expected}")
    torch = None if path.suffix == ".safetensors" else _torch(path)
    # Read-only arrays (JAX's) are copied: torch would warn of them.
    tensors = {name: np.require(t, requirements=("C", "W")) for name, t in tensors.items()}
    try:
        with replacing(path) as aside:
            if torch is None:
                safetensors.numpy.save_file(tensors, aside)
            else:
                torch.save({"model": {k: torch.from_numpy(v) for k, v in tensors.items()}}, aside)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch: RuntimeError
        raise UserError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from error
