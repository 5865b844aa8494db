"""The programs of a run, traced with the shapes and shardings of their arguments."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import ShapeDtypeStruct
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from gigatok_jax import bundles, frozen_networks, sampling, sharding
from gigatok_jax.models import families, generator, lpips, vit
from gigatok_jax.training import loop
from gigatok_jax.training.generator import GeneratorRun, GeneratorTask, refuse_own
from gigatok_jax.training.task import RunConfig, Task
from gigatok_jax.training.tokenizer import Frozen, TokenizerTask

IMAGENET_CLASSES = 1_000  # assumed where a run leaves the number to its data


@dataclasses.dataclass(frozen=True)
class Program:
    trace: Callable[[], jax.stages.Traced]  # for the devices of the mesh; nothing is allocated
    parts: Mapping[str, Any]  # shapes of the arguments that stay in memory between calls, by name

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of each part on one device."""
        return {name: device_bytes(part) for name, part in self.parts.items()}


def training(run: RunConfig, mesh: Mesh | AbstractMesh) -> Program:
    """The training step of a tokenizer or a generator, in its costliest phase.

    Raises:
      UserError: a teacher or a tokenizer that the run names is missing.
    """
    task, networks = abstract_task(run)
    state = loop.abstract_state(task, mesh)
    shardings = sharding.frozen_shardings(networks, mesh, shard=run.mesh.shard_frozen)
    networks = sharding.abstract(networks, shardings)
    array = functools.partial(ShapeDtypeStruct, sharding=sharding.batch_sharding(mesh))
    batch = {"label": array((run.batch_size,), jnp.int32)}
    if task.image_size:
        shape = (run.batch_size, task.image_size, task.image_size, 3)
        batch["image"] = array(shape, jnp.uint8)
    else:
        batch["codes"] = array((run.batch_size, run.model.codes), jnp.int32)
    parts = {
        "parameters": state.params,
        "optimizer": state.optimizer,
        "average": state.average,
        "discriminator": (
            getattr(state, "discriminator", None),
            getattr(state, "discriminator_optimizer", None),
        ),
        "frozen networks": networks,
        "batch": batch,
    }
    step, phase = loop.jit_step(task, state, mesh), task.phase(run.total_steps - 1)
    trace = functools.partial(step.trace, state, batch, networks, phase=phase)
    return Program(trace, {name: part for name, part in parts.items() if jax.tree.leaves(part)})


def abstract_task(run: RunConfig) -> tuple[Task, Any]:
    """A run's task, and the shapes of its frozen networks, or None; no weights are read.

    Raises:
      UserError: a teacher or a tokenizer that the run names is missing.
    """
    if isinstance(run, GeneratorRun):
        run = run.for_classes(IMAGENET_CLASSES)
        if run.data.source == "codes" or not run.tokenizer:  # without a tokenizer, plan for codes
            return GeneratorTask(run), None
        refuse_own(run.tokenizer)
        config = bundles.load_config(
            run.tokenizer, families.KINDS, families.KINDS, where="config.tokenizer"
        )
        return GeneratorTask(run, config), families.param_shapes(config)
    objective, config, networks = run.objective, None, {}
    if objective.needs_teacher:
        config = frozen_networks.architecture(objective.teacher)
        networks["teacher"] = vit.param_shapes(dataclasses.replace(config, grid=run.model.grid))
    task = TokenizerTask(run, config)
    if objective.needs_lpips:
        networks["lpips"] = lpips.param_shapes()
    if objective.needs_dino:
        networks["dino"] = vit.param_shapes(task.dino)
    return task, Frozen(**networks)


def sampling_codes(run: GeneratorRun, mesh: Mesh | AbstractMesh) -> Program:
    """Sampling codes for `run.batch_size` images, with the options in `run.sampling`."""
    run = run.for_classes(IMAGENET_CLASSES)
    shapes = generator.param_shapes(run.model)
    whole, shared = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = sharding.abstract(shapes, jax.tree.map(lambda _: whole, shapes))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), run.batch_size))
    keys = ShapeDtypeStruct(keys.shape, keys.dtype, sharding=shared)
    classes = ShapeDtypeStruct(keys.shape, jnp.int32, sharding=shared)

    @jax.jit
    def sample(params, classes, keys):
        dtype = jnp.dtype(run.dtype)
        with sharding.use(mesh):
            return sampling.sample(run.model, params, classes, keys, run.sampling, dtype)

    trace = functools.partial(sample.trace, params, classes, keys)
    return Program(trace, {"parameters": params, "batch": classes})


def build(run: RunConfig, mesh: Mesh | AbstractMesh, job: str) -> Program:
    return {"train": training, "sample": sampling_codes}[job](run, mesh)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of `ShapeDtypeStruct`s on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
