"""A run's plan: what its program takes on each device, and how long it may take at best."""

from collections.abc import Iterator, Mapping
import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from gigatok_jax import sharding
from gigatok_jax.models import layers
from gigatok_jax.planning import estimate, flops, hlo, programs
from gigatok_jax.planning.chips import Topology
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training.run import RunConfig

HAS_EFFORT = hasattr(jax.config, "jax_exec_time_optimization_effort")  # until JAX 0.10
SPARE = 0.1  # share of the memory that a setting called fitting leaves free


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one program takes; bytes and compiled FLOPs are those of one device.

    Attributes:
      topology: where it runs.
      parts: bytes of what lies in memory between two calls, by name.
      temporaries: bytes of activations and gradients; None where the compiler gave up.
      code: bytes of the compiled program.
      refusal: what the compiler said, where the program does not fit.
      model_flops: of all devices together, traced without remat.
      traced_flops: with what remat computes again.
      compiled_flops, bytes_moved: by the compiled program; None where it was not compiled.
      compile_seconds: likewise.
      steps: of the whole run; 1 for sampling.
    """

    topology: Topology
    parts: Mapping[str, int]
    temporaries: int | None
    code: int
    refusal: str
    model_flops: float
    traced_flops: float
    compiled_flops: float | None
    bytes_moved: float | None
    compile_seconds: float | None
    steps: int

    @property
    def bytes(self) -> int:
        """All that a device holds at the worst moment."""
        return sum(self.parts.values()) + (self.temporaries or 0) + self.code

    @property
    def spare(self) -> float:
        """Share of a device's memory that stays free; negative where it does not suffice."""
        return 1 - self.bytes / self.topology.chip.memory

    @property
    def fits(self) -> bool:
        return not self.refusal and self.spare >= 0

    @property
    def device_flops(self) -> float:
        """Executed by a device in a step."""
        return self.compiled_flops or self.traced_flops / self.topology.count

    @property
    def bound_seconds(self) -> float:
        """No step is shorter: all products at peak, or all bytes at full bandwidth."""
        chip = self.topology.chip
        # Uncompiled, it is only certain that the state is read and written.
        moved = self.bytes_moved or 2 * sum(self.parts.values())
        return max(self.device_flops / chip.flops, moved / chip.bandwidth)

    def step_seconds(self, utilisation: float) -> float:
        """Of a step whose products run at the given share of the peak, and within the bound."""
        rate = self.topology.chip.flops * utilisation
        return max(self.bound_seconds, self.device_flops / rate)


def make(run: RunConfig, topology: Topology, job: str = "train", effort: float = -1.0) -> Plan:
    """Compiles a run's program for a topology, or estimates it where there is no compiler.

    Args:
      run: a tokenizer's or generator's; its `dtype` must not be "auto".
      topology: the devices.
      job: "train", or "sample" for a generator.
      effort: of the compiler, from -1, the quickest, to 1; a run's own is 0. JAX 0.11 and newer
        have no choice: there it is 0.

    Raises:
      ValueError: the run's mesh or batch does not go with the devices.
      UserError: a network that the run names is not there.
    """
    mesh = topology.mesh(run.mesh)
    sharding.check_batch(run.batch_size, run.accumulate, mesh)
    build = programs.BUILDERS[job]
    program = build(run, mesh)
    plain = build(dataclasses.replace(run, remat="none"), mesh)
    fields = {
        "topology": topology,
        "parts": {name: programs.device_bytes(part) for name, part in program.parts.items()},
        "model_flops": flops.count(plain.trace()),
        "traced_flops": flops.count(program.trace()),
        "steps": run.total_steps if job == "train" else 1,
    }
    if topology.devices is None:
        fields["temporaries"] = _temporaries(run, topology, build)
        return Plan(**fields, **_NOT_COMPILED)
    lowered = program.lower()
    start = time.monotonic()
    try:
        options = {"exec_time_optimization_effort": effort} if HAS_EFFORT else {}
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refused = _NOT_COMPILED | {"refusal": _refusal(str(error))}
        return Plan(**fields, **refused, temporaries=None)
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    cost = hlo.Program(compiled.as_text()).cost()
    kept_twice = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        **fields,
        temporaries=memory.temp_size_in_bytes + kept_twice,
        code=memory.generated_code_size_in_bytes,
        refusal="",
        compiled_flops=cost.flops,
        bytes_moved=cost.bytes,
        compile_seconds=seconds,
    )


_NOT_COMPILED = {
    "code": 0,
    "refusal": "",
    "compiled_flops": None,
    "bytes_moved": None,
    "compile_seconds": None,
}


def _refusal(message: str) -> str:
    """The compiler's sentence about memory."""
    found = re.search(r"Ran out of memory[^\n]*|[^\n]*exceeds[^\n]*", message)
    return found[0].strip() if found else message.splitlines()[0]


def _temporaries(run: RunConfig, topology: Topology, build: Any) -> int:
    """Estimated bytes of a device's activations, and of what does not grow with the batch."""
    single = dataclasses.replace(run, mesh=MeshConfig())
    mesh = sharding.abstract_mesh(MeshConfig(), 1)

    def trace(batch):
        return build(dataclasses.replace(single, batch_size=batch), mesh).trace()

    whole = topology.mesh(run.mesh)
    batch = run.batch_size // sharding.batch_shards(whole)
    return estimate.temporaries(trace, batch) + _fixed(run, build(run, whole))


def _fixed(run: RunConfig, program: programs.Program) -> int:
    """Bytes of the gradients and, where they are kept for the backward pass, gathered weights."""
    parameters = program.parts["parameters"]
    gathered = 0
    if run.remat == "none" and run.mesh.fsdp != 1:
        item = jnp.dtype(run.dtype).itemsize
        gathered = item * sum(leaf.size for leaf in jax.tree.leaves(parameters))
    return programs.device_bytes(parameters) + gathered


@dataclasses.dataclass(frozen=True)
class Setting:
    """Another way to lay out a run, with an estimate of a device's bytes."""

    fsdp: int
    remat: str
    accumulate: int
    bytes: int


def alternatives(run: RunConfig, topology: Topology) -> Iterator[Setting]:
    """Settings that by estimate fit, those that compute the least again first.

    A batch in parts is tried where none fits that takes it whole.
    """
    parts = [n for n in (1, 2, 4, 8, 16) if run.batch_size % (n * topology.count) == 0]
    for accumulate in parts:
        found = list(_fitting(dataclasses.replace(run, accumulate=accumulate), topology))
        yield from found
        if found:
            return


def _fitting(run: RunConfig, topology: Topology) -> Iterator[Setting]:
    estimated = dataclasses.replace(topology, devices=None)
    sizes = [n for n in (1, 4, 8, 16, 32, 64, 128, 256) if n < topology.count] + [topology.count]
    for remat in layers.REMAT_POLICIES:
        activations = None
        for fsdp in (n for n in sizes if topology.count % n == 0):
            mesh = dataclasses.replace(run.mesh, data=-1, fsdp=fsdp, tensor=1)
            changed = dataclasses.replace(run, remat=remat, mesh=mesh)
            program = programs.training(changed, estimated.mesh(mesh))
            fixed = _fixed(changed, program)
            if activations is None:
                activations = _temporaries(changed, estimated, programs.training) - fixed
            kept = sum(map(programs.device_bytes, program.parts.values()))
            needed = kept + fixed + activations
            if needed <= (1 - SPARE) * topology.chip.memory:
                yield Setting(fsdp, remat, run.accumulate, needed)
                break
