"""A tokenizer's run: its configuration, and the job that the loop runs for it."""

from collections.abc import Mapping
import dataclasses
import functools
import logging
import math
import pathlib

import jax
from jax.sharding import Mesh
import numpy as np

from gigatok_jax import bundles, frozen, pictures, sharding
from gigatok_jax.data import pipeline
from gigatok_jax.errors import UserError
from gigatok_jax.models import layers, norms, quantizer, vit
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.training import tokenizer as training
from gigatok_jax.training.evaluating import held_out_means
from gigatok_jax.training.loop import Job
from gigatok_jax.training.run import RunConfig
from gigatok_jax.training.tokenizer import ObjectiveConfig

logger = logging.getLogger(__name__)

PICTURES = 8  # images across a reconstruction picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerRun(RunConfig):
    """All that determines a tokenizer's training run, beside what any run is told.

    Attributes:
      usage_floor, usage_patience: warn when codebook usage stays below the floor for this many
        steps.
    """

    model: TokenizerConfig
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    task: str = "tokenizer"
    epochs: float = 100.0
    batch_size: int = 128
    average_decay: float = 0.9999
    usage_floor: float = 0.1
    usage_patience: int = 1_000

    def __post_init__(self):
        super().__post_init__()
        if self.data.source == "codes":
            raise ValueError("data.source must be one of images, got 'codes'")
        if self.objective.semantic > 0 and not self.model.semantic_dim:
            raise ValueError("objective.semantic is positive, so model.semantic_dim must be too")
        if self.objective.needs_dino:
            norms.batch_groups(self.batch_size // self.accumulate)
        if self.batch_size // self.accumulate % self.objective.patchgan_groups:
            raise ValueError(
                f"objective.patchgan_groups must divide batch_size={self.batch_size} over "
                f"accumulate={self.accumulate}, got {self.objective.patchgan_groups}"
            )
        patchgan = self.objective.adversarial > 0 and self.objective.discriminator == "patchgan"
        channels = self.objective.discriminator_channels
        extent = self.model.image_size >> (len(channels) - 1)  # of the last two layers' input
        if len(channels) < 2 or (patchgan and extent < 3):
            raise ValueError(
                "objective.discriminator_channels must be at least 2 widths, all but the last of "
                f"which halve an image of {self.model.image_size} to 3 or more, got {channels}"
            )

    def training(self, teacher: vit.ViTConfig | None) -> training.TokenizerTraining:
        """The pure functions of this run."""
        return training.TokenizerTraining(
            self.model,
            self.objective,
            self.optimizer,
            self.total_steps,
            accumulate=self.accumulate,
            average_decay=self.average_decay,
            remat=self.remat,
            dtype=layers.compute_dtype(self.dtype),
            teacher=teacher,
        )

    def job(self, workdir: pathlib.Path, mesh: Mesh) -> Job:
        """Reads the frozen networks, opens the data, and puts the run together.

        Raises:
          UserError: weights or data are missing.
        """
        if self.objective.adversarial and self.objective.disc_start >= self.total_steps:
            logger.warning(
                "objective.disc_start=%d is not reached in %d steps: there is no discriminator",
                self.objective.disc_start,
                self.total_steps,
            )
        teacher_config, frozen = _frozen(self)
        functions = self.training(teacher_config)
        size = self.model.image_size
        batches = pipeline.train_batches(
            self.data, size, self.batch_size, self.seed, *sharding.batch_block(mesh)
        )
        return Job(
            training=functions,
            frozen=frozen,
            batches=batches,
            evaluate=_Evaluation(self, functions, mesh),
            advise=_UsageAdvice(self),
            finish=functools.partial(_write_bundle, self, workdir),
        )


def _frozen(run: TokenizerRun) -> tuple[vit.ViTConfig | None, training.Frozen]:
    """The networks that the objective asks for, and the teacher's architecture."""
    config, params = None, None
    objective = run.objective
    if objective.needs_teacher:
        config, params = frozen.load_teacher(objective.teacher)
        params["positions"] = vit.resize_positions(params["positions"], run.model.grid)
        if objective.semantic and config.width != run.model.semantic_dim:
            raise UserError(
                f"config.model.semantic_dim: expected {config.width}, the width of teacher "
                f"{objective.teacher}, got {run.model.semantic_dim}"
            )
    lpips = frozen.load_lpips() if objective.needs_lpips else None
    dino = frozen.load_dino() if objective.needs_dino else None
    return config, training.Frozen(teacher=params, lpips=lpips, dino=dino)


class _Evaluation:
    """Held-out reconstruction metrics, and a picture of inputs over reconstructions."""

    def __init__(self, run: TokenizerRun, functions: training.TokenizerTraining, mesh: Mesh):
        def reconstruct(state, images, frozen):
            outputs, values = functions.reconstruct(state, images, frozen)
            return (images[:PICTURES], outputs[:PICTURES]), values

        self._run, self._mesh = run, mesh
        shardings = (sharding.replicated(mesh), sharding.batch_sharding(mesh))
        self._reconstruct = jax.jit(reconstruct, out_shardings=shardings)
        self._batches = pipeline.eval_batches(
            run.data, run.model.image_size, run.batch_size, *sharding.batch_block(mesh)
        )

    def __call__(self, state: training.TokenizerState, frozen: training.Frozen):
        shown = []

        def measure(batch):
            images = sharding.put_batch(self._mesh, batch["image"])
            first, values = self._reconstruct(state, images, frozen)
            if not shown:
                shown.extend(map(np.asarray, first))
            return {
                f"held_out/{name}": sharding.local_block(value) for name, value in values.items()
            }

        self._batches.set_state({"next_batch": 0})
        with self._batches:
            means = held_out_means(measure, self._batches, self._run.evaluation_images)
        return means, {"reconstruction": pictures.grid(shown)}


class _UsageAdvice:
    """Warns, once, when codebook usage stays low: collapse is the usual failure of training."""

    def __init__(self, run: TokenizerRun):
        self._run = run
        self._low_since = None
        self._warned = False

    def __call__(self, row: Mapping[str, float]) -> str | None:
        run, step, usage = self._run, row["step"], row["codebook_usage"]
        # A short history cannot have seen every code.
        assigned = min(step * run.batch_size * run.model.latents, quantizer.HISTORY_LENGTH)
        reachable = 1 - math.exp(-assigned / run.model.codebook_size)
        if usage >= run.usage_floor * reachable:
            self._low_since, self._warned = None, False
            return None
        self._low_since = step if self._low_since is None else self._low_since
        if self._warned or step - self._low_since < run.usage_patience:
            return None
        self._warned = True
        return (
            f"only {usage:.1%} of the {run.model.codebook_size} codes are in use since step "
            f"{self._low_since}: the codebook may have collapsed. What helps: "
            "objective.entropy=0.005, a longer optimizer.warmup_steps, a lower optimizer.rate, "
            "model.gradient='rotation', a larger batch_size or a smaller model.codebook_size"
        )


def _write_bundle(run: TokenizerRun, workdir: pathlib.Path, state: training.TokenizerState):
    bundles.save(
        workdir / "bundle",
        "tokenizer",
        run.model,
        training.weights_for_use(state),
        {"run": dataclasses.asdict(run), "step": int(state.step)},
    )
