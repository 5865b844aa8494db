"""Shared by all training tasks: configuration of a run, interface of a task, accumulation.

A *run* is a configuration. A *task* turns it into pure functions of arrays (`init`, `step`,
`measure`) and knows what is specific to it: frozen networks, pictures, bundle. `training.loop` does
the rest, in the same way for every task.
"""

import collections
from collections.abc import Callable, Hashable, Mapping
import copy
import dataclasses
import math
from typing import Annotated, Any, Literal, NamedTuple

from einops import rearrange
import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gigatok_jax import distributed, sharding
from gigatok_jax.config import Names, configclass
from gigatok_jax.data import pipeline
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training import optimizer
from gigatok_jax.training.checkpoints import Commit
from gigatok_jax.training.optimizer import OptimizerConfig

Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@configclass
class LoopConfig:
    """How often things happen, in steps, and where the run is watched."""

    log_every: PositiveInt = 50  # metrics, averaged since the previous log
    evaluate_every: NonNegativeInt = 5_000  # held-out metrics and pictures; 0: only at the end
    checkpoint_every: NonNegativeInt = 5_000  # what resuming starts from; 0: only at the end
    keep_last: PositiveInt = 2  # number of newest checkpoints to keep
    keep_every: NonNegativeInt = 0  # also keep checkpoints at multiples of this; 0: none
    # How a checkpoint becomes complete: "rename", or "file" on file systems where a folder cannot
    # be renamed at once, such as buckets mounted by FUSE. Paths with gs:// always use "file".
    commit: Commit = "rename"
    # What shows the metrics, besides metrics.jsonl; () for nothing. The extras have the libraries.
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    profile_at: NonNegativeInt = 0  # first step of a trace for TensorBoard and XProf; 0: none
    profile_steps: PositiveInt = 3  # length of the trace

    @model_validator(mode="after")
    def _check_trackers(self):
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers: expected each at most once, got {self.trackers}")
        return self


