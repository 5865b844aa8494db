"""How a PyTorch checkpoint's tensors become our parameters, and back.

A checkpoint is described by a list of `Entry`: a tensor's name in the PyTorch file, the parameter
(or parameters) that it is here, and an einops pattern between the two layouts.  The same list
converts both ways.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import re
from typing import Any

from einops import rearrange
import numpy as np


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a PyTorch checkpoint and where it lives here.

    Attributes:
      name: the tensor's name in the PyTorch file.
      paths: "/"-separated paths of parameters; several share the pattern's leading axis `p`.
      pattern: einops pattern from PyTorch's layout to ours, or None where they are alike; only its
        left side may have groups.
      sizes: axis lengths that the pattern needs in either direction.
      layer: index along the leading `layers` axis of a stacked parameter, or None.
    """

    name: str
    paths: tuple[str, ...]
    pattern: str | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    layer: int | None = None

    def to_ours(self, tensor: np.ndarray) -> list[np.ndarray]:
        if self.pattern is None:
            return [tensor]
        array = rearrange(tensor, self.pattern, **dict(self.sizes))
        return list(array) if len(self.paths) > 1 else [array]

    def to_torch(self, arrays: list[np.ndarray]) -> np.ndarray:
        if self.pattern is None:
            return arrays[0]
        left, right = self.pattern.split(" -> ")
        array = np.stack(arrays) if len(self.paths) > 1 else arrays[0]
        return rearrange(array, f"{right} -> {left}")

    def torch_shape(self, template: Mapping[str, Any]) -> tuple[int, ...]:
        """The tensor's shape in the file, given our parameters' by path; nothing is allocated."""
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


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def torch_shapes(entries: list[Entry], template: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name to shape, in PyTorch's layout, of the tensors that a checkpoint of ours has.

    `template` is our parameters as shapes, see `from_torch`.
    """
    flat = dict(_flatten(template))
    return {entry.name: entry.torch_shape(flat) for entry in entries}


def from_torch(tensors: Mapping[str, np.ndarray], entries: list[Entry], template) -> dict[str, Any]:
    """Builds our parameters from a PyTorch checkpoint's tensors.

    Args:
      tensors: name to array; names that no entry mentions are the caller's affair.
      entries: the checkpoint's description.
      template: our parameters as shapes (`jax.eval_shape`), nested dictionaries.

    Returns:
      float32 NumPy arrays of their own memory (`tensors` may be mapped files), in the template's
      structure.

    Raises:
      ValueError: a tensor is missing or has another shape than the architecture asks for.
    """
    template = dict(_flatten(template))
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
    return _unflatten(flat)


def to_torch(params: Mapping[str, Any], entries: list[Entry]) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: PyTorch's names and layouts, contiguous float32 arrays.

    Arrays whose layout is the same in both may share memory with `params`.
    """
    flat = {path: np.asarray(value) for path, value in _flatten(params)}

    def part(entry, path):
        return flat[path] if entry.layer is None else flat[path][entry.layer]

    return {
        entry.name: np.ascontiguousarray(entry.to_torch([part(entry, p) for p in entry.paths]))
        for entry in entries
    }
