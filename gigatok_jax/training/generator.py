"""Training of a generator: state, loss and step."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gigatok_jax import pictures
from gigatok_jax.models import layers
from gigatok_jax.models.generator import Generator, GeneratorConfig
from gigatok_jax.models.tokenizer import Tokenizer, TokenizerConfig
from gigatok_jax.training import losses, optimizer
from gigatok_jax.training.accumulation import mean_gradients
from gigatok_jax.training.optimizer import OptimizerConfig


@flax.struct.dataclass
class GeneratorState:
    """All that a run needs to go on, but for the data's position.

    Attributes:
      step: updates made so far.
      key: data of the random key from which each step folds its own.
      params, optimizer: of the generator.
      average: moving average of `params`, or None.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    optimizer: Any
    average: Any


@dataclasses.dataclass(frozen=True)
class GeneratorTraining:
    """The pure functions of a generator's training.

    Attributes:
      model: the generator's architecture.
      optimizer: AdamW and its schedule.
      steps: length of the schedule.
      class_dropout: share of the images whose class is hidden.
      accumulate: parts that a batch is divided into, one after the other.
      average_decay: of the moving average of the weights; 0 keeps none.
      remat: see `gigatok_jax.models.layers.remat`.
      dtype: type of the computation.
      tokenizer: architecture of the tokenizer that encodes images, where batches hold images.
    """

    model: GeneratorConfig
    optimizer: OptimizerConfig
    steps: int
    class_dropout: float = 0.1
    accumulate: int = 1
    average_decay: float = 0.0
    remat: str = "none"
    dtype: layers.Dtype = jnp.float32
    tokenizer: TokenizerConfig | None = None

    def init(self, key: jax.Array) -> GeneratorState:
        """A fresh state; parameters carry their logical axes until `nn.meta.unbox`."""
        params_key, step_key = jax.random.split(key)
        none = jnp.zeros((1, 0), jnp.int32)
        params = Generator(self.model).init(params_key, none, jnp.zeros(1, jnp.int32))["params"]
        return GeneratorState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(step_key),
            params=params,
            optimizer=optimizer.optimizer(self.optimizer, self.steps).init(params),
            average=jax.tree.map(jnp.copy, params) if self.average_decay else None,
        )

    def phase(self, step: int) -> None:
        """All steps are one compilation."""
        del step

    def step(
        self, state: GeneratorState, batch: Mapping[str, jax.Array], frozen: Any, phase: None
    ) -> tuple[GeneratorState, dict[str, jax.Array]]:
        """One update.

        Args:
          state: before the update.
          batch: "label", int32 `[B]`, and "codes", int32 `[B, N]`, or "image", uint8
            `[B, H, W, 3]`.
          frozen: the tokenizer's parameters, or None.
          phase: see `phase`.

        Returns:
          The next state, and scalars: the mean cross entropy `total`, the gradient's norm before
          clipping, the norm of the new parameters, the learning rate.
        """
        del phase
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        data = (self.codes(batch, frozen), batch["label"])
        gradients, metrics, _, _ = mean_gradients(
            self._loss, self.accumulate, state.params, None, data, key
        )
        adamw = optimizer.optimizer(self.optimizer, self.steps)
        updates, optimizer_state = adamw.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if self.average_decay:
            average = optimizer.moving_average(average, params, self.average_decay, state.step)
        metrics |= {
            "gradient_norm": optax.tree.norm(gradients),
            "parameter_norm": optax.tree.norm(params),
            "learning_rate": optimizer.schedule(self.optimizer, self.steps)(state.step),
        }
        state = state.replace(
            step=state.step + 1, params=params, optimizer=optimizer_state, average=average
        )
        return state, metrics

    def validation_loss(
        self, params: Any, batch: Mapping[str, jax.Array], frozen: Any
    ) -> jax.Array:
        """See the function of this name."""
        codes = self.codes(batch, frozen)
        return validation_loss(self.model, params, codes, batch["label"], self.dtype)

    def codes(self, batch: Mapping[str, jax.Array], frozen: Any) -> jax.Array:
        """The batch's codes, int32 `[B, N]`, by the frozen tokenizer where it holds images."""
        return batch_codes(batch, self.tokenizer, frozen, self.dtype)

    def decode(self, frozen: Any, codes: jax.Array) -> jax.Array:
        """The tokenizer's images of codes `[B, N]`, uint8 `[B, H, W, 3]`."""
        module = Tokenizer(self.tokenizer, dtype=self.dtype)
        return pictures.to_uint8(module.apply({"params": frozen}, codes, method=Tokenizer.decode))

    def _loss(self, params, carry, data, key):
        """In the form that `accumulation.mean_gradients` takes."""
        codes, labels = data
        class_key, dropout_key = jax.random.split(key)
        hidden = jax.random.bernoulli(class_key, self.class_dropout, labels.shape)
        classes = jnp.where(hidden, self.model.null_class, labels)
        module = Generator(self.model, train=True, remat=self.remat, dtype=self.dtype)
        rngs = {"dropout": dropout_key}
        logits = module.apply({"params": params}, codes[:, :-1], classes, rngs=rngs)
        value = losses.cross_entropy(logits, codes).mean()
        return value, ({"total": value}, carry, None)


def batch_codes(
    batch: Mapping[str, jax.Array],
    tokenizer: TokenizerConfig | None,
    params: Any,
    dtype: layers.Dtype = jnp.float32,
) -> jax.Array:
    """A batch's "codes", int32 `[B, N]`, or those of its "image", encoded by the tokenizer."""
    if "codes" in batch:
        return batch["codes"]
    images = pictures.to_float(batch["image"])
    module = Tokenizer(tokenizer, dtype=dtype)
    return module.apply({"params": params}, images, method=Tokenizer.encode)


def validation_loss(
    model: GeneratorConfig,
    params: Any,
    codes: jax.Array,
    labels: jax.Array,
    dtype: layers.Dtype = jnp.float32,
) -> jax.Array:
    """Mean cross entropy of each image's codes, the class given, float32 `[B]` (paper, 3.1).

    Args:
      model: the generator's architecture.
      params: its parameters.
      codes: int32 `[B, N]`.
      labels: int32 `[B]`.
      dtype: type of the computation.
    """
    logits = Generator(model, dtype=dtype).apply({"params": params}, codes[:, :-1], labels)
    return losses.cross_entropy(logits, codes).mean(-1)


def params_for_use(state: GeneratorState) -> Any:
    """The averaged weights where there are some, else the last."""
    return state.params if state.average is None else state.average