@configclass(kw_only=True)
class RunConfig:
    """Settings shared by all training runs."""

    data: DataConfig = DataConfig()  # images to train on, and those to evaluate with
    optimizer: OptimizerConfig = OptimizerConfig()  # algorithm, learning rate, weight decay
    loop: LoopConfig = LoopConfig()  # how often to log, evaluate and save
    mesh: MeshConfig = MeshConfig()  # how the devices share the work
    epochs: PositiveFloat = 100.0  # length of the run, unless `steps` is set
    # Images of an epoch: as many as ImageNet has, whatever the data.
    epoch_images: PositiveInt = 1_280_000
    steps: NonNegativeInt = 0  # length of the run; 0: from `epochs` and `batch_size`
    batch_size: PositiveInt = 128  # images per step, over all devices
    # Process each batch in this many parts, one after the other, to save memory. Batch statistics
    # (entropy loss, the discriminator's BatchNorm) are then those of each part.
    accumulate: PositiveInt = 1
    seed: Seed = 0  # of initial weights, order, crops and all else that is random
    average_decay: Decay = 0.0  # moving average of weights; 0: none
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of computation; "auto": bfloat16, on CPUs float32
    )
    # Activations to recompute in the backward pass: "dots" keeps only products with weights, which
    # is mostly faster than storing everything; "full" recomputes everything inside a block.
    remat: Literal["none", "dots", "full"] = "dots"
    evaluation_images: PositiveInt = 512  # held-out images per evaluation
    # Bundle whose weights the run starts from, with a fresh optimizer; not read on resuming.
    init_from: str = ""
    freeze: Names = ()  # parts of the model that are not trained, such as "encoder"

    @model_validator(mode="after")
    def _check_lengths(self):
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of batch_size={self.batch_size}, got "
                f"{self.accumulate}"
            )
        if self.resolved_optimizer.warmup_steps >= self.total_steps:
            raise ValueError(
                f"optimizer.warmup_steps: expected fewer than the run's {self.total_steps} steps, "
                f"got {self.resolved_optimizer.warmup_steps}{self._warmup_origin}"
            )
        if self.loop.profile_at > self.total_steps:
            raise ValueError(
                f"loop.profile_at: expected at most the run's {self.total_steps} steps, got "
                f"{self.loop.profile_at}"
            )
        return self

    @model_validator(mode="after")
    def _check_fine_tuning(self):
        if self.init_from and not self.parts:
            raise ValueError(f"init_from: expected '' in a {self.task}, got {self.init_from!r}")
        for part in self.freeze:
            if part not in self.parts:
                known = ", ".join(self.parts) or "none"
                raise ValueError(f"freeze: {part!r}: no such part; known: {known}")
        if self.freeze and self.parts.keys() <= set(self.freeze):
            raise ValueError("freeze: expected to leave a part to train, got all of them")
        return self

    @property
    def _warmup_origin(self) -> str:
        if self.optimizer.warmup_steps is not None:
            return ""
        return f" (warmup_epochs={self.optimizer.warmup_epochs:g} of {self.epoch_images:,} images)"

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """What `freeze` may name: parts of the model, and their first-level names in parameters."""
        return {}

    def trained(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters without the parts that are frozen."""
        frozen = {name for part in self.freeze for name in self.parts[part]}
        return {name: value for name, value in params.items() if name not in frozen}

    @property
    def total_steps(self) -> int:
        return self.steps or math.ceil(self.epochs * self.epoch_images / self.batch_size)

    @property
    def resolved_optimizer(self) -> OptimizerConfig:
        return self.optimizer.resolve(self.batch_size, self.epoch_images)

    def open_task(self) -> "Task":
        """Creates the run's task, and reads its frozen networks from disk.

        Raises:
          UserError: weights are missing or do not fit the configuration.
        """
        raise NotImplementedError


class BundleContent(NamedTuple):
    """The arguments of `bundles.save` that depend on the task."""

    kind: str
    config: Any
    weights: Any
    made_by: dict[str, Any]


class Task:
    """One kind of training.

    Attributes:
      run: the configuration.
      frozen: arrays that each step receives besides the state, or None.
      image_size: side of the images in a batch, in pixels; 0 for stored codes.
      identity: JSON values by name that must be equal in a checkpoint and the run that resumes
        from it.
      class_names: of the data, by label.
      data_version: of the training data, see `sources.Source`.
      branch: workdir and step of another run to start from, or None.
      provenance: of the weights that the run started from, see `finetuning.Given`.
    """

    run: RunConfig
    frozen: Any = None
    image_size: int = 0
    identity: Mapping[str, Any] = {}
    class_names: tuple[str, ...] = ()
    data_version: str = ""
    branch: tuple[str, int] | None = None
    provenance: Mapping[str, str] = {}

    def init(self, key: jax.Array) -> Any:
        """A fresh state; parameters carry their logical axes until `nn.meta.unbox`."""
        raise NotImplementedError

    def phase(self, step: int) -> Hashable:
        """Key of the compilation of `step` that step number `step` runs."""
        return None

    def step(
        self, state: Any, batch: Mapping[str, jax.Array], frozen: Any, phase: Hashable
    ) -> tuple[Any, dict[str, jax.Array]]:
        """One update: the next state, and scalar metrics."""
        raise NotImplementedError

    def without_remat(self) -> "Task":
        """This task with a `step` that recomputes nothing: its FLOPs are those of the model."""
        plain = copy.copy(self)
        plain.run = dataclasses.replace(self.run, remat="none")
        return plain

    def norms(self, state: Any, phase: Hashable) -> dict[str, jax.Array]:
        """Norms of what is trained, for the log; `phase` is that of the last step."""
        return {"parameter_norm": optimizer.global_norm(self.run.trained(state.params))}

    def measure(
        self, state: Any, batch: Mapping[str, jax.Array], frozen: Any
    ) -> tuple[dict[str, jax.Array], Any]:
        """Held-out metrics of each image, `[B]` by name, and arrays for `pictures`."""
        raise NotImplementedError

    def pictures(self, state: Any, shown: Any, frozen: Any, mesh: Any) -> dict[str, np.ndarray]:
        """Pictures uint8 `[H, W, 3]`; `shown` is what `measure` returned for the first batch."""
        return {}

    def advise(self, row: Mapping[str, float]) -> str | None:
        """A warning about the logged metrics, or None."""
        return None

    def bundle(self, state: Any) -> BundleContent:
        """Content of the run's bundle."""
        raise NotImplementedError

    def set_data(self, batches: pipeline.Batches) -> None:
        """Takes what a task needs to know of its training data, before `init`.

        Raises:
          UserError: the data do not fit the model.
        """
        self.class_names = tuple(batches.class_names)
        self.data_version = batches.version() if distributed.is_main() else ""

    def made_by(self, state: Any) -> dict[str, Any]:
        """The provenance of the run's bundle, as JSON values."""
        return {
            "run": dataclasses.asdict(self.run),
            "step": int(state.step),
            "data": {"version": self.data_version, "class_names": list(self.class_names)},
            **self.provenance,
        }


def update(
    run: RunConfig, params: Any, gradients: Any, optimizer_state: Any, average: Any, step: jax.Array
) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
    """One optimizer step: new parameters, optimizer state and average, and metrics.

    All but `params` are those of `run.trained`.
    """
    config, trained = run.resolved_optimizer, run.trained(params)
    algorithm = optimizer.make_optimizer(config, run.total_steps)
    gradients = sharding.row_major_gradients(gradients)
    updates, optimizer_state = algorithm.update(gradients, optimizer_state, trained)
    trained = optax.apply_updates(trained, updates)
    if run.average_decay:
        average = optimizer.moving_average(average, trained, run.average_decay, step)
    metrics = {
        "gradient_norm": optimizer.global_norm(gradients),  # before clipping
        "learning_rate": optimizer.learning_rate(config, run.total_steps)(step),
    }
    return params | trained, optimizer_state, average, metrics


def split(batch: Any, parts: int) -> Any:
    """A pytree of `[B, ...]` as `[parts, B / parts, ...]`.

    Image i goes to part i mod `parts`: contiguous parts would each lie on a few devices only.
    """
    return jax.tree.map(lambda x: rearrange(x, "(b p) ... -> p b ...", p=parts), batch)


def join(parts: Any) -> Any:
    """Undoes `split`."""
    return jax.tree.map(lambda x: rearrange(x, "p b ... -> (b p) ..."), parts)


def mean_gradients(
    loss: Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Any, Any]]],
    parts: int,
    params: Any,
    carry: Any,
    batch: Any,
    key: jax.Array,
) -> tuple[Any, dict[str, jax.Array], Any, Any]:
    """Gradient of a loss over a batch, computed in parts, one after the other.

    Args:
      loss: function of `(params, carry, part, key)` that returns a scalar and `(metrics, carry,
        outputs)`: metrics are means over the part, `carry` is passed to the next part (running
        statistics), and outputs have a leading batch axis.
      parts: number of parts.
      params: the arrays to differentiate.
      carry: what the first part receives.
      batch: pytree of arrays `[B, ...]`, B a multiple of `parts`.
      key: random key; each part gets its own.

    Returns:
      Gradients and metrics (means over all parts), the last carry, and outputs `[B, ...]` in the
      batch's order.
    """
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        gradients, (metrics, carry, outputs) = gradient(params, carry, batch, key)
        return gradients, metrics, carry, outputs

    def add(state, part):
        totals, carry = state
        gradients, (metrics, carry, outputs) = gradient(params, carry, *part)
        return (jax.tree.map(jnp.add, totals, (gradients, metrics)), carry), outputs

    divided = (split(batch, parts), jax.random.split(key, parts))
    # The scan needs the shapes of gradients and metrics for its initial totals.
    first = jax.tree.map(lambda x: x[0], divided)
    gradients, (metrics, _, _) = jax.eval_shape(gradient, params, carry, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradients, metrics))
    (totals, carry), outputs = jax.lax.scan(add, (zeros, carry), divided)
    gradients, metrics = jax.tree.map(lambda x: x / parts, totals)
    return gradients, metrics, carry, join(outputs)


