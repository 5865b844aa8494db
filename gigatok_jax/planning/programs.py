"""A run's programs as shapes: what the loop compiles, with nothing allocated."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
from jax import ShapeDtypeStruct
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
import numpy as np

from gigatok_jax import bundles, sampling, sharding
from gigatok_jax.models import vit
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.training import loop
from gigatok_jax.training.generator_run import GeneratorRun
from gigatok_jax.training.run import RunConfig
from gigatok_jax.training.tokenizer import Frozen
from gigatok_jax.training.tokenizer_run import TokenizerRun
from gigatok_jax.weights import convert


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the shapes and shardings that it is compiled for.

    Attributes:
      jitted: what is compiled.
      plain: the same computation, to be traced where there is no mesh.
      arguments: arrays as `ShapeDtypeStruct`s with shardings.
      static: arguments by name that are not arrays.
      parts: what lies in memory between two calls, by name; all of it is among the arguments.
    """

    jitted: Callable
    plain: Callable
    arguments: tuple[Any, ...]
    static: Mapping[str, Any]
    parts: Mapping[str, Any]

    def trace(self) -> Any:
        """The jaxpr, of all devices together."""
        return jax.make_jaxpr(lambda *x: self.plain(*x, **self.static))(*self.arguments).jaxpr

    def lower(self) -> jax.stages.Lowered:
        """The program for its mesh's devices, ready to be compiled."""
        return self.jitted.lower(*self.arguments, **self.static)


def training(run: RunConfig, mesh: Mesh | AbstractMesh) -> Program:
    """The step of a tokenizer's or generator's training, in its costliest phase.

    Raises:
      UserError: a teacher or a tokenizer that the run names is not there.
    """
    functions, frozen = task(run)
    state = loop.abstract_state(functions, mesh)
    shardings = sharding.frozen_shardings(frozen, mesh, shard=run.mesh.shard_frozen)
    frozen = sharding.abstract(frozen, shardings)
    batch = _batch(run, functions, mesh)
    parts = {
        "parameters": state.params,
        "optimizer": state.optimizer,
        "average": state.average,
        "discriminator": (
            getattr(state, "discriminator", None),
            getattr(state, "discriminator_optimizer", None),
        ),
        "frozen networks": frozen,
        "batch": batch,
    }
    return Program(
        loop.jit_step(functions, state, mesh),
        functions.step,
        (state, batch, frozen),
        {"phase": functions.phase(run.total_steps - 1)},
        {name: part for name, part in parts.items() if jax.tree.leaves(part)},
    )


def task(run: RunConfig) -> tuple[loop.Training, Any]:
    """The pure functions of a run, and the shapes of its frozen networks, or None.

    Raises:
      UserError: a teacher or a tokenizer that it names is not there.
    """
    return _TASKS[type(run)](run)


def drawing(run: GeneratorRun, mesh: Mesh | AbstractMesh) -> Program:
    """The drawing of `run.batch_size` images' codes, as `run.sampling` says."""
    whole, shared = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    params = jax.tree.map(
        lambda leaf: ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
        convert.generator_shapes(run.model),
    )
    rows = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), run.batch_size))
    batch = (
        ShapeDtypeStruct(rows.shape, jnp.int32, sharding=shared),
        ShapeDtypeStruct(rows.shape, rows.dtype, sharding=shared),
    )

    def draw(params, classes, keys):
        return sampling.sample(run.model, params, classes, keys, run.sampling, jnp.dtype(run.dtype))

    parts = {"parameters": params, "batch": batch[:1]}
    return Program(jax.jit(draw), draw, (params, *batch), {}, parts)


BUILDERS = {"train": training, "sample": drawing}


def _tokenizer(run: TokenizerRun):
    """Its training's functions, and the shapes of its frozen networks."""
    objective, config, frozen = run.objective, None, {}
    if objective.needs_teacher:
        config = frozen.architecture(objective.teacher)
        shapes = convert.vit_shapes(config)
        rows = run.model.grid**2 + config.class_token
        positions = ShapeDtypeStruct((rows, config.width), jnp.float32)
        frozen["teacher"] = shapes | {"positions": positions}
    if objective.needs_lpips:
        frozen["lpips"] = convert.lpips_shapes()
    if objective.needs_dino:
        frozen["dino"] = convert.vit_shapes(vit.DINO["dino_vits16"])
    return run.training(config), Frozen(**frozen)


def _generator(run: GeneratorRun):
    """Without `run.tokenizer` its batches are codes."""
    if run.data.source == "codes" or not run.tokenizer:
        return run.training(None), None
    config = bundles.load_config(run.tokenizer, "tokenizer", TokenizerConfig)
    return run.training(config), convert.tokenizer_shapes(config)


_TASKS = {TokenizerRun: _tokenizer, GeneratorRun: _generator}


def _batch(run: RunConfig, functions, mesh) -> dict[str, ShapeDtypeStruct]:
    shared = sharding.batch_sharding(mesh)
    struct = functools.partial(ShapeDtypeStruct, sharding=shared)
    batch = {"label": struct((run.batch_size,), jnp.int32)}
    tokenizer = run.model if isinstance(run, TokenizerRun) else functions.tokenizer
    if tokenizer is None:
        return batch | {"codes": struct((run.batch_size, run.model.codes), jnp.int32)}
    size = tokenizer.image_size
    return batch | {"image": struct((run.batch_size, size, size, 3), jnp.uint8)}


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of `ShapeDtypeStruct`s on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
