"""A generator's run: its configuration, and the job that the loop runs for it."""

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from gigatok_jax import bundles, pictures, sampling, sharding
from gigatok_jax.config import from_mapping
from gigatok_jax.data import codes, pipeline
from gigatok_jax.errors import UserError
from gigatok_jax.files import read_json
from gigatok_jax.models import layers
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training import generator as training
from gigatok_jax.training.evaluating import held_out_means
from gigatok_jax.training.loop import Job
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.run import RunConfig

COLUMNS, ROWS = 8, 4  # of a picture of samples: classes, and samples of each

OPTIMIZER = OptimizerConfig(
    schedule="warmup_stable_decay",
    warmup_steps=5_000,
    weight_decay=0.05,
    decayed="matrices",
    clip=1.0,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratorRun(RunConfig):
    """All that determines a generator's training run, beside what any run is told.

    Attributes:
      tokenizer: bundle or workdir of the tokenizer that made the codes. With codes for data it may
        be left out, and then there are no pictures.
      class_dropout: share of the images whose class is hidden, so that guidance can be used.
      branch_from, branch_step: another run's workdir and a step. This run starts from that
        checkpoint, and its rate decays over all the steps that it then has: by default a quarter
        of those made, so that the decay is a fifth of the whole.
      sampling: of the pictures.
    """

    model: GeneratorConfig
    optimizer: OptimizerConfig = OPTIMIZER
    task: str = "generator"
    epochs: float = 300.0
    batch_size: int = 256
    average_decay: float = 0.0
    tokenizer: str = ""
    class_dropout: float = 0.1
    branch_from: str = ""
    branch_step: int = 0
    sampling: SamplingConfig = dataclasses.field(
        default_factory=lambda: SamplingConfig(guidance=2.0)
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.class_dropout < 1:
            raise ValueError(f"class_dropout must be in [0, 1), got {self.class_dropout}")
        if bool(self.branch_from) != bool(self.branch_step):
            raise ValueError(
                "branch_from and branch_step belong together, got "
                f"{self.branch_from!r} and {self.branch_step}"
            )
        if self.branch_from and self.optimizer.schedule != "warmup_stable_decay":
            raise ValueError(
                "optimizer.schedule must be warmup_stable_decay in a run that branches off, got "
                f"{self.optimizer.schedule!r}"
            )
        if self.branch_from and self.total_steps <= self.branch_step:
            raise ValueError(
                f"steps must be more than branch_step={self.branch_step}, got {self.total_steps}"
            )

    @property
    def total_steps(self) -> int:
        if self.branch_from and not self.steps:
            return self.branch_step + max(self.branch_step // 4, 1)
        return super().total_steps

    def training(self, tokenizer: TokenizerConfig | None) -> training.GeneratorTraining:
        """The pure functions of this run; `tokenizer` where its batches are images."""
        optimizer = self.optimizer
        if self.branch_from:
            share = (self.total_steps - self.branch_step) / self.total_steps
            optimizer = dataclasses.replace(optimizer, decay_share=share)
        return training.GeneratorTraining(
            self.model,
            optimizer,
            self.total_steps,
            class_dropout=self.class_dropout,
            accumulate=self.accumulate,
            average_decay=self.average_decay,
            remat=self.remat,
            dtype=layers.compute_dtype(self.dtype),
            tokenizer=tokenizer,
        )

    def job(self, workdir: pathlib.Path, mesh: Mesh) -> Job:
        """Reads the tokenizer, opens the data, and puts the run together.

        Raises:
          UserError: tokenizer or data are missing, or do not fit the model.
        """
        if self.data.source != "codes" and not self.tokenizer:
            raise UserError(
                "config.tokenizer: empty; expected the bundle or workdir of the tokenizer that "
                "encodes the images, or config.data.source=codes"
            )
        tokenizer = _tokenizer(self) if self.tokenizer else None
        size = tokenizer.config.image_size if tokenizer else 0
        batches = pipeline.train_batches(
            self.data, size, self.batch_size, self.seed, *sharding.batch_block(mesh)
        )
        if len(batches.class_names) > self.model.classes:
            raise UserError(
                f"config.model.classes: expected at least {len(batches.class_names)}, the data's, "
                f"got {self.model.classes}"
            )
        fingerprint = tokenizer.fingerprint if tokenizer else None
        if self.data.source == "codes":
            info = codes.find_info(self.data.path)
            info.check(
                codes=self.model.codes,
                codebook_size=self.model.codebook_size,
                tokenizer=fingerprint,
            )
            fingerprint = info.tokenizer
        functions = self.training(tokenizer and tokenizer.config)
        branch = None
        if self.branch_from:
            branch = (pathlib.Path(self.branch_from), self.branch_step)
            _check_branch(self)
        return Job(
            training=functions,
            frozen=None if self.data.source == "codes" else tokenizer.weights["params"],
            batches=batches,
            evaluate=_Evaluation(self, functions, tokenizer, batches.class_names, mesh),
            advise=lambda row: None,
            finish=functools.partial(_write_bundle, self, workdir, fingerprint),
            identity={"tokenizer": fingerprint},
            branch=branch,
        )


def _check_branch(run: GeneratorRun) -> None:
    """Refuses another model's run, and a step outside its constant phase.

    A run that has branched off no longer needs the other one, so that its files may be gone.
    """
    path = pathlib.Path(run.branch_from) / "config.json"
    if not path.exists():
        return
    other = from_mapping(GeneratorRun, read_json(path, "the run to branch off"), str(path))
    if other.model != run.model:
        raise UserError(
            f"config.model: {run.model}, but the run in {run.branch_from} has {other.model}"
        )
    first = other.optimizer.warmup_steps
    last = math.floor((1 - other.optimizer.decay_share) * other.total_steps)
    if not first <= run.branch_step <= last:
        raise UserError(
            f"config.branch_step: expected a step of the constant phase of {run.branch_from}, "
            f"{first} to {last}, got {run.branch_step}"
        )


def _tokenizer(run: GeneratorRun) -> bundles.Bundle:
    bundle = bundles.load(run.tokenizer, "tokenizer", TokenizerConfig)
    for name, theirs in (("codes", "latents"), ("codebook_size", "codebook_size")):
        expected, got = getattr(bundle.config, theirs), getattr(run.model, name)
        if got != expected:
            raise UserError(
                f"config.model.{name}: expected {expected}, as tokenizer {run.tokenizer} has, "
                f"got {got}"
            )
    return bundle


class _Evaluation:
    """Held-out loss, and a picture of samples, a class a column."""

    def __init__(
        self,
        run: GeneratorRun,
        functions: training.GeneratorTraining,
        tokenizer: bundles.Bundle | None,
        class_names: tuple[str, ...],
        mesh: Mesh,
    ):
        self._run, self._mesh, self._dtype = run, mesh, functions.dtype
        shared = sharding.batch_sharding(mesh)
        self._loss = jax.jit(functions.validation_loss, out_shardings=shared)
        decode = jax.jit(functions.decode)
        self._decode = tokenizer and functools.partial(
            decode, jax.device_put(tokenizer.weights["params"])
        )
        self._classes = np.arange(COLUMNS) * len(class_names) // COLUMNS
        size = tokenizer.config.image_size if tokenizer else 0
        self._batches = pipeline.eval_batches(
            run.data, size, run.batch_size, *sharding.batch_block(mesh)
        )

    def __call__(self, state: training.GeneratorState, frozen):
        params = training.params_for_use(state)

        def measure(batch):
            loss = self._loss(params, sharding.put_batch(self._mesh, batch), frozen)
            return {"held_out/loss": sharding.local_block(loss)}

        self._batches.set_state({"next_batch": 0})
        with self._batches:
            means = held_out_means(measure, self._batches, self._run.evaluation_images)
        return means, {"samples": self._samples(params)} if self._decode else {}

    def _samples(self, params) -> np.ndarray:
        run = self._run
        classes = jnp.asarray(np.tile(self._classes, ROWS))
        keys = jax.random.split(jax.random.key(run.seed), len(classes))
        drawn = sampling.sample(run.model, params, classes, keys, run.sampling, self._dtype)
        drawn = np.asarray(sharding.replicate(self._mesh, drawn))
        images = self._decode(drawn)
        return pictures.grid(np.split(np.asarray(images), ROWS))


def _write_bundle(run, workdir, fingerprint, state: training.GeneratorState):
    bundles.save(
        workdir / "bundle",
        "generator",
        run.model,
        {"params": training.params_for_use(state)},
        {"run": dataclasses.asdict(run), "step": int(state.step), "tokenizer": fingerprint},
    )
