"""How arrays are sharded over devices: mesh axes, rules for logical axes, and their use.

A mesh has three axes: `data` (replicas), `fsdp` (replicas that divide the parameters among them)
and `tensor` (parts of a layer). Models never name them. They use logical axes ("embed", "heads",
"mlp", ...), which `RULES` maps to the mesh:

  - Parameters carry logical axes from initialization on (`nn.with_logical_partitioning`), so that
    `state_shardings` can lay out the whole training state before any of it exists.
  - Activations are constrained with `constrain`, which keeps the batch sharded where XLA would
    otherwise replicate it.
  - Sharding along `fsdp` only saves memory. `gather` reassembles a parameter where it is used:
    multiplying by a shard of a kernel would require a sum over devices of activations, which are
    far larger than the kernel. Gradients are reduce-scattered in turn.

Flax's own constraints work only under `jax.set_mesh`, where `nn.DenseGeneral` fails (Flax 0.12).
`use(mesh)` takes its place while a program is traced.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import contextlib
import contextvars
import functools
import math
import os
from typing import Annotated, Any

from flax import linen as nn
import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
from pydantic import Field, model_validator

from gigatok_jax.config import configclass
from gigatok_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
# Linen's logical constraints need Auto axes; jax.make_mesh makes Explicit ones by default.
TYPES = (AxisType.Auto,) * len(AXES)

# Logical axes to mesh axes. If two axes of an array map to the same mesh axis, the first rule wins.
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
GATHERED = ("embed", "conv_out")  # logical axes that `gather` reassembles

FROZEN_LIMIT = 2**16  # elements; smaller frozen arrays are not worth sharding
PARAMETER_LIMIT = 2**18  # elements (1 MiB of float32); parameters from this size are always sharded

DeviceCount = Annotated[int, Field(ge=-1)]


@configclass
class MeshConfig:
    """How a run's arrays are sharded over its devices."""

    # Parts of each batch, one per device; -1, for one of the three axes, means the rest.
    data: DeviceCount = -1
    fsdp: DeviceCount = 1  # likewise, but these devices also divide parameters and optimizer
    tensor: DeviceCount = 1  # devices that divide each layer, and compute the same images
    shard_frozen: bool = False  # shard the frozen networks along `fsdp` too

    @model_validator(mode="after")
    def _check(self):
        sizes = self.sizes
        if sizes.count(-1) > 1 or 0 in sizes:
            raise ValueError(
                "data, fsdp, tensor: expected positive numbers, at most one of them -1, got "
                f"data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}"
            )
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Devices along each of `AXES`."""
        return self.data, self.fsdp, self.tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh of `devices`, by default all devices of all processes.

    Raises:
      ValueError: the number of devices does not match the config.
    """
    count = jax.device_count() if devices is None else len(devices)
    return jax.make_mesh(_mesh_shape(config, count), AXES, axis_types=TYPES, devices=devices)


def require_accelerator(*, fallback: bool = False) -> None:
    """Rejects a machine without the first of JAX_PLATFORMS; on a CPU, a step may take a day.

    `fallback` accepts the others of JAX_PLATFORMS.
    """
    wanted, _, _ = os.environ.get("JAX_PLATFORMS", "").partition(",")
    if wanted in ("", "cpu"):
        return
    try:
        found = jax.default_backend() != "cpu" or fallback
    except (AssertionError, RuntimeError):  # depending on what is missing
        found = False
    if not found:
        raise UserError(
            f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: JAX finds no {wanted} device; its "
            "libraries come with pip install -e '.[cuda]' or '.[tpu]'"
        )


def local_mesh() -> Mesh:
    """A mesh of this process's devices, which share each batch."""
    return Mesh(np.reshape(jax.local_devices(), (-1, 1, 1)), AXES)


def abstract_mesh(config: MeshConfig, count: int) -> AbstractMesh:
    """Like `make_mesh`, for `count` devices that do not exist."""
    return AbstractMesh(_mesh_shape(config, count), AXES, axis_types=TYPES)


