"""Training of a tokenizer: configuration, losses, step and evaluation (paper, 4 and appendix C).

The step trains two players in turn. `tokenizer_loss` reconstructs the batch and adds up the terms
of the objective; from `disc_start` on, one of them is the adversarial loss. `discriminator_loss`
then trains the discriminator on the same reconstructions.
"""

from collections.abc import Mapping
import dataclasses
import logging
import math
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from gigatok_jax import frozen_networks, image_metrics, pictures, sharding
from gigatok_jax.config import configclass
from gigatok_jax.errors import UserError
from gigatok_jax.models import discriminators, layers, norms, quantizer, vit
from gigatok_jax.models.lpips import LPIPS
from gigatok_jax.models.tokenizer import Tokenizer, TokenizerConfig, init_params
from gigatok_jax.training import diffaug, losses
from gigatok_jax.training.optimizer import global_norm, make_optimizer
from gigatok_jax.training.task import (
    BundleContent,
    Decay,
    RunConfig,
    Task,
    mean_gradients,
    update,
)

logger = logging.getLogger(__name__)

SHOWN = 8  # images across a picture of reconstructions
RECIPE_ENTROPY = 0.005  # weight of the entropy loss in the paper's recipes (appendix C)
# Losses of the quantizers.
TERMS = {
    "vq": ("codebook", "commitment", "entropy"),
    "ibq": ("codebook", "commitment", "entropy"),
    "lfq": ("commitment", "entropy"),
    "bsq": ("commitment", "entropy"),
    "fsq": (),
}


@configclass
class ObjectiveConfig:
    """Weights of the loss terms, and the networks that measure them.

    `l2`, `codebook` and `commitment` are always computed and logged. Every other term is left out
    at weight 0. Terms that the model's quantizer does not have are 0; the weights that defaults and
    recipes give them are accepted, and others refused.
    """

    l2: NonNegativeFloat = 1.0  # squared error of pixels
    perceptual: NonNegativeFloat = 1.0  # distance of features, see `perceptual_distance`
    adversarial: NonNegativeFloat = 0.5  # from the discriminator, once it trains
    codebook: NonNegativeFloat = 1.0  # draws code vectors to the latents
    # Draws latents to their code vectors; multiplies a loss that already has the factor 0.25.
    commitment: NonNegativeFloat = 1.0
    entropy: NonNegativeFloat = 0.0  # rewards clear choices, and even use of all codes
    semantic: NonNegativeFloat = 0.5  # draws the decoder's features to the teacher's
    # Features of VGG-16 with LPIPS's weights, or those of the semantic teacher.
    perceptual_distance: Literal["lpips", "teacher"] = "lpips"
    teacher: str = "dinov2_vitb14"  # the semantic teacher: a published name, or a bundle
    # "patchgan": a CNN. "dino": trained heads on features that a frozen DINO computes from
    # augmented images.
    discriminator: Literal["patchgan", "dino"] = "patchgan"
    disc_start: NonNegativeInt = 20_000  # first step of the discriminator
    discriminator_channels: tuple[int, ...] = (64, 128, 256, 512)  # widths of PatchGAN's layers
    # Parts of a batch that PatchGAN's BatchNorm normalizes separately, on any mesh. In the
    # reference, each GPU normalized its own images.
    patchgan_groups: PositiveInt = 1
    # Initial steps that also train the CNN decoder on the CNN encoder's features, and the decoder
    # transformer to reproduce these features: 15,000 in the older recipe.
    auxiliary_steps: NonNegativeInt = 0

    @property
    def needs_teacher(self) -> bool:
        return self.semantic > 0 or (self.perceptual > 0 and self.perceptual_distance == "teacher")

    @property
    def needs_lpips(self) -> bool:
        return self.perceptual > 0 and self.perceptual_distance == "lpips"

    @property
    def needs_dino(self) -> bool:
        return self.adversarial > 0 and self.discriminator == "dino"


