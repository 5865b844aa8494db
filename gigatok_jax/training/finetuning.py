"""Fine-tuning: a run that starts from the weights of a bundle (`init_from`).

All weights are taken over as they are, but for what depends on the size of the images, the number
of codes or that of classes. Position tables are resized. Where the number of classes differs, each
class starts as the null class, so that the run starts as an unconditional generator. What the
bundle lacks starts afresh: a discriminator always, a projector if its `semantic_dim` differs.
"""

import dataclasses
import logging
import math
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax import bundles, sharding
from gigatok_jax.errors import UserError
from gigatok_jax.models import vit
from gigatok_jax.training.task import RunConfig, Task

logger = logging.getLogger(__name__)

# Fields of `config.model` that may differ from the bundle's.
FREE = {
    "tokenizer": {
        *("image_size", "latents"),  # sizes of position tables
        *("semantic_layer", "semantic_dim"),
        *("dropout", "gradient", "init"),  # matter in training only
    },
    "generator": {"codes", "classes", "dropout"},
}


class Given(NamedTuple):
    """What a run takes over from a bundle."""

    weights: dict[str, Any]  # NumPy arrays: "params", perhaps without some parts, and "history"
    provenance: dict[str, str]  # for `made_by`: the bundle's fingerprint; `Bundle.codes_of`


def read(task: Task) -> Given:
    """Reads the bundle that `task.run.init_from` names, and fits it to the run's architecture.

    Raises:
      UserError: the bundle is missing or damaged, or its architecture is another.
    """
    run = task.run
    bundle = bundles.load(run.init_from, run.task, type(run.model), where="config.init_from")
    theirs = bundle.config
    _check_architecture(run, theirs)
    shapes = flatten_dict(bundles.CONTENT[type(run.model)](run.model)["params"])
    found = flatten_dict(bundle.weights["params"])
    notes = []
    if run.task == "tokenizer" and run.model.semantic_dim != theirs.semantic_dim:
        found = {path: array for path, array in found.items() if path[0] != "projector"}
        if run.model.semantic_dim:
            notes.append(f"its semantic_dim is {theirs.semantic_dim}: fresh projector")
    params = {
        path: _fit(path[-1], found[path], shape.shape[0])
        for path, shape in shapes.items()
        if path in found
    }
    changed = [path for path, array in params.items() if array.shape != found[path].shape]
    for path in changed:
        how = "as the null class" if path[-1] == "class_embedding" else "resized"
        rows = f"{len(found[path])} to {len(params[path])} rows"
        notes.append(f"{'/'.join(path)} {how}, {rows}")
    made_for = bundle.made_by.get("tokenizer")
    if made_for and task.identity.get("tokenizer") not in (None, made_for):
        notes.append("it was trained on the codes of another tokenizer")
    logger.info("starting from %s%s", run.init_from, "".join(f"; {note}" for note in notes))
    provenance = {"started_from": bundle.fingerprint}
    makes_codes = {"encoder", "quantizer"} & run.parts.keys()
    if makes_codes and makes_codes <= set(run.freeze) and not changed:
        provenance["codes_of"] = bundle.codes_of
    return Given(bundle.weights | {"params": unflatten_dict(params)}, provenance)


def _check_architecture(run: RunConfig, theirs: Any) -> None:
    ours, theirs = (flatten_dict(dataclasses.asdict(x), sep=".") for x in (run.model, theirs))
    for name, value in ours.items():
        if name not in FREE[run.task] and value != theirs[name]:
            raise UserError(
                f"config.model.{name}: expected {theirs[name]!r}, as in {run.init_from}, got "
                f"{value!r}"
            )


def _fit(name: str, array: np.ndarray, rows: int) -> np.ndarray:
    """An array of the bundle, with the number of rows that the run needs."""
    if len(array) == rows:
        return array
    if name == "grid_positions":
        return vit.resize_positions(array, math.isqrt(rows))
    if name == "class_embedding":
        return np.repeat(array[-1:], rows, axis=0)  # the last row is the null class
    first = 1 if name == "positions" else 0  # a generator's first position is the class
    return np.concatenate([array[:first], _resize_linear(array[first:], rows - first)])


def _resize_linear(table: np.ndarray, rows: int) -> np.ndarray:
    shape, highest = (rows, table.shape[1]), jax.lax.Precision.HIGHEST
    return np.asarray(jax.image.resize(table, shape, "linear", precision=highest))


def adopt(state: Any, given: Given) -> Any:
    """A fresh state with the weights of a bundle, as sharded as they were."""

    def put(arrays, like):
        return sharding.put(arrays, jax.tree.map(lambda array: array.sharding, like))

    weights = given.weights
    own = {name: state.params[name] for name in weights["params"]}
    params = state.params | put(weights["params"], own)
    if state.average is not None:
        copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        state = state.replace(average=copy({name: params[name] for name in state.average}))
    if "history" in weights:
        state = state.replace(history=put(weights["history"], state.history))
    return state.replace(params=params)
