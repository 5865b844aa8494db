"""Accelerators by name, and groups of them such as "v5p:4x4x2" or "h100:8"."""

from collections.abc import Sequence
import dataclasses
import importlib.util
import math
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh

from gigatok_jax import sharding
from gigatok_jax.errors import UserError
from gigatok_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device can do, as its maker says.

    Attributes:
      memory: bytes of its main memory. A GPU has a few percent more than this, which its runtime
        takes.
      flops: products in bfloat16, a second, without sparsity.
      bandwidth: bytes to and from main memory, a second.
      axes: dimensions of the network between TPUs; 0 for GPUs.
    """

    memory: float
    flops: float
    bandwidth: float
    axes: int = 0


GIB = 2**30
# https://docs.cloud.google.com/tpu/docs/v6e (and v5p, v5e, v4); NVIDIA's data sheets (SXM).
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, axes=3),
    "v5e": Chip(16 * GIB, 197e12, 819e9, axes=2),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, axes=3),
    "v6e": Chip(32 * GIB, 918e12, 1638e9, axes=2),
    "a100": Chip(80e9, 312e12, 2039e9),
    "h100": Chip(80e9, 989e12, 3350e9),
    "h200": Chip(141e9, 989e12, 4800e9),
    "b200": Chip(180e9, 2250e12, 7700e9),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A group of like devices, none of which needs to be there.

    Attributes:
      name: as it was asked for.
      chip: each device.
      count: number of devices.
      devices: what the compiler for them takes, or None where none is installed.
    """

    name: str
    chip: Chip
    count: int
    devices: Sequence[Any] | None = None

    def mesh(self, config: MeshConfig) -> Mesh | AbstractMesh:
        """A mesh over all devices; see `sharding.make_mesh`."""
        if self.devices is None:
            return sharding.abstract_mesh(config, self.count)
        return sharding.make_mesh(config, self.devices)


def topology(name: str) -> Topology:
    """The devices called `name`: CHIP:AxBxC for TPUs, CHIP:COUNT for GPUs.

    Raises:
      UserError: the chip is unknown, or its devices cannot be grouped so.
    """
    kind, _, extents = name.partition(":")
    known = ", ".join(CHIPS)
    if kind not in CHIPS:
        raise UserError(f"--topology: expected CHIP:DEVICES with a chip of {known}, got {name!r}")
    chip = CHIPS[kind]
    example = {0: "8", 2: "4x4", 3: "2x2x4"}[chip.axes]
    axes = max(chip.axes, 1)
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (axes - 1), extents):
        raise UserError(f"--topology: expected {kind} as {kind}:{example}, got {name!r}")
    count = math.prod(map(int, extents.split("x")))
    if not chip.axes or importlib.util.find_spec("libtpu") is None:
        return Topology(name, chip, count)
    try:
        # The two cores of a v4 chip work as one device, as those of a v5p do unasked.
        options: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}
        if count < 4:  # of a host's four
            bounds = [int(extent) for extent in extents.split("x")]
            options["chips_per_host_bounds"] = tuple(bounds + [1] * (3 - len(bounds)))
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--topology: {name!r}: {reason}") from error
    return Topology(name, chip, len(found.devices), found.devices)