@configclass(kw_only=True)
class TokenizerRun(RunConfig):
    """A tokenizer's training run."""

    model: TokenizerConfig  # architecture
    objective: ObjectiveConfig = ObjectiveConfig()  # losses and their weights
    task: Literal["tokenizer"] = "tokenizer"  # kind of the run
    average_decay: Decay = 0.9999
    usage_floor: NonNegativeFloat = 0.1  # share of the codebook below which the run warns ...
    usage_patience: PositiveInt = 1_000  # ... once usage has been so low for this many steps

    @model_validator(mode="after")
    def _check_objective(self):
        objective, channels = self.objective, self.objective.discriminator_channels
        if self.data.source == "codes":
            raise ValueError("data.source: expected images for a tokenizer, got 'codes'")
        # These weights may stay as they are in a recipe of which only the quantizer is changed.
        for term, usual in {"codebook": 1, "commitment": 1, "entropy": RECIPE_ENTROPY}.items():
            weight = getattr(objective, term)
            if term not in TERMS[self.model.quantizer] and weight not in (0, usual):
                raise ValueError(
                    f"objective.{term}: expected 0 with model.quantizer={self.model.quantizer!r}, "
                    f"which has no such loss, got {weight:g}"
                )
        if objective.semantic > 0 and not self.model.semantic_dim:
            raise ValueError("model.semantic_dim: expected a width with objective.semantic, got 0")
        part = self.batch_size // self.accumulate
        if objective.needs_dino:
            norms.batch_groups(part)
        if part % objective.patchgan_groups:
            raise ValueError(
                f"objective.patchgan_groups: expected a divisor of batch_size={self.batch_size} "
                f"over accumulate={self.accumulate}, got {objective.patchgan_groups}"
            )
        patchgan = objective.adversarial > 0 and objective.discriminator == "patchgan"
        extent = self.model.image_size >> (len(channels) - 1)  # input of the last two layers
        if len(channels) < 2 or min(channels) < 1 or (patchgan and extent < 3):
            raise ValueError(
                "objective.discriminator_channels: expected 2 or more widths; each but the last "
                "halves the image, which must stay at least 3 pixels wide, got "
                f"{channels} for {self.model.image_size} pixels"
            )
        return self

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        return self.model.parts

    def open_task(self) -> "TokenizerTask":
        objective = self.objective
        if objective.adversarial and objective.disc_start >= self.total_steps:
            logger.warning(
                "the discriminator never trains: objective.disc_start=%d, but the run has %d steps",
                objective.disc_start,
                self.total_steps,
            )
        teacher, networks = None, Frozen()
        if objective.needs_teacher:
            teacher, params = frozen_networks.load_teacher(objective.teacher)
            if objective.semantic and teacher.width != self.model.semantic_dim:
                raise UserError(
                    f"config.model.semantic_dim: expected {teacher.width}, the width of teacher "
                    f"{objective.teacher}, got {self.model.semantic_dim}"
                )
            # The teacher sees as many patches as the tokenizer's grid has cells.
            params["positions"] = vit.resize_positions(params["positions"], self.model.grid)
            networks = networks.replace(teacher=params)
        if objective.needs_lpips:
            networks = networks.replace(lpips=frozen_networks.load_lpips())
        if objective.needs_dino:
            networks = networks.replace(dino=frozen_networks.load_dino())
        return TokenizerTask(self, teacher, frozen=networks)


@flax.struct.dataclass
class Frozen:
    """Parameters of the frozen networks; None for those that the objective does not need."""

    teacher: Any = None
    lpips: Any = None
    dino: Any = None


@flax.struct.dataclass
class TokenizerState:
    """Everything that a run needs to resume, except its position in the data."""

    step: jax.Array  # updates made so far
    key: jax.Array  # data of the random key from which each step derives its own
    params: Any
    optimizer: Any
    average: Any  # moving average of those `params` that are trained, or None
    history: jax.Array  # the last 65,536 codes assigned
    discriminator: Any  # its parameters, and running statistics or singular vectors
    discriminator_optimizer: Any


@dataclasses.dataclass(frozen=True)
class Phase:
    """Static settings of a step; each combination is one compilation."""

    adversarial: bool
    auxiliary: bool