class HeldOut:
    """Evaluates a task on its run's held-out images."""

    def __init__(self, task: Task, mesh: jax.sharding.Mesh):
        self._task, self._mesh, run = task, mesh, task.run
        shardings = (sharding.batch_sharding(mesh), sharding.replicated(mesh))

        def measure(state, batch, frozen):
            with sharding.use(mesh):
                values, arrays = task.measure(state, batch, frozen)
            return values, (arrays, batch["valid"])

        self._measure = jax.jit(measure, out_shardings=shardings)
        self._batches = pipeline.eval_batches(
            run.data, task.image_size, run.batch_size, *sharding.batch_block(mesh), shuffled=True
        )

    def __call__(self, state: Any, frozen: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Means of the held-out metrics, and pictures.

        Raises:
          UserError: none of the images can be read.
        """
        shown = None

        def measure(batch):
            nonlocal shown
            batch = sharding.put_batch(self._mesh, batch)
            values, arrays = self._measure(state, batch, frozen)
            shown = arrays if shown is None else shown
            return jax.tree.map(sharding.local_block, values)

        self._batches.set_state({"next_batch": 0})
        with self._batches:
            means = held_out_means(measure, self._batches, self._task.run.evaluation_images)
        arrays, valid = jax.device_get(shown)
        # Fewer images than a batch are followed by black ones.
        arrays = tuple(array[valid[: len(array)]] for array in arrays)
        pictures = self._task.pictures(state, arrays, frozen, self._mesh)
        return {f"held_out/{name}": value for name, value in means.items()}, pictures


def held_out_means(
    measure: Callable[[dict[str, np.ndarray]], Mapping[str, Any]],
    batches: Any,
    images: int,
) -> dict[str, float]:
    """Means over the first `images` readable images, over all processes.

    Args:
      measure: maps this process's arrays ("image" or "codes", "label" and "valid") to the values of
        each image, `[B/P]` by name.
      batches: this process's batches, see `pipeline.eval_batches`.
      images: maximum number of images.

    Raises:
      UserError: none of the images can be read.
    """
    sums, count = collections.Counter(), 0
    for batch in batches:
        values = measure({k: batch[k] for k in ("image", "codes", "label", "valid") if k in batch})
        rows = {name: np.asarray(value, np.float64) for name, value in values.items()}
        gathered = distributed.gather_rows(rows | {k: batch[k] for k in ("index", "valid")})
        # Sort by index, so that the mean does not depend on which process read which image. Drop
        # duplicates, because processes along the `tensor` axis read the same block.
        index, first = np.unique(gathered["index"], return_index=True)
        keep = first[gathered["valid"][first] & (index >= 0)][: images - count]
        for name in rows:
            sums[name] += float(gathered[name][keep].sum())
        count += len(keep)
        if count >= images:
            break
    if not count:
        raise UserError("none of the held-out images can be read")
    return {name: total / count for name, total in sums.items()}
