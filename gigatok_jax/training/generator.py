"""Training of a generator on a tokenizer's codes (paper, 4.2): configuration, step, evaluation."""

from collections.abc import Mapping
import dataclasses
import functools
import logging
import math
from typing import Annotated, Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gigatok_jax import bundles, distributed, imagenet, locate, pictures, sampling, sharding
from gigatok_jax.config import configclass, from_mapping
from gigatok_jax.data import codes as stored
from gigatok_jax.data.sources import missing_classes
from gigatok_jax.errors import UserError
from gigatok_jax.files import Path, as_path, read_json
from gigatok_jax.models import families, layers, quantizer
from gigatok_jax.models.generator import Generator, GeneratorConfig
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training import losses
from gigatok_jax.training.optimizer import OptimizerConfig, make_optimizer
from gigatok_jax.training.task import BundleContent, RunConfig, Task, mean_gradients, update

logger = logging.getLogger(__name__)

# Most logits that a device holds at a time: 2 GiB in bfloat16. They are those of 256 images of 256
# codes with a codebook of 16,384; only larger ones are computed in chunks. Smaller chunks would
# spend their time on reading the head's kernel and adding up its gradient.
CHUNK_ELEMENTS = 2**30
COLUMNS, ROWS = 8, 4  # of a picture of samples: classes, and samples per class


