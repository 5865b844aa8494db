"""Accelerators by name, and topologies such as "v5p:4x4x2", "h100:8" or "h100:4x8"."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import importlib.util
import math
import re
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh

from gigatok_jax import sharding
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks about a GPU, from the maker's white papers."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # float32 units of a core
    shared: int  # bytes of shared memory of a core; a block has 1 KiB less
    cache: int  # bytes of L2
    clock: float  # GHz


@dataclasses.dataclass(frozen=True)
class Chip:
    """The data sheet of one device."""

    memory: float  # bytes
    flops: float  # dense bfloat16 FLOPs per second
    bandwidth: float  # bytes per second to and from memory
    axes: int = 0  # dimensions of the network between TPUs; 0 for GPUs
    gpu: Gpu | None = None


# TPUs: docs.cloud.google.com/tpu/docs, with memory in GiB. GPUs: NVIDIA's data sheets (SXM), in GB.
# Cards have a few percent more, but the driver takes about as much.
CHIPS = {
    "v4": Chip(32 * 2**30, 275e12, 1228e9, axes=3),
    "v5e": Chip(16 * 2**30, 197e12, 819e9, axes=2),
    "v5p": Chip(95 * 2**30, 459e12, 2765e9, axes=3),
    "v6e": Chip(32 * 2**30, 918e12, 1638e9, axes=2),
    "a100": Chip(
        *(80e9, 312e12, 2039e9),
        gpu=Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 << 10, 40 << 20, 1.41),
    ),
    "h100": Chip(
        *(80e9, 989e12, 3350e9),
        gpu=Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 << 10, 50 << 20, 1.98),
    ),
    "h200": Chip(
        *(141e9, 989e12, 4800e9),
        gpu=Gpu("NVIDIA H200", (9, 0), 132, 128, 228 << 10, 50 << 20, 1.98),
    ),
    "b200": Chip(
        *(180e9, 2250e12, 7700e9),
        gpu=Gpu("NVIDIA B200", (10, 0), 148, 128, 228 << 10, 126 << 20, 1.965),
    ),
}
# JAX's `device_kind` to the names above. Variants that are slower (PCIe and NVL cards of H100 and
# H200, parts of a card) or not in the table match nothing.
KINDS = {
    r"TPU v4": "v4",
    r"TPU v5( lite|e)": "v5e",
    r"TPU v5p?": "v5p",
    r"TPU v6( lite|e)": "v6e",
    r"NVIDIA A100.*GB( PCIe)?": "a100",
    r"NVIDIA H100 80GB HBM3": "h100",
    r"NVIDIA (H200|GH200 480GB)": "h200",
    r"NVIDIA B200": "b200",
}
EXAMPLES = {0: "8 or 4x8", 2: "4x4", 3: "2x2x4"}  # of DEVICES, by `Chip.axes`
CUDNN = (9, 8, 0)  # that programs are compiled for
# XLA's description of a GPU: gpu_device_info of its target_config.proto.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {block}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
device_description_str: "{gpu.name}"
"""
# Tuning needs a device: products stay with cuBLAS. The rest is as launch/accelerator.sh sets it.
GPU_OPTIONS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_dot_merger_threshold_mb": 0,
}


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


def find(device: jax.Device) -> Chip | None:
    """The data sheet of a device, or None if it is not known."""
    names = (name for kind, name in KINDS.items() if re.fullmatch(kind, device.device_kind))
    return next((CHIPS[name] for name in names), None)


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Dense bfloat16 FLOPs per second of all devices, or None if one of them is not known."""
    found = [find(device) for device in devices]
    return sum(chip.flops for chip in found) if all(found) else None


def topology(name: str) -> Topology:
    """The devices called `name`: CHIP:AxBxC for TPUs, CHIP:COUNT or CHIP:HOSTSxCOUNT for GPUs.

    Raises:
      UserError: the chip is unknown, or is not available in this topology.
    """
    kind, _, extents = name.partition(":")
    if kind not in CHIPS:
        known = ", ".join(CHIPS)
        raise UserError(f"--topology: expected CHIP:DEVICES, CHIP one of {known}, got {name!r}")
    chip = CHIPS[kind]
    more = r"(x[1-9]\d*)?" if chip.gpu else r"x[1-9]\d*" * (chip.axes - 1)
    if not re.fullmatch(r"[1-9]\d*" + more, extents):
        raise UserError(
            f"--topology: expected {kind} as {kind}:{EXAMPLES[chip.axes]}, got {name!r}"
        )
    sides = [int(side) for side in extents.split("x")]
    options: dict[str, Any] = {"platform": "tpu", "topology_name": name}
    if chip.gpu:
        extras, options = ("jax_cuda12_plugin", "jax_cuda13_plugin"), _gpu_target(chip, sides)
    else:
        extras = ("libtpu",)
    if not any(importlib.util.find_spec(extra) for extra in extras):
        return Topology(name, chip, math.prod(sides))
    if kind == "v4":  # makes its two cores one device, as v5p's are by default
        options["chip_config_name"] = "megacore"
    if chip.axes and math.prod(sides) < 4:  # part of a host, which has four chips
        options["chips_per_host_bounds"] = (*sides, 1, 1)[:3]
    try:
        found = topologies.get_topology_desc(**options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology: {name!r}: {first_line(error)}") from error
    return Topology(name, chip, len(found.devices), found.devices)


def _gpu_target(chip: Chip, sides: Sequence[int]) -> dict[str, Any]:
    """Arguments of `get_topology_desc` for GPUs, the last of `sides` in each host."""
    hosts = sides[0] if len(sides) > 1 else 1
    target = TARGET.format(
        gpu=chip.gpu,
        shared=chip.gpu.shared,
        block=chip.gpu.shared - 1024,
        bandwidth=int(chip.bandwidth),
        memory=int(chip.memory),
        cudnn=CUDNN,
    )
    return {
        "platform": "cuda",
        "topology_name": chip.gpu.name,
        "target_config": target,
        "topology": f"1x{hosts}x{sides[-1]}",
    }


@contextlib.contextmanager
def tracing_for(topology: Topology) -> Iterator[None]:
    """While it traces cuDNN's attention, JAX asks this machine's GPU what it can do.

    There may be none; what it is asked is answered for the topology.
    """
    from jax._src.cudnn import fused_attention_stablehlo as attention

    if topology.chip.gpu is None:
        yield
        return
    have = topology.chip.gpu.capability

    def at_least(capability: str) -> bool:
        return have >= tuple(map(int, capability.split(".")))

    def equal(capability: str) -> bool:
        return have == tuple(map(int, capability.split(".")))

    major, minor, patch = CUDNN
    answers = {
        "check_compute_capability": at_least,
        "is_cuda_compute_capability_equal": equal,
        "check_cudnn_version": lambda: 10_000 * major + 100 * minor + patch,
    }
    with mock.patch.multiple(attention, **answers):
        yield
