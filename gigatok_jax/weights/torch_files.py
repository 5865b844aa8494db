"""Reading and writing PyTorch checkpoints: `.safetensors`, and `.pt`/`.pth` through torch."""

import argparse
from collections.abc import Mapping
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from gigatok_jax.errors import UserError

WRAPPERS = ("model", "state_dict", "module")


def _torch(path: pathlib.Path):
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: reading and writing {path.suffix} files needs PyTorch; "
            "pip install 'gigatok_jax[torch]', or use a .safetensors file"
        ) from error
    return torch


def _to_numpy(tensor) -> np.ndarray:
    """float32 for any floating type (NumPy has no bfloat16), other types as they are."""
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def read(path: str | pathlib.Path, weights: str = "auto") -> dict[str, np.ndarray]:
    """Reads a checkpoint's tensors.

    `.pt` files are read with `torch.load(weights_only=True)`: no code in them is run.  Optimizer
    states and the argparse namespace in released files are ignored.

    Args:
      path: a `.safetensors`, `.pt`, `.pth` or `.bin` file.
      weights: "model", "ema", or "auto": the EMA where the file has one, as the reference does.

    Returns:
      Name to array.

    Raises:
      UserError: the file is missing, unreadable, or holds no tensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a .pt or .safetensors checkpoint")
    if path.suffix == ".safetensors":
        try:
            return safetensors.numpy.load_file(path)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: not a safetensors file ({error})") from error
    torch = _torch(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for files of other kinds
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a PyTorch checkpoint of plain tensors ({reason})") from error
    tensors = _unwrap(content, weights, path)
    tensors = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors; expected a model's state_dict")
    return {name: _to_numpy(tensor) for name, tensor in tensors.items()}


def _unwrap(content, weights: str, path: pathlib.Path) -> Mapping:
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a state_dict")
    if weights == "ema" and "ema" not in content:
        raise UserError(f"{path}: has no 'ema' weights; it holds {sorted(map(str, content))[:8]}")
    if weights != "model" and isinstance(content.get("ema"), Mapping):
        return content["ema"]
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            return _unwrap(content[key], "model", path)
    return content


def write(path: str | pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as `.safetensors`, or under "model" in a `.pt`, by the file's suffix."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(dict(tensors), aside)
    elif path.suffix in (".pt", ".pth", ".bin"):
        torch = _torch(path)
        torch.save({"model": {k: torch.from_numpy(v) for k, v in tensors.items()}}, aside)
    else:
        raise UserError(f"{path}: expected a name ending in .safetensors, .pt, .pth or .bin")
    aside.replace(path)