class TokenizerTask(Task):
    """The pure functions of a tokenizer's training.

    Args:
      run: the configuration.
      teacher: architecture of the semantic teacher, if the objective needs one.
      frozen: parameters of the frozen networks.
      dino: architecture of the network under the "dino" discriminator.
    """

    def __init__(
        self,
        run: TokenizerRun,
        teacher: vit.ViTConfig | None = None,
        *,
        frozen: Frozen | None = None,
        dino: vit.ViTConfig = vit.DINO[frozen_networks.DINO],
    ):
        self.run, self.frozen = run, Frozen() if frozen is None else frozen
        self.image_size = run.model.image_size
        self.teacher, self.dino = teacher, dino
        self.dtype = layers.compute_dtype(run.dtype)
        objective = run.objective
        if objective.discriminator == "dino":
            self.discriminator = discriminators.DinoHeads(self.dtype)
        else:
            self.discriminator = discriminators.PatchGAN(
                objective.discriminator_channels, objective.patchgan_groups, self.dtype
            )

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.run.model, self.run.remat, self.dtype)

    def init(self, key: jax.Array) -> TokenizerState:
        run, size = self.run, self.image_size
        tokenizer_key, discriminator_key, step_key = jax.random.split(key, 3)
        inputs = jnp.zeros((1, size, size, 3))  # of the discriminator
        if run.objective.discriminator == "dino":
            depths = len(vit.quarters(self.dino))
            inputs = jnp.zeros((depths, 1, self.dino.grid**2, self.dino.width))
        params = init_params(self.tokenizer, tokenizer_key)
        trained = run.trained(params)
        discriminator = self.discriminator.init(discriminator_key, inputs)
        adamw = make_optimizer(run.resolved_optimizer, run.total_steps)
        return TokenizerState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(step_key),
            params=params,
            optimizer=adamw.init(trained),
            average=jax.tree.map(jnp.copy, trained) if run.average_decay else None,
            history=quantizer.empty_history(),
            discriminator=discriminator,
            discriminator_optimizer=adamw.init(discriminator["params"]),
        )

    def phase(self, step: int) -> Phase:
        objective = self.run.objective
        return Phase(
            adversarial=objective.adversarial > 0 and step >= objective.disc_start,
            auxiliary=step < objective.auxiliary_steps,
        )

    def step(
        self, state: TokenizerState, batch: Mapping[str, jax.Array], frozen: Frozen, phase: Phase
    ) -> tuple[TokenizerState, dict[str, jax.Array]]:
        """One update of the tokenizer and, in an adversarial phase, of the discriminator.

        Args:
          state: before the update.
          batch: "image", uint8 `[B, H, W, 3]`.
          frozen: parameters of the frozen networks.
          phase: see `phase`; static under `jit`.

        Returns:
          The next state, and scalars: each loss term unweighted, their weighted sum "total",
          norms, the learning rate, and the codebook's usage.
        """
        run = self.run
        images = pictures.to_float(batch["image"])  # [B, H, W, 3] in [-1, 1]
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def tokenizer_loss(trained, discriminator, images, key):
            params = state.params | trained
            return self.tokenizer_loss(params, discriminator, images, frozen, phase, key)

        trained = run.trained(state.params)
        gradients, metrics, discriminator, outputs = mean_gradients(
            tokenizer_loss, run.accumulate, trained, state.discriminator, images, key
        )
        params, optimizer_state, average, more = update(
            run, state.params, gradients, state.optimizer, state.average, state.step
        )
        history = quantizer.update_history(state.history, outputs["codes"])
        metrics |= more
        metrics["codebook_usage"] = quantizer.codebook_usage(history, run.model.codebook_size)
        next_state = state.replace(
            step=state.step + 1,
            params=params,
            optimizer=optimizer_state,
            average=average,
            history=history,
        )
        if not phase.adversarial:
            return next_state, metrics

        # As in the reference, the discriminator learns from the reconstructions made before the
        # tokenizer's update, which saves a second forward pass. Its running statistics continue
        # from the tokenizer's pass.
        def discriminator_loss(params, statistics, pair, key):
            return self.discriminator_loss(params, statistics, *pair, frozen, key)

        pair = (images, outputs["reconstruction"])
        params = discriminator["params"]
        gradients, more, statistics, _ = mean_gradients(
            discriminator_loss, run.accumulate, params, discriminator["batch_stats"], pair, key
        )
        # The rate follows the run's schedule, in which `disc_start` is usually past the warm-up.
        adamw = make_optimizer(
            run.resolved_optimizer, run.total_steps, start=run.objective.disc_start
        )
        gradients = sharding.row_major_gradients(gradients)
        updates, optimizer_state = adamw.update(gradients, state.discriminator_optimizer, params)
        params = optax.apply_updates(params, updates)
        metrics |= more | {"discriminator_gradient_norm": global_norm(gradients)}
        next_state = next_state.replace(
            discriminator={"params": params, "batch_stats": statistics},
            discriminator_optimizer=optimizer_state,
        )
        return next_state, metrics

    def norms(self, state: TokenizerState, phase: Phase) -> dict[str, jax.Array]:
        found = super().norms(state, phase)
        if phase.adversarial:
            found["discriminator_parameter_norm"] = global_norm(state.discriminator["params"])
        return found

    def tokenizer_loss(
        self,
        params: Any,
        discriminator: Any,
        images: jax.Array,
        frozen: Frozen,
        phase: Phase,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any, dict[str, jax.Array]]]:
        """The weighted sum of the loss terms, in the form that `mean_gradients` takes."""
        objective = self.run.objective
        out = self.tokenizer.apply(
            {"params": params},
            images,
            entropy=objective.entropy > 0,
            auxiliary=phase.auxiliary,
            rngs={"dropout": key} if self.run.model.dropout else {},
        )
        # Several terms share the features of the input.
        real = self._real_features(images, frozen)
        # Weight and value of each term; its name is that of the logged metric.
        terms = {
            "l2": (objective.l2, jnp.mean((out.reconstruction - images) ** 2)),
            "codebook": (objective.codebook, out.codebook_loss),
            "commitment": (objective.commitment, out.commitment_loss),
        }
        if objective.entropy:
            terms["entropy"] = (objective.entropy, out.entropy_loss)
        if objective.perceptual:
            distance = self._perceptual(real, out.reconstruction, frozen).mean()
            terms["perceptual"] = (objective.perceptual, distance)
        if objective.semantic:
            value = losses.semantic(out.semantic_features, real["semantic"])
            terms["semantic"] = (objective.semantic, value)
        if phase.adversarial:
            # Every pass through the discriminator updates its running statistics, so the order
            # matters: reconstructions, then auxiliary images, then (in the discriminator's own
            # update) real images and reconstructions.
            logits, discriminator = self._discriminate(
                discriminator, out.reconstruction, frozen, jax.random.fold_in(key, 0)
            )
            terms["adversarial"] = (objective.adversarial, losses.hinge_generator(logits))
        if phase.auxiliary:
            # The older recipe's shortcut feeds the CNN encoder's features to the CNN decoder. As in
            # the reference, only the image losses (L2, perceptual, adversarial) apply to it.
            terms["auxiliary_l2"] = (objective.l2, jnp.mean((out.direct - images) ** 2))
            terms["auxiliary_feature"] = (1.0, out.feature_loss)
            if objective.perceptual:
                distance = self._perceptual(real, out.direct, frozen).mean()
                terms["auxiliary_perceptual"] = (objective.perceptual, distance)
            if phase.adversarial:
                logits, discriminator = self._discriminate(
                    discriminator, out.direct, frozen, jax.random.fold_in(key, 1)
                )
                hinge = losses.hinge_generator(logits)
                terms["auxiliary_adversarial"] = (objective.adversarial, hinge)
        total = sum(weight * value for weight, value in terms.values())
        values = {name: value for name, (_, value) in terms.items()}
        outputs = {"codes": out.codes, "reconstruction": out.reconstruction}
        return total, ({"total": total} | values, discriminator, outputs)

    def discriminator_loss(
        self,
        params: Any,
        statistics: Any,
        images: jax.Array,
        reconstructions: jax.Array,
        frozen: Frozen,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any, None]]:
        """The hinge loss on images and reconstructions, in the form that `mean_gradients` takes.

        No gradient reaches the tokenizer: reconstructions are inputs here.
        """
        # Keys 0 and 1 are the tokenizer's: the two players see different augmentations.
        real_key, fake_key = (jax.random.fold_in(key, number) for number in (2, 3))
        discriminator = {"params": params, "batch_stats": statistics}
        logits_real, discriminator = self._discriminate(discriminator, images, frozen, real_key)
        logits_fake, discriminator = self._discriminate(
            discriminator, reconstructions, frozen, fake_key
        )
        value = losses.hinge_discriminator(logits_real, logits_fake)
        metrics = {
            "discriminator": value,
            "logits_real": logits_real.mean(),
            "logits_fake": logits_fake.mean(),
        }
        weighted = self.run.objective.adversarial * value
        return weighted, (metrics, discriminator["batch_stats"], None)

    def measure(self, state, batch, frozen):
        """PSNR, SSIM and perceptual distance of each image, and the first images for a picture."""
        images, variables = batch["image"], {"params": weights_for_use(state)["params"]}
        codes = self.tokenizer.apply(variables, pictures.to_float(images), method=Tokenizer.encode)
        decoded = self.tokenizer.apply(variables, codes, method=Tokenizer.decode)
        outputs = pictures.to_uint8(decoded)
        values = {
            "psnr": image_metrics.psnr(images, outputs),
            "ssim": image_metrics.ssim(images, outputs),
        }
        if self.run.objective.perceptual:
            real = self._real_features(pictures.to_float(images), frozen)
            values["perceptual"] = self._perceptual(real, decoded, frozen)
        return values, (images[:SHOWN], outputs[:SHOWN])

    def pictures(self, state, shown, frozen, mesh) -> dict[str, np.ndarray]:
        """Held-out images over their reconstructions."""
        return {"reconstruction": pictures.grid(shown)}

    def advise(self, row: Mapping[str, float]) -> str | None:
        """Warns once when codebook usage stays low: collapse is the usual failure of training."""
        run, step, usage = self.run, row["step"], row["codebook_usage"]
        # A short history cannot contain every code.
        assigned = min(step * run.batch_size * run.model.latents, quantizer.HISTORY_LENGTH)
        reachable = 1 - math.exp(-assigned / run.model.codebook_size)
        if usage >= run.usage_floor * reachable:
            self._low_since, self._warned = None, False
            return None
        self._low_since = step if self._low_since is None else self._low_since
        if self._warned or step - self._low_since < run.usage_patience:
            return None
        self._warned = True
        has_entropy = "entropy" in TERMS[run.model.quantizer]
        entropy = f"objective.entropy={RECIPE_ENTROPY}, " if has_entropy else ""
        rotation = "model.gradient='rotation', " if run.model.quantizer == "vq" else ""
        return (
            f"only {usage:.1%} of the {run.model.codebook_size} codes have been in use since step "
            f"{self._low_since}: the codebook may have collapsed. Remedies: {entropy}a longer "
            f"optimizer.warmup_steps, a lower optimizer.rate, {rotation}a larger batch_size or a "
            "smaller model.codebook_size"
        )

    _low_since, _warned = None, False

    def bundle(self, state) -> BundleContent:
        weights = weights_for_use(state)
        return BundleContent("tokenizer", self.run.model, weights, self.made_by(state))

    def _real_features(self, images, frozen) -> dict[str, Any]:
        """The frozen networks' features of the input."""
        features = {}
        if self.run.objective.needs_lpips:
            features["lpips"] = self._lpips(frozen, LPIPS.features, images)
        if self.run.objective.needs_teacher:
            tokens, tapped = self._teacher_features(images, frozen)
            features |= {"semantic": tokens.astype(jnp.float32), "tapped": tapped}
        return jax.lax.stop_gradient(features)

    def _perceptual(self, real, fake, frozen) -> jax.Array:
        """Distance of the images `fake` from the input, `[B]`."""
        if self.run.objective.perceptual_distance == "lpips":
            features = self._lpips(frozen, LPIPS.features, fake)
            return self._lpips(frozen, LPIPS.distance, real["lpips"], features)
        return losses.feature_distance(real["tapped"], self._teacher_features(fake, frozen)[1])

    def _lpips(self, frozen, method, *args):
        return LPIPS(self.dtype).apply({"params": frozen.lpips}, *args, method=method)

    def _teacher_features(self, images, frozen):
        """Final patch tokens `[B, T, C]`, and those that the perceptual distance compares."""
        taps = ()
        if self.run.objective.perceptual_distance == "teacher":
            taps = vit.quarters(self.teacher)
        inputs = vit.preprocess(images, self.teacher, self.run.model.grid)
        module = vit.ViT(self.teacher, self.run.remat, self.dtype)
        _, tokens, tapped = module.apply({"params": frozen.teacher}, inputs, taps)
        return tokens, tapped

    def _discriminate(self, discriminator, images, frozen, key):
        """The discriminator's logits, and the discriminator with updated statistics.

        `key` augments the input of the "dino" discriminator.
        """
        if self.run.objective.discriminator == "dino":
            augmentation, crop = jax.random.split(key)
            images = diffaug.augment(images, augmentation)
            inputs = discriminators.dino_inputs(images, self.dino, crop)
            module = vit.ViT(self.dino, self.run.remat, self.dtype)
            images = module.apply(  # features [L, B, T, C] from the depths that the heads read
                {"params": frozen.dino}, inputs, vit.quarters(self.dino), method=vit.ViT.readouts
            )
        logits, updated = self.discriminator.apply(
            discriminator, images, train=True, mutable=["batch_stats"]
        )
        return logits, discriminator | jax.lax.stop_gradient(updated)


def weights_for_use(state: TokenizerState) -> dict[str, Any]:
    """The averaged weights (without an average, the last ones) and the usage history."""
    return {"params": state.params | (state.average or {}), "history": state.history}
