"""`gigatok plan`: memory per device, a lower bound on the step's time, and settings that fit."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from gigatok_jax import sharding
from gigatok_jax.errors import RunStopped, UserError, first_line
from gigatok_jax.models import layers
from gigatok_jax.planning import chips, estimate, flops, hlo, ledger, programs
from gigatok_jax.planning.chips import Topology
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training.task import RunConfig

# Keeps the TPU compiler from searching for devices and from locking those that exist.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}
HAS_EFFORT = hasattr(jax.config, "jax_exec_time_optimization_effort")  # until JAX 0.10
SPARE = 0.1  # share of memory that suggested settings leave free
TEMPORARIES = {"train": "activations and gradients", "sample": "temporaries"}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Requirements of one program; bytes and compiled FLOPs are per device."""

    topology: Topology
    memory: Mapping[str, int]  # bytes by part
    model_flops: float  # of all devices, traced without remat
    traced_flops: float  # of all devices, with what remat recomputes
    bytes_moved: float  # to and from main memory; without a compiler, of the state alone
    compiled_flops: float | None = None  # None: not compiled
    compile_seconds: float | None = None
    rejection: str = ""  # the compiler's message if the program does not fit
    kernels: Sequence[hlo.Kernel] = ()  # of the compiled program, on one device

    @property
    def bytes(self) -> int:
        """Peak memory of a device."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return not self.rejection and self.bytes <= self.topology.chip.memory

    def step_seconds(self, utilisation: float) -> float:
        """The longer of FLOPs at this share of the peak, and bytes at full bandwidth."""
        chip = self.topology.chip
        # The compiler does not tell the FLOPs of Pallas' kernels.
        device_flops = max(self.compiled_flops or 0, self.traced_flops / self.topology.count)
        return max(device_flops / (utilisation * chip.flops), self.bytes_moved / chip.bandwidth)


def plan(
    run: RunConfig,
    topology: str,
    job: str = "train",
    utilisation: float = 0.4,
    effort: float = -1,
    rows: int = 0,
) -> None:
    """Prints a run's requirements on a topology and, if it does not fit, settings that do.

    Args:
      run: of a tokenizer or a generator; its `dtype` "auto" means bfloat16.
      topology: devices, which need not exist, such as "v5p:4x4x2" or "h100:8".
      job: "train", or "sample" for a generator.
      utilisation: share of the peak FLOPs that a step is assumed to reach.
      effort: of the compiler, from -1 (the quickest) to 1; runs themselves compile with 0. JAX 0.11
        and newer, and GPUs, always use 0.
      rows: print where bytes, FLOPs and kernels go, in this many rows; 0: do not.

    Raises:
      UserError: the run does not suit the devices, or a network that it names is missing.
      RunStopped: a device has too little memory.
    """
    if job == "sample" and run.task != "generator":
        raise UserError(f"--job: sample needs a generator's config, got a {run.task}'s")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if run.dtype == "auto":
        run = dataclasses.replace(run, dtype="bfloat16")
    devices = chips.topology(topology)
    try:
        made = make(run, devices, job, effort)
    except ValueError as error:
        raise UserError(f"config.{error}") from error
    print(describe(made, utilisation, run.total_steps if job == "train" else 1))
    if rows and made.kernels:
        print(ledger.table(made.kernels, devices.chip, rows))
    elif rows and not made.rejection:
        raise UserError(
            "--ledger: expected the compiler of these devices, from the extra cuda or tpu"
        )
    if made.fits:
        return
    if job == "train":
        print(f"settings that fit by estimate, with {SPARE:.0%} to spare:")
        found = alternatives(run, devices)
        for way, size in found:
            parts = f" --config.accumulate={way.accumulate}" if way.accumulate > 1 else ""
            print(
                f"  --config.remat={way.remat} --config.mesh.data=-1 "
                f"--config.mesh.fsdp={way.mesh.fsdp}{parts}: {_size(size)}"
            )
        if not found:
            print("  none: use more devices or a smaller batch_size")
    raise RunStopped(f"{topology}: the run does not fit in a device's memory")


def make(run: RunConfig, topology: Topology, job: str = "train", effort: float = -1.0) -> Plan:
    """Compiles a run's program for a topology, or estimates it if there is no compiler.

    Raises ValueError if the run's mesh or batch does not suit the devices.
    """
    mesh = topology.mesh(run.mesh)
    sharding.check_batch(run.batch_size, run.accumulate, mesh)
    program = programs.build(run, mesh, job)
    plain = dataclasses.replace(run, remat="none")
    with chips.tracing_for(topology):
        traced = program.trace()
        model = traced if run == plain else programs.build(plain, mesh, job).trace()
    state = program.memory
    made = Plan(
        topology,
        state,
        model_flops=flops.count(model.jaxpr),
        traced_flops=flops.count(traced.jaxpr),
        bytes_moved=2 * sum(state.values()),  # at least: the state is read and written once
    )
    if topology.devices is None:
        return dataclasses.replace(made, memory=estimated_memory(run, topology, job))
    with chips.tracing_for(topology):
        lowered = traced.lower()
    options = {"exec_time_optimization_effort": effort} if HAS_EFFORT else {}
    if topology.chip.gpu:
        options = chips.GPU_OPTIONS
    start = time.monotonic()
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = re.search(r"Ran out of memory.*|.*exceeds.*", str(error))
        return dataclasses.replace(made, rejection=found[0].strip() if found else first_line(error))
    seconds = time.monotonic() - start
    needs = compiled.memory_analysis()
    # Results that do not reuse the memory of an argument need their own.
    results = needs.output_size_in_bytes - needs.alias_size_in_bytes
    temporaries = {TEMPORARIES[job]: needs.temp_size_in_bytes + results}
    code = {"compiled program": needs.generated_code_size_in_bytes}
    kernels = hlo.Program(compiled.as_text()).kernels()
    compiled_flops, bytes_moved, _ = hlo.total(kernels)
    return dataclasses.replace(
        made,
        memory=state | temporaries | code,
        bytes_moved=bytes_moved,
        compiled_flops=compiled_flops,
        kernels=kernels,
        compile_seconds=seconds,
    )


def estimated_memory(run: RunConfig, topology: Topology, job: str = "train") -> dict[str, int]:
    """Bytes of a device by part, without a compiler."""
    mesh = topology.mesh(run.mesh)
    program = programs.build(run, mesh, job)
    parameters = program.parts["parameters"]
    trained = run.trained(parameters)
    share = run.batch_size // sharding.batch_shards(mesh)
    # Add gradients, as large as what is trained: the estimate covers what grows with the batch.
    temporaries = programs.device_bytes(trained) + _activations(
        dataclasses.replace(run, mesh=MeshConfig(), steps=run.total_steps, batch_size=share), job
    )
    if run.remat == "none" and run.mesh.fsdp != 1:  # the backward pass keeps gathered weights
        elements = sum(leaf.size for leaf in jax.tree.leaves(parameters))
        temporaries += elements * jnp.dtype(run.dtype).itemsize
    return program.memory | {TEMPORARIES[job]: temporaries}


@functools.cache  # `alternatives` repeats it for each division of the state
def _activations(run: RunConfig, job: str) -> int:
    def jaxpr(devices: int) -> Any:
        # A batch twice as large needs two devices: on one, it would be processed in more parts.
        wider = dataclasses.replace(run, batch_size=devices * run.batch_size)
        mesh = sharding.abstract_mesh(run.mesh, devices)
        return programs.build(wider, mesh, job).trace().jaxpr

    return estimate.peak(jaxpr(1), jaxpr(2))


def alternatives(run: RunConfig, topology: Topology) -> list[tuple[RunConfig, int]]:
    """Settings that fit by estimate, with bytes per device, least recomputation first.

    The batch is divided into parts only if nothing fits otherwise.
    """
    topology = dataclasses.replace(topology, devices=None)
    limit = (1 - SPARE) * topology.chip.memory
    sizes = [n for n in (1, 4, 8, 16, 32, 64, 128, 256) if n < topology.count] + [topology.count]

    def ways(accumulate: int, remat: str) -> Iterator[tuple[RunConfig, int]]:
        for fsdp in (n for n in sizes if topology.count % n == 0):
            mesh = dataclasses.replace(run.mesh, data=-1, fsdp=fsdp, tensor=1)
            way = dataclasses.replace(run, accumulate=accumulate, remat=remat, mesh=mesh)
            yield way, sum(estimated_memory(way, topology).values())

    for accumulate in (1, 2, 4, 8, 16):
        if run.batch_size % (accumulate * topology.count) == 0:
            fitting = [
                next((way for way in ways(accumulate, remat) if way[1] <= limit), None)
                for remat in layers.REMAT_POLICIES
            ]
            if any(fitting):
                return [way for way in fitting if way]
    return []


def describe(made: Plan, utilisation: float, steps: int) -> str:
    """A plan as text; `steps` is the length of the run."""
    chip, count = made.topology.chip, made.topology.count
    extra = "tpu" if chip.axes else "cuda"
    how = f"estimated from shapes, mostly too high; pip install 'gigatok_jax[{extra}]' compiles"
    total = "total"
    if made.compile_seconds is not None:
        how = f"compiled in {made.compile_seconds:.0f} s"
    elif made.rejection:
        how, total = "rejected by the compiler", "total without temporaries"
    fits = f"fits, {1 - made.bytes / chip.memory:.0%} to spare" if made.fits else "does NOT fit"
    lines = [
        f"{made.topology.name}: {count} devices, {how}",
        "memory of a device:",
        *(f"  {name:<26} {_size(size):>12}" for name, size in made.memory.items()),
        f"  {total:<26} {_size(made.bytes):>12} of {_size(chip.memory)}: {fits}",
        *([f"  {made.rejection}"] if made.rejection else []),
        "FLOPs of a step on all devices (products and convolutions):",
        f"  {'model, traced':<26} {made.model_flops / 1e12:9.1f} T",
        f"  {'model and remat, traced':<26} {made.traced_flops / 1e12:9.1f} T",
    ]
    if made.compiled_flops is not None:
        compiled = made.compiled_flops * count
        more = compiled / made.traced_flops - 1
        lines.append(f"  {'compiled':<26} {compiled / 1e12:9.1f} T ({more:+.1%})")
        _, _, runs = hlo.total(made.kernels)
        lines.append(f"bytes moved by a device: {_size(made.bytes_moved)}, in {runs} kernels")
    bound, seconds = made.step_seconds(1.0), made.step_seconds(utilisation)
    lines.append(
        f"a step takes at least {bound * 1e3:.1f} ms, "
        f"{seconds * 1e3:.1f} ms at {utilisation:.0%} of the peak FLOPs"
    )
    if steps > 1:
        lines.append(f"{steps} steps: {seconds * steps / 86_400:.1f} days at {utilisation:.0%}")
    return "\n".join(lines)


def _size(count: float) -> str:
    """Bytes in decimal units, as in data sheets."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.2f} kB"
