"""A linear probe of a frozen network's features (paper, 3.1 and appendix F)."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gigatok_jax import bundles, pictures
from gigatok_jax.config import configclass
from gigatok_jax.data import codes as stored
from gigatok_jax.errors import UserError
from gigatok_jax.models import families, layers
from gigatok_jax.models.generator import Generator, GeneratorConfig
from gigatok_jax.models.norms import BatchNorm
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.training import losses, task
from gigatok_jax.training.generator import batch_codes, check_tokenizer, refuse_own
from gigatok_jax.training.optimizer import OptimizerConfig, make_optimizer
from gigatok_jax.training.task import BundleContent, RunConfig, Task


@configclass(kw_only=True)
class LinearProbeRun(RunConfig):
    """A linear probe's run; the recipe is that of MAE's linear probing."""

    optimizer: OptimizerConfig = OptimizerConfig(
        algorithm="lars", rate=None, final_rate=0.0, warmup_epochs=10.0, weight_decay=0.0, clip=0.0
    )
    task: Literal["linear_probe"] = "linear_probe"  # kind of the run
    epochs: PositiveFloat = 90.0
    batch_size: PositiveInt = 16_384
    evaluation_images: PositiveInt = 50_000
    # Images per pass of the frozen network, over all devices; must divide a larger batch_size.
    feature_batch_size: PositiveInt = 1_024
    # Features to probe, averaged over tokens. "generator": the output of one of its layers for the
    # null class and all codes but the last (paper, 3.1). "encoder": the encoder transformer's
    # output after its last LayerNorm, of width W (appendix F). "latents": before the quantizer, of
    # width D. "decoder": the output of a layer of the decoder transformer.
    features: Literal["generator", "encoder", "latents", "decoder"] = "generator"
    # Layer of the features, counted from 1. 0: the generator's middle layer, or the decoder's layer
    # of the semantic loss.
    layer: NonNegativeInt = 0
    tokenizer: str = ""  # bundle or workdir; not needed for a generator's features of stored codes
    generator: str = ""  # bundle or workdir, if its features are probed

    @model_validator(mode="after")
    def _check_probe(self):
        if self.average_decay:
            raise ValueError(f"average_decay: expected 0 in a probe, got {self.average_decay}")
        if self.accumulate != 1:
            raise ValueError(
                "accumulate: expected 1 in a linear probe, whose batches are divided by "
                f"feature_batch_size, got {self.accumulate}"
            )
        if self.batch_size > self.feature_batch_size and self.batch_size % self.feature_batch_size:
            raise ValueError(
                f"feature_batch_size: expected a divisor of batch_size={self.batch_size}, got "
                f"{self.feature_batch_size}"
            )
        return self

    def open_task(self) -> "LinearProbeTask":
        dtype = layers.compute_dtype(self.dtype)
        tokenizer = None
        if self.data.source != "codes" or self.features != "generator":
            if not self.tokenizer:
                raise UserError("config.tokenizer: expected a tokenizer's bundle or workdir")
            refuse_own(self.tokenizer)
            kinds = families.KINDS
            tokenizer = bundles.load(self.tokenizer, kinds, kinds, where="config.tokenizer")
        if self.features == "generator":
            probed = _generator_features(self, tokenizer, dtype)
        else:
            probed = _tokenizer_features(self, tokenizer, dtype)
        return LinearProbeTask(self, probed, tokenizer.config.image_size if tokenizer else 0)


@dataclasses.dataclass(frozen=True)
class Probed:
    """A frozen network and the features taken from it."""

    apply: Callable[[Any, Mapping[str, jax.Array]], jax.Array]  # frozen arrays, batch -> [B, W]
    width: int  # W
    frozen: Any = None
    description: str = ""
    fingerprint: str = ""


def _generator_features(run: LinearProbeRun, tokenizer, dtype) -> Probed:
    if not run.generator:
        raise UserError("config.generator: expected a generator's bundle or workdir")
    bundle = bundles.load(run.generator, "generator", GeneratorConfig, where="config.generator")
    config, made_by = bundle.config, bundle.made_by.get("tokenizer")
    if run.data.source == "codes":
        check_tokenizer(run.data.path, stored.STORE.find_info(run.data.path), config, made_by)
    else:
        check_tokenizer(run.tokenizer, tokenizer, config, made_by)
    layer = _chosen_layer(run, config.depth // 2, config.depth)
    module = Generator(config, dtype=dtype)
    encoder = tokenizer.config if tokenizer else None

    def apply(frozen, batch):
        codes = batch_codes(batch, encoder, frozen["tokenizer"], dtype)
        classes = jnp.full(len(codes), config.null_class)
        variables = {"params": frozen["generator"]}
        features = module.apply(variables, codes[:, :-1], classes, layer, method=Generator.features)
        return features.mean(1)

    return Probed(
        apply,
        config.width,
        frozen={
            "generator": bundle.weights["params"],
            "tokenizer": tokenizer.weights["params"] if tokenizer else None,
        },
        description=f"generator, output of layer {layer} of {config.depth}, width {config.width}",
        fingerprint=bundle.fingerprint,
    )


def _tokenizer_features(run: LinearProbeRun, tokenizer: bundles.Bundle, dtype) -> Probed:
    if run.data.source == "codes":
        raise UserError("config.data.source: expected images for a tokenizer's features")
    config, module = tokenizer.config, families.make(tokenizer.config, dtype)
    if run.features != "latents" and not isinstance(config, TokenizerConfig):
        raise UserError(
            f"config.features: expected generator or latents with a tokenizer of the family "
            f"{families.describe(config)}, got {run.features}"
        )
    if run.features == "decoder":
        layer = _chosen_layer(run, config.semantic_layer, config.decoder.depth)
        width, text = config.decoder.width, f"decoder, output of layer {layer}"
    elif run.layer:
        raise UserError(
            f"config.layer: the {run.features} features have no layers, got {run.layer}"
        )
    elif run.features == "encoder":
        method, width = "encoder_features", config.encoder.width
        text = "encoder, output after the last LayerNorm"
    else:
        method, width, text = "latents", config.code_dim, "latents before the quantizer"

    def apply(frozen, batch):
        variables = {"params": frozen["tokenizer"]}
        if run.features == "decoder":
            codes = batch_codes(batch, config, frozen["tokenizer"], dtype)
            features = module.apply(variables, codes, layer, method="decoder_features")
        else:
            features = module.apply(variables, pictures.to_float(batch["image"]), method=method)
        return features.mean(1)

    return Probed(
        apply,
        width,
        frozen={"tokenizer": tokenizer.weights["params"]},
        description=f"{text}, width {width}",
        fingerprint=tokenizer.fingerprint,
    )


def _chosen_layer(run: LinearProbeRun, default: int, depth: int) -> int:
    layer = run.layer or max(default, 1)
    if layer > depth:
        raise UserError(f"config.layer: expected 1 to {depth}, got {layer}")
    return layer


class LinearProbe(nn.Module):
    """BatchNorm without gain and bias (eps 1e-6), then a Linear: `[B, W]` to logits `[B, C]`."""

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
    """Everything that a run needs to resume, except its position in the data."""

    step: jax.Array  # updates made so far
    params: Any
    optimizer: Any
    batch_stats: Any  # running statistics of the features


class LinearProbeTask(Task):
    """The pure functions of a linear probe's training.

    Args:
      run: the configuration.
      probed: the frozen network.
      image_size: of the images that it sees, in pixels; 0 for stored codes.
      classes: number of classes, until `set_data` gives that of the data.
    """

    def __init__(
        self, run: LinearProbeRun, probed: Probed, image_size: int = 0, classes: int = 1_000
    ):
        self.run, self.probed, self.frozen = run, probed, probed.frozen
        self.image_size = image_size
        self.identity = {
            "kind of features": probed.description,
            "frozen network": probed.fingerprint,
        }
        self.module = LinearProbe(classes)

    def set_data(self, batches) -> None:
        super().set_data(batches)
        self.module = LinearProbe(len(self.class_names))
        self.identity = self.identity | {"list of classes": list(self.class_names)}

    def init(self, key: jax.Array) -> LinearProbeState:
        run = self.run
        features = jnp.zeros((2, self.probed.width))
        variables = self.module.init(key, features, train=True)
        lars = make_optimizer(run.resolved_optimizer, run.total_steps)
        return LinearProbeState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            optimizer=lars.init(variables["params"]),
            batch_stats=variables["batch_stats"],
        )

    def step(
        self,
        state: LinearProbeState,
        batch: Mapping[str, jax.Array],
        frozen: Any,
        phase: None = None,
    ) -> tuple[LinearProbeState, dict[str, jax.Array]]:
        """One update.

        Args:
          state: before the update.
          batch: input of the frozen network ("image" or "codes"), and "label", int32 `[B]`.
          frozen: the frozen networks.
          phase: unused; all steps run one compilation.

        Returns:
          The next state, and scalars: the mean cross entropy "total", the batch's "accuracy",
          norms, the learning rate.
        """
        features = jax.lax.stop_gradient(self._features(frozen, batch))
        labels = batch["label"]

        def loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updated = self.module.apply(
                variables, features, train=True, mutable=["batch_stats"]
            )
            return losses.cross_entropy(logits, labels).mean(), (logits, updated["batch_stats"])

        gradient = jax.value_and_grad(loss, has_aux=True)
        (value, (logits, batch_stats)), gradients = gradient(state.params)
        params, optimizer_state, _, more = task.update(
            self.run, state.params, gradients, state.optimizer, None, state.step
        )
        state = LinearProbeState(state.step + 1, params, optimizer_state, batch_stats)
        return state, {"total": value, "accuracy": jnp.mean(logits.argmax(-1) == labels)} | more

    def measure(self, state, batch, frozen):
        """Top-1 and top-5 accuracy and the loss of each image."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = self.module.apply(variables, self._features(frozen, batch), train=False)
        labels = batch["label"]
        # Number of classes with larger logits than the label's.
        rank = jnp.sum(logits > jnp.take_along_axis(logits, labels[:, None], 1), axis=1)
        values = {
            "accuracy": (rank == 0).astype(jnp.float32),
            "top5_accuracy": (rank < 5).astype(jnp.float32),
            "loss": losses.cross_entropy(logits, labels),
        }
        return values, ()

    def _features(self, frozen: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Features `[B, W]`, computed in parts: batches for LARS are too large for the network."""
        parts = math.ceil(len(batch["label"]) / self.run.feature_batch_size)
        if parts == 1:
            return self.probed.apply(frozen, batch)
        apply = functools.partial(self.probed.apply, frozen)
        return task.join(jax.lax.map(apply, task.split(batch, parts)))

    def bundle(self, state) -> BundleContent:
        weights = {"params": state.params, "batch_stats": state.batch_stats}
        made_by = self.made_by(state) | {"features": self.probed.description}
        return BundleContent("linear_probe", None, weights, made_by)
