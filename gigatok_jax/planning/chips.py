"""Accelerators by name, and topologies such as "v5p:4x4x2" or "h100:8"."""

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
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Chip:
    """The data sheet of one device."""

    memory: float  # bytes
    flops: float  # dense bfloat16 FLOPs per second
    bandwidth: float  # bytes per second to and from memory
    axes: int = 0  # dimensions of the network between TPUs; 0 for GPUs


# TPUs: docs.cloud.google.com/tpu/docs, with memory in GiB. GPUs: NVIDIA's data sheets (SXM), in GB.
# Cards have a few percent more, but the driver takes about as much.
CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 1228e9, axes=3),
    "v5e": Chip(16 * 2**30, 197e12, 819e9, axes=2),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, axes=3),
    "v6e": Chip(32 * 2**30, 918e12, 1638e9, axes=2),
    "a100": Chip(80e9, 312e12, 2039e9),
    "h100": Chip(80e9, 989e12, 3350e9),
    "h200": Chip(141e9, 989e12, 4800e9),
    "b200": Chip(180e9, 2250e12, 7700e9),
}
EXAMPLES = {0: "8", 2: "4x4", 3: "2x2x4"}  # of DEVICES, by `Chip.axes`


@dataclasses.dataclass(frozen=True)
class Topology:
    """A group of equal devices, which need not exist."""

    name: str
    chip: Chip
    count: int
    devices: Sequence[Any] | None = None  # the compiler's targets; None: without a compiler

    def mesh(self, config: MeshConfig) -> Mesh | AbstractMesh:
        if self.devices is None:
            return sharding.abstract_mesh(config, self.count)
        return sharding.make_mesh(config, self.devices)


def topology(name: str) -> Topology:
    """The devices called `name`: CHIP:AxBxC for TPUs, CHIP:COUNT for GPUs.

    Raises:
      UserError: the chip is unknown, or is not available in this topology.
    """
    kind, _, extents = name.partition(":")
    if kind not in CHIPS:
        known = ", ".join(CHIPS)
        raise UserError(f"--topology: expected CHIP:DEVICES, CHIP one of {known}, got {name!r}")
    chip = CHIPS[kind]
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (chip.axes - 1), extents):
        raise UserError(
            f"--topology: expected {kind} as {kind}:{EXAMPLES[chip.axes]}, got {name!r}"
        )
    sides = [int(side) for side in extents.split("x")]
    if not chip.axes or importlib.util.find_spec("libtpu") is None:
        return Topology(name, chip, math.prod(sides))
    options: dict[str, Any] = {}
    if kind == "v4":  # makes its two cores one device, as v5p's are by default
        options["chip_config_name"] = "megacore"
    if math.prod(sides) < 4:  # part of a host, which has four chips
        options["chips_per_host_bounds"] = (*sides, 1, 1)[:3]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology: {name!r}: {first_line(error)}") from error
    return Topology(name, chip, len(found.devices), found.devices)
