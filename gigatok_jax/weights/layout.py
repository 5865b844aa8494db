"""Conversion between the tensors of a PyTorch checkpoint and our parameters.

A list of `Entry` describes a checkpoint: each entry has a tensor's name in the PyTorch file, the
parameter or parameters that it holds, and an einops pattern between the two layouts. The same list
converts both ways.
"""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a PyTorch checkpoint, and its place in our parameters."""

    name: str  # in the PyTorch file
    # Of parameters; several are stacked along the pattern's leading axis `p`.
    paths: tuple[str, ...]
    pattern: str | None = None  # from PyTorch's layout to ours; groups only on the left
    sizes: tuple[tuple[str, int], ...] = ()  # axis lengths that the pattern needs
    layer: int | None = None  # index along the leading axis of a stacked parameter

    def to_ours(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Splits the tensor into its part of each parameter in `paths`."""
        if self.pattern is None:
            return [tensor]
        array = rearrange(tensor, self.pattern, **dict(self.sizes))
        return list(array) if len(self.paths) > 1 else [array]

    def to_torch(self, arrays: list[np.ndarray]) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.pattern is None:
            return arrays[0]
        left, right = self.pattern.split(" -> ")
        array = np.stack(arrays) if len(self.paths) > 1 else arrays[0]
        return rearrange(array, f"{right} -> {left}")

    def torch_shape(self, template: Mapping[str, Any]) -> tuple[int, ...]:
        """The tensor's shape in the file, given the shapes of our parameters by path."""
        ours = template[self.paths[0]].shape
        if self.layer is not None:
            ours = ours[1:]
        if len(self.paths) > 1:
            ours = (len(self.paths), *ours)
        if self.pattern is None:
            return ours
        left, right = self.pattern.split(" -> ")
        lengths = {"1": 1, **dict(zip(right.split(), ours, strict=True))}
        axes = re.findall(r"\(.*?\)|\S+", left)
        return tuple(math.prod(lengths[a] for a in axis.strip("()").split()) for axis in axes)


def from_torch(tensors: Mapping[str, np.ndarray], entries: list[Entry], template) -> dict[str, Any]:
    """Converts tensors to float32 NumPy arrays in the structure and shapes of `template`.

    Tensors without an entry are not read; results share no memory with `tensors`.

    Raises:
      ValueError: a tensor is missing or has the wrong shape.
    """
    template = flatten_dict(template, sep="/")
    flat: dict[str, np.ndarray] = {}
    for entry in entries:
        if entry.name not in tensors:
            raise ValueError(f"tensor {entry.name!r} is missing from the checkpoint")
        tensor = np.asarray(tensors[entry.name], np.float32)
        expected = entry.torch_shape(template)
        if tensor.shape != expected:
            raise ValueError(
                f"tensor {entry.name!r} has shape {list(tensor.shape)}, this architecture "
                f"needs {list(expected)}"
            )
        for path, array in zip(entry.paths, entry.to_ours(tensor), strict=True):
            if path not in flat:
                flat[path] = np.empty(template[path].shape, np.float32)
            flat[path][... if entry.layer is None else entry.layer] = array
    missing = template.keys() - flat.keys()
    assert not missing, f"parameters without an entry: {sorted(missing)}"
    return unflatten_dict(flat, sep="/")


def to_torch(params: Mapping[str, Any], entries: list[Entry]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: contiguous float32 arrays under PyTorch's names.

    Arrays whose layout does not change may share memory with `params`.
    """
    flat = {path: np.asarray(value) for path, value in flatten_dict(params, sep="/").items()}

    def part(entry, path):
        return flat[path] if entry.layer is None else flat[path][entry.layer]

    return {
        entry.name: np.ascontiguousarray(entry.to_torch([part(entry, p) for p in entry.paths]))
        for entry in entries
    }
