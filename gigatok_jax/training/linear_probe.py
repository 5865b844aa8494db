"""Training of a linear probe: a frozen network's features to classes (paper, 3.1 and F)."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from gigatok_jax.models import layers
from gigatok_jax.models.norms import BatchNorm
from gigatok_jax.training import accumulation, losses, optimizer
from gigatok_jax.training.optimizer import OptimizerConfig


class LinearProbe(nn.Module):
    """BatchNorm without gain and bias (eps 1e-6), and a Linear: `[B, W]` to logits `[B, C]`."""

    classes: int

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
        x = BatchNorm(epsilon=1e-6, affine=False, name="norm")(features, train=train)
        return layers.dense(
            self.classes,
            ("embed", "vocab"),
            dtype=jnp.float32,
            kernel_init=nn.initializers.normal(0.01),
            name="head",
        )(x)


@flax.struct.dataclass
class LinearProbeState:
    """All that a run needs to go on, but for the data's position.

    Attributes:
      step: updates made so far.
      params, optimizer: of the head.
      batch_stats: running statistics of the features.
    """

    step: jax.Array
    params: Any
    optimizer: Any
    batch_stats: Any


@dataclasses.dataclass(frozen=True)
class LinearProbeTraining:
    """The pure functions of a probe's training.

    Attributes:
      features: frozen arrays and a batch to features, float32 `[B, W]`.
      width: W.
      classes: C.
      optimizer: LARS and its schedule.
      steps: length of the schedule.
      feature_batch_size: images at once through `features`; divides a larger batch.
    """

    features: Callable[[Any, Mapping[str, jax.Array]], jax.Array]
    width: int
    classes: int
    optimizer: OptimizerConfig
    steps: int
    feature_batch_size: int

    def init(self, key: jax.Array) -> LinearProbeState:
        """A fresh state; parameters carry their logical axes until `nn.meta.unbox`."""
        features = jnp.zeros((2, self.width))
        variables = LinearProbe(self.classes).init(key, features, train=True)
        return LinearProbeState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            optimizer=optimizer.optimizer(self.optimizer, self.steps).init(variables["params"]),
            batch_stats=variables["batch_stats"],
        )

    def phase(self, step: int) -> None:
        """All steps are one compilation."""
        del step

    def step(
        self, state: LinearProbeState, batch: Mapping[str, jax.Array], frozen: Any, phase: None
    ) -> tuple[LinearProbeState, dict[str, jax.Array]]:
        """One update.

        Args:
          state: before the update.
          batch: what `features` reads, and "label", int32 `[B]`.
          frozen: the frozen networks.
          phase: see `phase`.

        Returns:
          The next state, and scalars: the mean cross entropy `total`, the batch's accuracy, the
          gradient's norm, the learning rate.
        """
        del phase
        features = jax.lax.stop_gradient(self._features(frozen, batch))
        labels = batch["label"]

        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = LinearProbe(self.classes).apply(
                variables, features, train=True, mutable=["batch_stats"]
            )
            return losses.cross_entropy(logits, labels).mean(), (logits, updated["batch_stats"])

        (value, (logits, batch_stats)), gradients = jax.value_and_grad(loss, has_aux=True)(
            state.params
        )
        lars = optimizer.optimizer(self.optimizer, self.steps)
        updates, optimizer_state = lars.update(gradients, state.optimizer, state.params)
        metrics = {
            "total": value,
            "accuracy": jnp.mean(logits.argmax(-1) == labels),
            "gradient_norm": optax.tree.norm(gradients),
            "learning_rate": optimizer.schedule(self.optimizer, self.steps)(state.step),
        }
        state = LinearProbeState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer_state,
            batch_stats=batch_stats,
        )
        return state, metrics

    def judge(
        self, state: LinearProbeState, batch: Mapping[str, jax.Array], frozen: Any
    ) -> dict[str, jax.Array]:
        """Held-out "accuracy", "top5_accuracy" and "loss" of each image, float32 `[B]`."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        features = self._features(frozen, batch)
        logits = LinearProbe(self.classes).apply(variables, features, train=False)
        labels = batch["label"]
        rank = jnp.sum(logits > jnp.take_along_axis(logits, labels[:, None], 1), axis=1)
        return {
            "accuracy": (rank == 0).astype(jnp.float32),
            "top5_accuracy": (rank < 5).astype(jnp.float32),
            "loss": losses.cross_entropy(logits, labels),
        }

    def _features(self, frozen: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """`features` of a batch, part after part: LARS's batches are larger than a network's."""
        parts = -(-len(batch["label"]) // self.feature_batch_size)
        if parts == 1:
            return self.features(frozen, batch)
        divided = accumulation.divide(batch, parts)
        return accumulation.join(jax.lax.map(lambda part: self.features(frozen, part), divided))