def _mesh_shape(config: MeshConfig, count: int) -> tuple[int, ...]:
    sizes = list(config.sizes)
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(count // known, 1)
    if math.prod(sizes) != count:
        raise ValueError(f"mesh {sizes} needs {math.prod(sizes)} devices, found {count}")
    return tuple(sizes)


# The mesh of the program that is being traced; set by `use`.
_mesh: contextvars.ContextVar[Mesh | AbstractMesh | None] = contextvars.ContextVar(
    "mesh", default=None
)


@contextlib.contextmanager
def use(mesh: Mesh | AbstractMesh) -> Iterator[None]:
    """Traces programs for `mesh` in this context: `constrain`, `gather`, `target` follow it."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def target() -> jax.Device | None:
    """A device of the kind that the program being traced is for; None: a mesh without devices.

    Whatever chooses an implementation must ask this, not `jax.default_backend()`: a plan is traced
    on another machine than the one that runs it.
    """
    mesh = _mesh.get()
    if mesh is None:
        return jax.devices()[0]
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else None


def mesh_in_use() -> Mesh | AbstractMesh | None:
    """The mesh of the innermost `use`; a static argument of whatever is traced once and kept."""
    return _mesh.get()


def platform() -> str:
    """What the program being traced is for: "cpu", "gpu", "tpu", or "" if that is unknown."""
    device = target()
    return "" if device is None else device.platform


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an array with the given logical axes."""
    mesh = _mesh.get()
    if mesh is None:
        return x
    spec = PartitionSpec(*axes)
    return jax.lax.with_sharding_constraint(x, nn.logical_to_mesh_sharding(spec, mesh, RULES))


def row_major(x: jax.Array) -> jax.Array:
    """Makes the compiler store activations, of which only the batch is sharded, in row-major order.

    Without it, a sum over the batch at one end of a network can make XLA transpose the activations
    of all its layers. Programs that are traced without a mesh have no gradients, and no need of it.
    """
    mesh = _mesh.get()
    return x if mesh is None else _row_major(x, mesh, PartitionSpec(("data", "fsdp")))


def row_major_gradients(gradients: Any) -> Any:
    """Makes the compiler store gradients of four axes in row-major order on GPUs.

    cuDNN's order of convolutions would spread to the optimizer, which would then transpose
    parameters and moments as well, before and after each update. It still does so where parameters
    are sharded, whose gradients this would gather.
    """
    mesh = _mesh.get()
    if platform() != "gpu" or mesh is None or mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        return gradients
    fix = functools.partial(_row_major, mesh=mesh, spec=PartitionSpec())
    return jax.tree.map(lambda x: fix(x) if x.ndim == 4 else x, gradients)


def _row_major(x: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    fix = functools.partial(with_layout_constraint, layouts=Layout(tuple(range(x.ndim))))
    # Across devices, the constraint alone would gather the array.
    return jax.shard_map(fix, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)


def places(shape: tuple[int, ...]) -> jax.Array:
    """The row-major index of each element, uint32; larger arrays wrap around.

    A reshaped range would gather the shards of what it is combined with.
    """
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += along * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def gather(x: jax.Array, *axes: str | None) -> jax.Array:
    """Reassembles a parameter with the given logical axes along those in `GATHERED`."""
    return constrain(x, *(None if axis in GATHERED else axis for axis in axes))


def promote(*axes: str | None) -> Callable:
    """The `promote_dtype` of a Linen layer whose kernel has the given logical axes.

    It gathers kernel and bias after the cast, because bfloat16 halves the communication.
    """

    def promote_and_gather(x, kernel, bias, *, dtype):
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=dtype)
        kernel = gather(kernel, *axes)
        return x, kernel, bias if bias is None else gather(bias, *axes[-bias.ndim :])

    return promote_and_gather


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of shards of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_block(mesh: Mesh) -> tuple[int, int]:
    """Index of the block of each batch that this process reads, and the number of blocks.

    Processes whose devices differ only along `tensor` read the same block.

    Raises:
      ValueError: a process does not own a contiguous block of the batch (raised on every process).
    """
    shards = batch_shards(mesh)
    owned = collections.defaultdict(set)  # process to the shards of the batch on its devices
    for device, index in batch_sharding(mesh).devices_indices_map((shards,)).items():
        owned[device.process_index].add(index[0].start or 0)
    length = len(owned[jax.process_index()])
    for process, parts in sorted(owned.items()):
        first = min(parts)
        if parts != set(range(first, first + length)) or first % length or shards % length:
            raise ValueError(
                f"mesh: expected each process to own one block of the batch, but process {process} "
                f"owns parts {sorted(parts)} of {shards}"
            )
    return min(owned[jax.process_index()]) // length, shards // length


def check_batch(batch_size: int, accumulate: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError unless every microbatch (of `accumulate`) divides equally over devices."""
    if batch_size % (accumulate * batch_shards(mesh)):
        parts = f"accumulate={accumulate} times " if accumulate > 1 else ""
        raise ValueError(
            f"batch_size: expected a multiple of {parts}{batch_shards(mesh)}, the devices that "
            f"share a batch, got {batch_size}"
        )


def put_batch(mesh: Mesh, local: Any) -> Any:
    """Assembles global arrays from every process's block, a pytree of host arrays `[B/P, ...]`."""
    put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return jax.tree.map(put, local)


def local_block(array: jax.Array) -> np.ndarray:
    """This process's block `[B/P, ...]` of an array that is sharded like a batch."""
    rows = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([rows[start] for start in sorted(rows)])


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copies sharded arrays to every device."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def state_shardings(boxed_state: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of an abstract state whose parameters carry logical axes (`nn.Partitioned`).

    `RULES` decide, with two exceptions. An axis that the mesh does not divide evenly is not
    sharded. A large array that the rules do not shard along `fsdp` is sharded along its longest
    remaining axis that `fsdp` divides.
    """
    by_rules = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed_state), mesh, RULES)

    def fit(sharding, array):
        spec = [
            axes if axes is None or length % _devices_along(mesh, axes) == 0 else None
            for axes, length in zip(sharding.spec, array.shape, strict=False)
        ]
        spec += [None] * (len(array.shape) - len(spec))
        whole = not any("fsdp" in (axes or ()) for axes in spec)
        if whole and math.prod(array.shape) >= PARAMETER_LIMIT:
            _divide_longest(spec, array.shape, mesh)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(fit, by_rules, nn.meta.unbox(boxed_state))


def frozen_shardings(frozen: Any, mesh: Mesh | AbstractMesh, *, shard: bool) -> Any:
    """Shardings of arrays (or shapes) without logical axes.

    With `shard`, large arrays are sharded along their longest axis that `fsdp` divides; otherwise
    all are replicated.
    """

    def fit(array):
        shape = np.shape(array)
        spec = [None] * len(shape)
        if shard and math.prod(shape) >= FROZEN_LIMIT:
            _divide_longest(spec, shape, mesh)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(fit, frozen)


def put(tree: Any, shardings: Any) -> Any:
    """Puts host arrays, the same in every process, on devices; `shardings` has their structure."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def place(array, sharding):
        host = np.asarray(array)  # each device copies only its own shard of it
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


def abstract(arrays: Any, shardings: Any) -> Any:
    """Shapes and types of arrays, with shardings attached."""
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        arrays,
        shardings,
    )


def _devices_along(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...]) -> int:
    axes = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[axis] for axis in axes)


def _divide_longest(spec: list, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> None:
    """Shards the longest free axis that `fsdp` divides, if any, by changing `spec`."""
    fits = [
        i for i, length in enumerate(shape) if spec[i] is None and length % mesh.shape["fsdp"] == 0
    ]
    if fits:
        spec[max(fits, key=lambda i: shape[i])] = "fsdp"
