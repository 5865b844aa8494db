"""The one place that names mesh axes, and the table that maps logical axes to them."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ("data", "fsdp", "tensor")

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


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; one of them may be -1: all that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f"data, fsdp, tensor must be positive, one may be -1; got {sizes}")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices`; by default all of all processes.

    Raises:
      ValueError: the number of devices is not what the config asks for.
    """
    sizes = list(dataclasses.astuple(config))
    count = jax.device_count() if devices is None else len(devices)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(count // -int(np.prod(sizes)), 1)
    if np.prod(sizes) != count:
        raise ValueError(f"mesh {sizes} needs {np.prod(sizes)} devices, there are {count}")
    # Linen's logical constraints want Auto axes; Explicit ones are jax.make_mesh's default.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def batch_block(mesh: Mesh) -> tuple[int, int]:
    """Which block of each global batch this process reads, and of how many.

    Processes whose devices differ along `tensor` only read the same one.

    Raises:
      ValueError: its devices' parts of a batch do not lie side by side.
    """
    shards = batch_shards(mesh)
    places = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
    rows = sorted({place[0].start or 0 for place in places})
    first, length = rows[0], len(rows)
    if rows != list(range(first, first + length)) or first % length or shards % length:
        raise ValueError(f"mesh: process {jax.process_index()} has parts {rows} of {shards}")
    return first // length, shards // length


def put_batch(mesh: Mesh, local: Any) -> Any:
    """Global arrays of all processes' blocks, pytrees of host arrays `[B/P, ...]`."""
    put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return jax.tree.map(put, local)


def local_block(array: jax.Array) -> np.ndarray:
    """This process's block `[B/P, ...]` of an array that is sharded like a batch."""
    rows = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([rows[start] for start in sorted(rows)])


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Arrays that all processes have, on every device."""
    if jax.process_count() == 1:
        return jax.device_put(tree, replicated(mesh))

    def put(array):
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, replicated(mesh), lambda index: host[index])

    return jax.tree.map(put, tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Arrays of any sharding, whole on every device."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def batch_shards(mesh: Mesh) -> int:
    """Number of devices that a batch is divided over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract_state, mesh: Mesh):
    """Shardings of a state whose parameters carry logical axis names (`nn.Partitioned` boxes).

    An axis that the mesh does not divide is left whole.
    """
    specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_state), mesh, RULES)
    shapes = nn.meta.unbox(abstract_state)

    def fit(sharding, array):
        spec = [
            axes if axes is None or length % _extent(mesh, axes) == 0 else None
            for axes, length in zip(sharding.spec, array.shape, strict=False)
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(fit, specs, shapes)


def _extent(mesh: Mesh, axes) -> int:
    axes = (axes,) if isinstance(axes, str) else axes
    return int(np.prod([mesh.shape[axis] for axis in axes]))