@configclass(kw_only=True)
class GeneratorRun(RunConfig):
    """A generator's training run."""

    model: GeneratorConfig  # architecture
    optimizer: OptimizerConfig = OptimizerConfig(
        schedule="warmup_stable_decay",
        warmup_epochs=1.0,
        weight_decay=0.05,
        decayed="matrices",
        clip=1.0,
    )
    task: Literal["generator"] = "generator"  # kind of the run
    epochs: PositiveFloat = 300.0
    batch_size: PositiveInt = 256
    # Bundle or workdir of the tokenizer that made the codes. Training on stored codes does not need
    # it, but then writes no pictures.
    tokenizer: str = ""
    # Fraction of the images that train the null class, which guidance needs.
    class_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    # Workdir of another run, from whose checkpoint this run starts. The learning rate decays over
    # the remaining steps, by default branch_step / 4 (a fifth of the whole).
    branch_from: str = ""
    branch_step: NonNegativeInt = 0  # step of that checkpoint
    sampling: SamplingConfig = SamplingConfig(guidance=2.0)  # of the pictures

    @model_validator(mode="after")
    def _check_branch(self):
        if self.branch_from and self.init_from:
            raise ValueError(
                f"init_from: expected '' in a run that branches off, got {self.init_from!r}"
            )
        if bool(self.branch_from) != bool(self.branch_step):
            raise ValueError(
                "branch_from: expected it together with branch_step, got "
                f"{self.branch_from!r} and {self.branch_step}"
            )
        if self.branch_from and self.optimizer.schedule != "warmup_stable_decay":
            raise ValueError(
                "optimizer.schedule: expected warmup_stable_decay in a run that branches off, got "
                f"{self.optimizer.schedule!r}"
            )
        if self.branch_from and self.total_steps <= self.branch_step:
            raise ValueError(
                f"steps: expected more than branch_step={self.branch_step}, got {self.total_steps}"
            )
        return self

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        return self.model.parts

    @property
    def total_steps(self) -> int:
        if self.branch_from and not self.steps:
            return self.branch_step + max(self.branch_step // 4, 1)
        return super().total_steps

    @property
    def resolved_optimizer(self) -> OptimizerConfig:
        resolved = super().resolved_optimizer
        if not 0 < self.branch_step < self.total_steps:
            return resolved
        share = (self.total_steps - self.branch_step) / self.total_steps
        return dataclasses.replace(resolved, decay_share=share)

    def for_classes(self, count: int) -> "GeneratorRun":
        """This run, with the number of classes if `model.classes` leaves it to the data."""
        if self.model.classes:
            return self
        return dataclasses.replace(self, model=dataclasses.replace(self.model, classes=count))

    def open_task(self) -> "GeneratorTask":
        from_codes = self.data.source == "codes"
        if not from_codes and not self.tokenizer:
            raise UserError(
                "config.tokenizer: expected the bundle or workdir of the tokenizer that encodes "
                "the images, or config.data.source=codes, got ''"
            )
        tokenizer = None
        refuse_own(self.tokenizer)
        if self.tokenizer:
            kinds = families.KINDS
            tokenizer = bundles.load(self.tokenizer, kinds, kinds, where="config.tokenizer")
            check_tokenizer(self.tokenizer, tokenizer, self.model)
        fingerprint = tokenizer.codes_of if tokenizer else None
        if from_codes:
            info = stored.STORE.find_info(self.data.path)
            check_tokenizer(self.data.path, info, self.model, fingerprint)
            fingerprint = info.tokenizer
        if self.branch_from:
            _check_branch_point(self)
        if tokenizer and distributed.is_main():  # the run draws pictures
            sampling.check_null_class(self.sampling, self.class_dropout)
        return GeneratorTask(
            self,
            tokenizer.config if tokenizer else None,
            frozen=tokenizer.weights["params"] if tokenizer else None,
            fingerprint=fingerprint,
        )


def refuse_own(tokenizer: str) -> None:
    """Raises UserError for a tokenizer of the user's, which cannot be part of a training step."""
    if tokenizer.startswith(locate.OWN):
        raise UserError(
            "config.tokenizer: a tokenizer of your own cannot encode or decode while training; run "
            "`gigatok encode`, set config.data.source=codes, and leave out config.tokenizer"
        )


def check_tokenizer(
    path: str | Path,
    source: Any,
    model: GeneratorConfig,
    fingerprint: str | None = None,
) -> None:
    """Raises UserError unless `model` fits the codes of `source`.

    This is a tokenizer, its bundle, or the `CodesInfo` of stored codes. `path` is where it is, and
    `fingerprint` that of the generator's tokenizer, if known.
    """
    if isinstance(source, stored.CodesInfo):
        theirs = source.codes, source.codebook_size, source.tokenizer
    else:
        theirs = source.config.latents, source.config.codebook_size, source.codes_of
    ours = model.codes, model.codebook_size, fingerprint
    names = "codes", "codebook_size", "tokenizer"
    for name, expected, found in zip(names, ours, theirs, strict=True):
        if expected not in (None, found):
            where = "generator" if name == "tokenizer" else f"generator's model.{name}"
            raise UserError(f"{path}: expected {name}={expected}, as in the {where}, got {found}")


def _check_branch_point(run: GeneratorRun) -> None:
    """Rejects a run of another model, and a step outside its constant phase."""
    path = as_path(run.branch_from) / "config.json"
    if not path.exists():  # a branch with checkpoints of its own does not need the other run
        return
    other = from_mapping(GeneratorRun, read_json(path, "the run to branch off"), f"{path}: config")
    for name, ours in dataclasses.asdict(run.model).items():
        if (theirs := getattr(other.model, name)) != ours:
            raise UserError(
                f"config.model.{name}: expected {theirs!r}, as in {run.branch_from}, got {ours!r}"
            )
    if other.freeze != run.freeze:
        raise UserError(
            f"config.freeze: expected {other.freeze}, as in {run.branch_from}, got {run.freeze}"
        )
    schedule = other.resolved_optimizer
    first = schedule.warmup_steps
    last = math.floor((1 - schedule.decay_share) * other.total_steps)
    if not first <= run.branch_step <= last:
        raise UserError(
            f"config.branch_step: expected a step of the constant phase of {run.branch_from}, "
            f"{first} to {last}, got {run.branch_step}"
        )


@flax.struct.dataclass
class GeneratorState:
    """Everything that a run needs to resume, except its position in the data."""

    step: jax.Array  # updates made so far
    key: jax.Array  # data of the random key from which each step derives its own
    params: Any
    optimizer: Any
    average: Any  # moving average of those `params` that are trained, or None


class GeneratorTask(Task):
    """The pure functions of a generator's training.

    Args:
      run: the configuration.
      tokenizer: architecture of the tokenizer; may be None if batches hold codes.
      frozen: the tokenizer's parameters.
      fingerprint: of the tokenizer that made the codes.
    """

    untrained: tuple[int, ...] = ()  # classes without a training image

    def __init__(
        self,
        run: GeneratorRun,
        tokenizer: Any | None = None,
        *,
        frozen: Any = None,
        fingerprint: str | None = None,
    ):
        self.run, self.tokenizer, self.frozen = run, tokenizer, frozen
        self.image_size = tokenizer.image_size if tokenizer else 0
        self.identity = {"tokenizer": fingerprint}
        self.dtype = layers.compute_dtype(run.dtype)
        if run.branch_from:
            self.branch = (run.branch_from, run.branch_step)

    def set_data(self, batches) -> None:
        super().set_data(batches)
        found = len(self.class_names)
        self.run = self.run.for_classes(found)
        if found > self.run.model.classes:
            raise UserError(
                f"config.model.classes: expected at least {found}, the number of classes in the "
                f"data, or 0, got {self.run.model.classes}"
            )
        self.identity = self.identity | {"list of classes": list(self.class_names)}
        self.untrained = missing_classes(batches.source)
        if self.untrained:
            logger.warning(
                "the %d training images show %d of %d classes; the others, such as %s, cannot be "
                "sampled",
                *(batches.examples, found - len(self.untrained), found),
                f"{self.untrained[0]} ({imagenet.words(self.class_names)[self.untrained[0]]})",
            )

    def init(self, key: jax.Array) -> GeneratorState:
        run = self.run
        params_key, step_key = jax.random.split(key)
        no_codes, one_class = jnp.zeros((1, 0), jnp.int32), jnp.zeros(1, jnp.int32)
        params = Generator(run.model).init(params_key, no_codes, one_class)["params"]
        trained = run.trained(params)
        adamw = make_optimizer(run.resolved_optimizer, run.total_steps)
        return GeneratorState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(step_key),
            params=params,
            optimizer=adamw.init(trained),
            average=jax.tree.map(jnp.copy, trained) if run.average_decay else None,
        )

    def step(
        self, state: GeneratorState, batch: Mapping[str, jax.Array], frozen: Any, phase: None = None
    ) -> tuple[GeneratorState, dict[str, jax.Array]]:
        """One update.

        Args:
          state: before the update.
          batch: "label", int32 `[B]`, and "codes", int32 `[B, N]`, or "image", uint8
            `[B, H, W, 3]`, which the tokenizer encodes.
          frozen: the tokenizer's parameters, or None.
          phase: unused; all steps run one compilation.

        Returns:
          The next state, and scalars: the mean cross entropy "total", norms, the learning rate.
        """
        run, model = self.run, self.run.model

        def loss(trained, carry, part, key):
            codes, labels = part
            class_key, dropout_key = jax.random.split(key)
            hidden = jax.random.bernoulli(class_key, run.class_dropout, labels.shape)
            classes = jnp.where(hidden, model.null_class, labels)
            module = Generator(model, train=True, remat=run.remat, dtype=self.dtype)
            params, rngs = state.params | trained, {"dropout": dropout_key}
            value = code_losses(module, params, codes, classes, rngs, mean=True)
            return value, ({"total": value}, carry, None)

        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        data = (batch_codes(batch, self.tokenizer, frozen, self.dtype), batch["label"])
        gradients, metrics, _, _ = mean_gradients(
            loss, run.accumulate, run.trained(state.params), None, data, key
        )
        params, optimizer_state, average, more = update(
            run, state.params, gradients, state.optimizer, state.average, state.step
        )
        state = state.replace(
            step=state.step + 1, params=params, optimizer=optimizer_state, average=average
        )
        return state, metrics | more

    def measure(self, state, batch, frozen):
        """The validation loss of each image."""
        codes = batch_codes(batch, self.tokenizer, frozen, self.dtype)
        params = params_for_use(state)
        loss = validation_loss(self.run.model, params, codes, batch["label"], self.dtype)
        return {"loss": loss}, ()

    def pictures(self, state, shown, frozen, mesh) -> dict[str, np.ndarray]:
        """Samples, one class per column."""
        if self.tokenizer is None:
            return {}
        run = self.run
        trained = np.arange(len(self.class_names) or run.model.classes)
        trained = np.setdiff1d(trained, self.untrained)
        classes = trained[np.arange(COLUMNS) * len(trained) // COLUMNS]
        classes = jnp.asarray(np.tile(classes, ROWS))
        keys = jax.random.split(jax.random.key(run.seed), len(classes))
        codes = sampling.sample(
            run.model, params_for_use(state), classes, keys, run.sampling, self.dtype
        )
        codes = np.asarray(sharding.replicate(mesh, codes))
        images = np.asarray(self._decode(mesh)(frozen, codes))
        return {"samples": pictures.grid(np.split(images, ROWS))}

    def _decode(self, mesh):
        """The tokenizer's decoder, compiled once: codes `[B, N]` to uint8 images."""
        if self._compiled_decode is None:
            module = families.make(self.tokenizer, self.dtype)

            def decode(params, codes):
                images = module.apply({"params": params}, codes, method="decode")
                return pictures.to_uint8(images)

            self._compiled_decode = jax.jit(decode, out_shardings=sharding.replicated(mesh))
        return self._compiled_decode

    _compiled_decode = None

    def bundle(self, state) -> BundleContent:
        made_by = self.made_by(state) | {"tokenizer": self.identity["tokenizer"]}
        made_by["data"]["untrained"] = list(self.untrained)
        weights = {"params": params_for_use(state)}
        return BundleContent("generator", self.run.model, weights, made_by)


def batch_codes(
    batch: Mapping[str, jax.Array],
    tokenizer: Any | None,
    params: Any,
    dtype: layers.Dtype = jnp.float32,
) -> jax.Array:
    """The "codes" of a batch, int32 `[B, N]`; without them, those of its "image"."""
    if "codes" in batch:
        return batch["codes"]
    images = pictures.to_float(batch["image"])
    module = families.make(tokenizer, dtype)
    return module.apply({"params": params}, images, method="encode")


def validation_loss(
    model: GeneratorConfig,
    params: Any,
    codes: jax.Array,
    labels: jax.Array,
    dtype: layers.Dtype = jnp.float32,
) -> jax.Array:
    """Mean cross entropy of each image's codes, given its class, float32 `[B]` (paper, 3.1).

    Args:
      model: the generator's architecture.
      params: its parameters.
      codes: int32 `[B, N]`.
      labels: int32 `[B]`.
      dtype: type of the computation.
    """
    return code_losses(Generator(model, dtype=dtype), params, codes, labels).mean(-1)


def code_losses(
    module: Generator,
    params: Any,
    codes: jax.Array,
    classes: jax.Array,
    rngs: Mapping[str, jax.Array] | None = None,
    *,
    mean: bool = False,
) -> jax.Array:
    """Cross entropy of each code, given the preceding ones and the class, float32 `[B, N]`.

    Args:
      module: the generator.
      params: its parameters.
      codes: int32 `[B, N]`.
      classes: int32 `[B]`.
      rngs: random keys of the module.
      mean: return the mean, a scalar, whose gradient too needs no more than a chunk of logits.
    """
    apply = functools.partial(module.apply, {"params": params}, codes[:, :-1], classes, rngs=rngs)
    mesh = sharding.mesh_in_use()
    shards, tensor = (sharding.batch_shards(mesh), mesh.shape["tensor"]) if mesh else (1, 1)
    images, length = codes.shape
    if images % shards:  # as may be in an evaluation
        shards = 1
    logits = images * module.config.codebook_size // (shards * tensor)  # of a device and position
    chunks = quantizer.chunk_count(length, logits, CHUNK_ELEMENTS)
    if chunks == 1:
        values = losses.cross_entropy(apply(), codes)
        return values.mean() if mean else values
    x, kernel = apply(method="factors")
    if mean:
        return losses.mean_cross_entropy(x, kernel, codes, chunks, shards)
    return losses.chunked_cross_entropy(x, kernel, codes, chunks)


def params_for_use(state: GeneratorState) -> Any:
    """The averaged weights or, without an average, the last ones."""
    return state.params | (state.average or {})
