"""Training of a tokenizer: state, objective and step."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from gigatok_jax import metrics, pictures
from gigatok_jax.models import discriminators, layers, quantizer, vit
from gigatok_jax.models.lpips import LPIPS
from gigatok_jax.models.tokenizer import Tokenizer, TokenizerConfig, init_params
from gigatok_jax.training import diffaug, losses, optimizer
from gigatok_jax.training.accumulation import mean_gradients
from gigatok_jax.training.optimizer import OptimizerConfig

PERCEPTUAL = ("lpips", "teacher")
DISCRIMINATORS = ("patchgan", "dino")


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the loss terms and what they are measured with.

    At weight 0 the terms that cost something (perceptual, adversarial, entropy, semantic) are not
    computed; the others stay in the metrics.

    Attributes:
      l2, perceptual, adversarial, codebook, commitment, entropy, semantic: weights; the
        commitment loss has its 0.25 inside.
      perceptual_distance: "lpips", or "teacher": the distance of the semantic teacher's features.
      teacher: name of the semantic teacher (see `gigatok_jax.teachers`).
      discriminator: "patchgan", or "dino": heads on a frozen DINO's features of augmented images.
      disc_start: step from which the discriminator trains and judges.
      discriminator_channels: widths of PatchGAN's layers.
      patchgan_groups: parts of a batch that PatchGAN's BatchNorm normalises apart, the same on any
        mesh; the reference's are what each GPU had.
      auxiliary_steps: first steps that train the CNN decoder on the CNN encoder's features too,
        and the decoder transformer to reproduce them (the older recipe's 15,000).
    """

    l2: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.5
    codebook: float = 1.0
    commitment: float = 1.0
    entropy: float = 0.0
    semantic: float = 0.5
    perceptual_distance: str = "lpips"
    teacher: str = "dinov2_vitb14"
    discriminator: str = "patchgan"
    disc_start: int = 20_000
    discriminator_channels: tuple[int, ...] = (64, 128, 256, 512)
    patchgan_groups: int = 1
    auxiliary_steps: int = 0

    def __post_init__(self):
        terms = ("l2", "perceptual", "adversarial", "codebook", "commitment", "entropy", "semantic")
        for name in (*terms, "disc_start", "auxiliary_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.patchgan_groups < 1:
            raise ValueError(f"patchgan_groups must be positive, got {self.patchgan_groups}")
        if self.perceptual_distance not in PERCEPTUAL:
            raise ValueError(
                f"perceptual_distance must be one of {PERCEPTUAL}, got {self.perceptual_distance!r}"
            )
        if self.discriminator not in DISCRIMINATORS:
            raise ValueError(
                f"discriminator must be one of {DISCRIMINATORS}, got {self.discriminator!r}"
            )

    @property
    def needs_teacher(self) -> bool:
        return self.semantic > 0 or (self.perceptual > 0 and self.perceptual_distance == "teacher")

    @property
    def needs_lpips(self) -> bool:
        return self.perceptual > 0 and self.perceptual_distance == "lpips"

    @property
    def needs_dino(self) -> bool:
        return self.adversarial > 0 and self.discriminator == "dino"


@dataclasses.dataclass(frozen=True)
class Phase:
    """What distinguishes one compilation of the step from another."""

    adversarial: bool
    auxiliary: bool


@flax.struct.dataclass
class Frozen:
    """Networks that training reads and never changes; None where the objective has no use."""

    teacher: Any = None
    lpips: Any = None
    dino: Any = None


@flax.struct.dataclass
class TokenizerState:
    """All that a run needs to go on, but for the data's position.

    Attributes:
      step: updates made so far.
      key: data of the random key from which each step folds its own.
      params, optimizer: of the tokenizer.
      average: moving average of `params`, or None.
      history: last 65,536 codes assigned.
      discriminator: its parameters, and its running statistics or singular vectors.
      discriminator_optimizer: its optimizer's state.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    optimizer: Any
    average: Any
    history: jax.Array
    discriminator: Any
    discriminator_optimizer: Any


@dataclasses.dataclass(frozen=True)
class TokenizerTraining:
    """The pure functions of a tokenizer's training.

    Attributes:
      model: the tokenizer's architecture.
      objective: the loss.
      optimizer: of both the tokenizer and the discriminator.
      steps: length of the schedule.
      accumulate: parts that a batch is divided into, one after the other.
      average_decay: of the moving average of the weights; 0 keeps none.
      remat: see `gigatok_jax.models.layers.remat`.
      dtype: type of the computation.
      teacher: the semantic teacher's architecture, where there is one.
      dino: architecture of the frozen network that the dino discriminator judges by.
    """

    model: TokenizerConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    steps: int
    accumulate: int = 1
    average_decay: float = 0.0
    remat: str = "none"
    dtype: layers.Dtype = jnp.float32
    teacher: vit.ViTConfig | None = None
    dino: vit.ViTConfig = vit.DINO["dino_vits16"]

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.model, self.remat, self.dtype)

    @property
    def discriminator(self) -> discriminators.PatchGAN | discriminators.DinoHeads:
        if self.objective.discriminator == "dino":
            return discriminators.DinoHeads(self.dtype)
        objective = self.objective
        return discriminators.PatchGAN(
            objective.discriminator_channels, objective.patchgan_groups, self.dtype
        )

    def init(self, key: jax.Array) -> TokenizerState:
        """A fresh state; parameters carry their logical axes until `nn.meta.unbox`."""
        tokenizer_key, discriminator_key, step_key = jax.random.split(key, 3)
        judged = jnp.zeros((1, self.model.image_size, self.model.image_size, 3))
        if self.objective.discriminator == "dino":
            depths = len(vit.quarters(self.dino))
            judged = jnp.zeros((depths, 1, self.dino.grid**2, self.dino.width))
        params = init_params(self.tokenizer, tokenizer_key)
        discriminator = self.discriminator.init(discriminator_key, judged)
        adamw = optimizer.optimizer(self.optimizer, self.steps)
        return TokenizerState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(step_key),
            params=params,
            optimizer=adamw.init(params),
            average=jax.tree.map(jnp.copy, params) if self.average_decay else None,
            history=quantizer.empty_history(),
            discriminator=discriminator,
            discriminator_optimizer=adamw.init(discriminator["params"]),
        )

    def phase(self, step: int) -> Phase:
        """Which compilation step number `step` needs."""
        objective = self.objective
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
          frozen: what the objective measures with.
          phase: see `phase`; static under `jit`.

        Returns:
          The next state, and scalars: each loss term unweighted, their weighted sum `total`,
          gradient norms before clipping, norms of the new parameters (a checkpoint follows only
          where all scalars are finite), the learning rate, the codebook's usage.
        """
        images = pictures.to_float(batch["image"])
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss(params, discriminator, images, key):
            return self._loss(params, discriminator, images, frozen, phase, key)

        gradients, metrics, discriminator, outputs = mean_gradients(
            loss, self.accumulate, state.params, state.discriminator, images, key
        )
        adamw = optimizer.optimizer(self.optimizer, self.steps)
        updates, optimizer_state = adamw.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if self.average_decay:
            average = optimizer.moving_average(average, params, self.average_decay, state.step)
        history = quantizer.update_history(state.history, outputs["codes"])
        metrics |= {
            "gradient_norm": optax.tree.norm(gradients),
            "parameter_norm": optax.tree.norm(params),
            "learning_rate": optimizer.schedule(self.optimizer, self.steps)(state.step),
            "codebook_usage": quantizer.codebook_usage(history, self.model.codebook_size),
        }
        state = state.replace(
            step=state.step + 1,
            params=params,
            optimizer=optimizer_state,
            average=average,
            history=history,
        )
        if phase.adversarial:
            pair = (images, outputs["reconstruction"])
            state, more = self._update_discriminator(state, discriminator, pair, frozen, key)
            metrics |= more
        return state, metrics

    def reconstruct(
        self, state: TokenizerState, images: jax.Array, frozen: Frozen
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Reconstructions of uint8 `[B, H, W, 3]`, and how near they are, `[B]` a metric."""
        module, variables = self.tokenizer, {"params": weights_for_use(state)["params"]}
        codes = module.apply(variables, pictures.to_float(images), method=Tokenizer.encode)
        floats = module.apply(variables, codes, method=Tokenizer.decode)
        values = {}
        if self.objective.perceptual:
            real = self._real_features(pictures.to_float(images), frozen)
            values["perceptual"] = self._perceptual(real, floats, frozen)
        outputs = pictures.to_uint8(floats)
        values |= {"psnr": metrics.psnr(images, outputs), "ssim": metrics.ssim(images, outputs)}
        return outputs, values

    def _loss(self, params, discriminator, images, frozen, phase, key):
        """Weighted sum of the terms, in the form that `accumulation.mean_gradients` takes."""
        objective = self.objective
        real = self._real_features(images, frozen)
        out = self.tokenizer.apply(
            {"params": params},
            images,
            entropy=objective.entropy > 0,
            auxiliary=phase.auxiliary,
            rngs={"dropout": key} if self.model.dropout else {},
        )
        terms = {
            "l2": jnp.mean((out.reconstruction - images) ** 2),
            "codebook": out.codebook_loss,
            "commitment": out.commitment_loss,
        }
        weights = {"l2": objective.l2, "codebook": objective.codebook}
        weights["commitment"] = objective.commitment

        def add(name, weight, value):
            if weight:
                terms[name], weights[name] = value(), weight

        def perceptual(fake):
            return self._perceptual(real, fake, frozen).mean()

        def adversarial(fake, draw):
            nonlocal discriminator
            part = jax.random.fold_in(key, draw)
            logits, discriminator = self._judge(discriminator, fake, frozen, part)
            return losses.hinge_generator(logits)

        add("entropy", objective.entropy, lambda: out.entropy_loss)
        add("perceptual", objective.perceptual, lambda: perceptual(out.reconstruction))
        if self.model.semantic_dim:
            add(
                "semantic",
                objective.semantic,
                lambda: losses.semantic(out.semantic_features, real["semantic"]),
            )
        if phase.adversarial:
            add("adversarial", objective.adversarial, lambda: adversarial(out.reconstruction, 0))
        if phase.auxiliary:
            terms["auxiliary_l2"] = jnp.mean((out.direct - images) ** 2)
            terms["auxiliary_feature"] = out.feature_loss
            weights |= {"auxiliary_l2": objective.l2, "auxiliary_feature": 1.0}
            add("auxiliary_perceptual", objective.perceptual, lambda: perceptual(out.direct))
            if phase.adversarial:
                weight = objective.adversarial
                add("auxiliary_adversarial", weight, lambda: adversarial(out.direct, 1))
        total = sum(weights[name] * value for name, value in terms.items())
        outputs = {"codes": out.codes, "reconstruction": out.reconstruction}
        return total, ({"total": total} | terms, discriminator, outputs)

    def _judge(self, discriminator, images, frozen, key):
        """Training-mode logits, and the discriminator with its statistics moved on.

        The key draws what the dino discriminator sees of the images.
        """
        judged = images
        if self.objective.discriminator == "dino":
            judged = self._dino_features(images, frozen, key)
        logits, updated = self.discriminator.apply(
            discriminator, judged, train=True, mutable=["batch_stats"]
        )
        return logits, discriminator | jax.lax.stop_gradient(updated)

    def _dino_features(self, images, frozen, key):
        """Features `[L, B, T, C]` of augmented images, from the depths that the heads judge."""
        augmentation, crop = jax.random.split(key)
        images = diffaug.augment(images, augmentation)
        images = discriminators.dino_inputs(images, self.dino, crop)
        return vit.ViT(self.dino, self.remat, self.dtype).apply(
            {"params": frozen.dino}, images, vit.quarters(self.dino), method=vit.ViT.readouts
        )

    def _update_discriminator(self, state, discriminator, pair, frozen, key):
        """Trains the discriminator, as the tokenizer left it, on images and reconstructions."""

        def loss(params, statistics, pair, key):
            images, fake = pair
            keys = [jax.random.fold_in(key, draw) for draw in (2, 3)]  # 0 and 1: the tokenizer's
            trained = {"params": params, "batch_stats": statistics}
            logits_real, updated = self._judge(trained, images, frozen, keys[0])
            logits_fake, updated = self._judge(updated, fake, frozen, keys[1])
            value = losses.hinge_discriminator(logits_real, logits_fake)
            metrics = {
                "discriminator": value,
                "logits_real": logits_real.mean(),
                "logits_fake": logits_fake.mean(),
            }
            return self.objective.adversarial * value, (metrics, updated["batch_stats"], None)

        params = discriminator["params"]
        gradients, metrics, statistics, _ = mean_gradients(
            loss, self.accumulate, params, discriminator["batch_stats"], pair, key
        )
        adamw = optimizer.optimizer(self.optimizer, self.steps, start=self.objective.disc_start)
        updates, optimizer_state = adamw.update(gradients, state.discriminator_optimizer, params)
        params = optax.apply_updates(params, updates)
        metrics |= {
            "discriminator_gradient_norm": optax.tree.norm(gradients),
            "discriminator_parameter_norm": optax.tree.norm(params),
        }
        state = state.replace(
            discriminator={"params": params, "batch_stats": statistics},
            discriminator_optimizer=optimizer_state,
        )
        return state, metrics

    def _real_features(self, images, frozen):
        """What the frozen networks make of the input, computed once a step."""
        features = {}
        if self.objective.needs_lpips:
            features["lpips"] = self._lpips(frozen, LPIPS.features, images)
        if self.objective.needs_teacher:
            tokens, tapped = self._teacher_features(images, frozen)
            features |= {"semantic": tokens.astype(jnp.float32), "tapped": tapped}
        return jax.lax.stop_gradient(features)

    def _perceptual(self, real, fake, frozen):
        """Distance of the reconstructions from the input, `[B]`."""
        if self.objective.perceptual_distance == "lpips":
            features = self._lpips(frozen, LPIPS.features, fake)
            return self._lpips(frozen, LPIPS.distance, real["lpips"], features)
        return losses.feature_distance(real["tapped"], self._teacher_features(fake, frozen)[1])

    def _lpips(self, frozen, method, *args):
        return LPIPS(self.dtype).apply({"params": frozen.lpips}, *args, method=method)

    def _teacher_features(self, images, frozen):
        """Final patch tokens `[B, T, C]`, and those of the perceptual distance's depths."""
        taps = ()
        if self.objective.perceptual_distance == "teacher":
            taps = vit.quarters(self.teacher)
        images = vit.preprocess(images, self.teacher, self.model.grid)
        module = vit.ViT(self.teacher, self.remat, self.dtype)
        _, tokens, tapped = module.apply({"params": frozen.teacher}, images, taps)
        return tokens, tapped


def weights_for_use(state: TokenizerState) -> dict[str, Any]:
    """The averaged weights where there are some, else the last, and the usage history."""
    params = state.params if state.average is None else state.average
    return {"params": params, "history": state.history}
