"""The one place that names mesh axes, and the table that maps logical axes to them."""

import collections
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import functools
import math
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from gigatok_jax.models import placement

AXES = ("data", "fsdp", "tensor")
# Linen's logical constraints want Auto axes; Explicit ones are jax.make_mesh's default.
TYPES = (AxisType.Auto,) * len(AXES)

# Logical axis (as modules name it) to mesh axes; earlier rules win where two want the same axis.
RULES = (
    ("batch", ("data", "fsdp")),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("vocab", "tensor"),
    ("conv_out", "fsdp"),
    ("embed", "fsdp"),
    ("embed_out", "tensor"),
    ("layers", None),
    ("norm", None),
    ("head_dim", None),
    ("conv_in", None),
    ("length", None),
    ("activation_embed", None),
)

SMALL = 2**16  # elements below which an array without axis names is not worth dividing
LARGE = 2**18  # elements, 1 MiB of float32, from which no parameter stays whole under `fsdp`


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a run's arrays lie on its devices.

    Attributes:
      data, fsdp, tensor: devices along each mesh axis; one of them may be -1: all that are left.
      shard_frozen: frozen networks are divided over `fsdp` as parameters are, and gathered where a
        step needs them; otherwise each device has all of them.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    shard_frozen: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Devices along each of `AXES`."""
        return self.data, self.fsdp, self.tensor

    def __post_init__(self):
        sizes = self.sizes
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f"data, fsdp, tensor must be positive, one may be -1; got {sizes}")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes, or over those given.

    Raises:
      ValueError: the number of devices is not what the config asks for.
    """
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh(_sizes(config, count), AXES, axis_types=TYPES, devices=devices)


def abstract_mesh(config: MeshConfig, count: int) -> AbstractMesh:
    """The mesh over as many devices, none of which there needs to be; see `make_mesh`."""
    return AbstractMesh(_sizes(config, count), AXES, axis_types=TYPES)


def _sizes(config: MeshConfig, count: int) -> tuple[int, ...]:
    sizes = list(config.sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(count // -int(np.prod(sizes)), 1)
    if np.prod(sizes) != count:
        raise ValueError(f"mesh {sizes} needs {np.prod(sizes)} devices, there are {count}")
    return tuple(sizes)


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[None]:
    """Where programs that name logical axes are traced for the mesh."""

    def place(axes):
        return nn.logical_to_mesh_sharding(PartitionSpec(*axes), mesh, RULES)

    token = placement.current.set(place)
    try:
        yield
    finally:
        placement.current.reset(token)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_block(mesh: Mesh) -> tuple[int, int]:
    """Which block of each global batch this process reads, and of how many.

    Processes whose devices differ along `tensor` only read the same one.

    Raises:
      ValueError: some process's parts of a batch do not lie side by side; all processes say so.
    """
    shards = batch_shards(mesh)
    parts = collections.defaultdict(set)
    for device, place in batch_sharding(mesh).devices_indices_map((shards,)).items():
        parts[device.process_index].add(place[0].start or 0)
    length = len(parts[jax.process_index()])
    for process, rows in sorted(parts.items()):
        first = min(rows)
        block = set(range(first, first + length))
        if rows != block or first % length or shards % length:
            raise ValueError(
                f"mesh: expected the devices of a process to share one block "
                f"of the batch, process {process} has parts {sorted(rows)} of {shards}"
            )
    return min(parts[jax.process_index()]) // length, shards // length


def put_batch(mesh: Mesh, local: Any) -> Any:
    """Global arrays of all processes' blocks, pytrees of host arrays `[B/P, ...]`."""
    put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return jax.tree.map(put, local)


def local_block(array: jax.Array) -> np.ndarray:
    """This process's block `[B/P, ...]` of an array that is sharded like a batch."""
    rows = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([rows[start] for start in sorted(rows)])


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that all processes have, where `shardings`, of the same structure, say."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(array, sharding):
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Arrays of any sharding, whole on every device."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def batch_shards(mesh: Mesh) -> int:
    """Number of devices that a batch is divided over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch_size: int, accumulate: int, mesh: Mesh | AbstractMesh) -> None:
    """Refuses a batch that devices cannot share equally, or its parts, see `RunConfig.accumulate`.

    Raises:
      ValueError: `batch_size` is not a multiple of `accumulate` times `batch_shards`.
    """
    if batch_size % (accumulate * batch_shards(mesh)):
        parts = f"accumulate={accumulate} times " if accumulate > 1 else ""
        raise ValueError(
            f"batch_size: expected a multiple of {parts}{batch_shards(mesh)}, the devices that "
            f"share a batch, got {batch_size}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract_state, mesh: Mesh):
    """Shardings of a state whose parameters carry logical axis names (`nn.Partitioned` boxes).

    An axis that the mesh does not divide is left whole. A large array that this leaves whole along
    `fsdp` is divided along its longest axis that has no other use, where the mesh divides one.
    """
    specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_state), mesh, RULES)
    shapes = nn.meta.unbox(abstract_state)

    def fit(sharding, array):
        spec = [
            axes if axes is None or length % _extent(mesh, axes) == 0 else None
            for axes, length in zip(sharding.spec, array.shape, strict=False)
        ]
        spec += [None] * (len(array.shape) - len(spec))
        whole = not any("fsdp" in (axes or ()) for axes in spec)
        if whole and math.prod(array.shape) >= LARGE:
            _divide(spec, array.shape, mesh)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(fit, specs, shapes)


def _divide(spec: list, shape: tuple[int, ...], mesh: Mesh) -> None:
    """Gives the longest free axis of an array to `fsdp`, if that divides one."""
    fits = [
        i for i, length in enumerate(shape) if spec[i] is None and length % mesh.shape["fsdp"] == 0
    ]
    if fits:
        spec[max(fits, key=lambda i: shape[i])] = "fsdp"


def frozen_shardings(frozen: Any, mesh: Mesh, *, shard: bool) -> Any:
    """Shardings of arrays without axis names: whole, or with the longest axis that fits divided.

    Args:
      frozen: arrays, or their shapes.
      mesh: what they lie on.
      shard: see `MeshConfig.shard_frozen`; small arrays stay whole.
    """

    def place(array):
        shape = np.shape(array)
        spec = [None] * len(shape)
        if shard and math.prod(shape) >= SMALL:
            _divide(spec, shape, mesh)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(place, frozen)


def abstract(arrays: Any, shardings: Any) -> Any:
    """Shapes and types of arrays, with where they shall lie."""
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        arrays,
        shardings,
    )


def _extent(mesh: Mesh, axes) -> int:
    axes = (axes,) if isinstance(axes, str) else axes
    return int(np.prod([mesh.shape[axis] for axis in axes]))
