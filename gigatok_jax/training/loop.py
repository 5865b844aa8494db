"""The training loop of every task: state, data, steps, metrics, checkpoints, in that order."""

import collections
from collections.abc import Callable, Hashable, Mapping
import contextlib
import dataclasses
import functools
import logging
import pathlib
import time
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np
from tqdm import tqdm

from gigatok_jax import distributed, sharding
from gigatok_jax.data.pipeline import Batches, prefetch_to_device
from gigatok_jax.errors import RunStopped, UserError
from gigatok_jax.training.checkpoints import Checkpoints, Restored
from gigatok_jax.training.telemetry import Telemetry

logger = logging.getLogger(__name__)

STEPS_IN_FLIGHT = 2  # enough to keep a device busy while the host prepares the next step


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How often things happen, in steps.

    Attributes:
      log_every: metrics, averaged since the last time.
      evaluate_every: held-out metrics and pictures; they also come at the end. 0: only then.
      checkpoint_every: asynchronous checkpoints; one also comes at the end. 0: only then.
      keep_last: newest checkpoints that are kept.
      keep_every: checkpoints of its multiples are kept for good; 0: of none.
    """

    log_every: int = 50
    evaluate_every: int = 5_000
    checkpoint_every: int = 5_000
    keep_last: int = 2
    keep_every: int = 0

    def __post_init__(self):
        for name in ("log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("evaluate_every", "checkpoint_every", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


class Training(Protocol):
    """The pure functions of a task; see `training.tokenizer.TokenizerTraining`."""

    steps: int

    def init(self, key: jax.Array) -> Any: ...

    def phase(self, step: int) -> Hashable: ...

    def step(self, state, batch, frozen, phase) -> tuple[Any, dict[str, jax.Array]]: ...


@dataclasses.dataclass(frozen=True)
class Job:
    """A task with all that the loop needs to run it.

    Attributes:
      training: the pure functions.
      frozen: arrays that each step gets beside the state.
      batches: this process's batches, an iterator with `get_state` and `set_state`.
      evaluate: state and frozen arrays to held-out metrics and pictures.
      advise: one log row to a warning, or None.
      finish: called with the last state of a complete or cleanly stopped run.
      identity: what a checkpoint must agree in with a run that goes on from it, by name.
      branch: another run's workdir and a step, from whose checkpoint a fresh run starts, or None.
    """

    training: Training
    frozen: Any
    batches: Batches
    evaluate: Callable[[Any, Any], tuple[Mapping[str, float], Mapping[str, np.ndarray]]]
    advise: Callable[[Mapping[str, float]], str | None]
    finish: Callable[[Any], None]
    identity: Mapping[str, str] = dataclasses.field(default_factory=dict)
    branch: tuple[pathlib.Path, int] | None = None


def abstract_state(training: Training, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, types and shardings of a task's state; nothing is allocated."""
    boxed = jax.eval_shape(training.init, jax.random.key(0))
    return sharding.abstract(nn.meta.unbox(boxed), sharding.state_shardings(boxed, mesh))


def jit_step(training: Training, state: Any, mesh: jax.sharding.Mesh) -> Callable:
    """The compiled step, `(state, batch, frozen, *, phase) -> (state, metrics)`.

    It takes over the memory of the state that it gets.

    Args:
      training: the task's functions.
      state: arrays, or their shapes, whose shardings the next state has too.
      mesh: what it runs on.
    """

    def step(state, batch, frozen, *, phase):
        with sharding.use(mesh):
            return training.step(state, batch, frozen, phase)

    return jax.jit(
        step,
        donate_argnums=0,
        static_argnames="phase",
        out_shardings=(jax.tree.map(lambda array: array.sharding, state), None),
    )


def fresh_state(training: Training, abstract: Any, seed: int) -> Any:
    """A new state, created sharded: no device ever holds all of it."""

    def init(key):
        return nn.meta.unbox(training.init(key))

    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    # It runs once: on CPU, optimizing its hundreds of random generators would take a minute.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, out_shardings=shardings, compiler_options=options)(jax.random.key(seed))


def run(
    job: Job,
    config: LoopConfig,
    mesh: jax.sharding.Mesh,
    workdir: pathlib.Path,
    seed: int,
    *,
    shard_frozen: bool = False,
):
    """Trains to the end, going on from the newest checkpoint in `workdir` if there is one.

    Args:
      job: what to train.
      config: how often things happen.
      mesh: where arrays lie.
      workdir: where the run lives.
      seed: of a fresh state.
      shard_frozen: see `sharding.MeshConfig`.

    Raises:
      RunStopped: a loss became non-finite (nothing is saved), or the process was asked to stop
        (everything is saved).
      UserError: a checkpoint is damaged, or there is none to branch off from.
    """
    with contextlib.ExitStack() as stack:
        # Once for the whole run, on every device; a step would move host arrays each time.
        shardings = sharding.frozen_shardings(job.frozen, mesh, shard=shard_frozen)
        frozen = sharding.put(job.frozen, shardings)
        job = dataclasses.replace(job, frozen=frozen)
        checkpoints = Checkpoints(
            workdir / "checkpoints", keep_last=config.keep_last, keep_every=config.keep_every
        )
        stack.callback(checkpoints.close)
        stack.callback(job.batches.close)
        abstract = abstract_state(job.training, mesh)
        restored = checkpoints.restore(abstract) or _branch(job, abstract)
        if restored is None:
            start, state, unlogged = 0, fresh_state(job.training, abstract, seed), []
        else:
            start, state, progress = restored
            origin = workdir if checkpoints.latest is not None else job.branch[0]
            for name, value in job.identity.items():
                if progress["identity"].get(name) != value:
                    raise UserError(f"{origin}: its checkpoint is of another {name}")
            job.batches.set_state(progress["batches"])
            unlogged = progress["unlogged"]
            logger.info("going on from step %d in %s", start, workdir)
        telemetry = Telemetry(workdir, start) if distributed.is_main() else None
        if telemetry:
            stack.callback(telemetry.close)
        stop = stack.enter_context(distributed.stop_signals())
        _run(job, config, mesh, checkpoints, telemetry, stop, start, state, unlogged)


def _branch(job: Job, abstract: Any) -> Restored | None:
    """The checkpoint of another run that a fresh one starts from, its metrics left there."""
    if job.branch is None:
        return None
    workdir, step = job.branch
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    restored = checkpoints.restore(abstract, step)
    steps = ", ".join(map(str, checkpoints.steps)) or "(none)"
    checkpoints.close()
    if restored is None:
        raise UserError(f"{workdir}: has checkpoints of steps {steps}, not of {step}")
    progress = restored.progress | {"unlogged": []}
    logger.info("branching off from step %d of %s", step, workdir)
    return restored._replace(progress=progress)


def _run(job, config, mesh, checkpoints, telemetry, stop, start, state, unlogged):
    steps = job.training.steps
    step_function = jit_step(job.training, state, mesh)
    batches = prefetch_to_device(job.batches, functools.partial(sharding.put_batch, mesh))
    meter = _Meter(unlogged)
    bar = tqdm(
        initial=start, total=steps, unit="step", disable=None if telemetry else True, mininterval=1
    )

    def save(step):
        meter.check(step, checkpoints.latest)
        # A copy: it is written in the background, while rows go on being added.
        unlogged = list(meter.rows)
        progress = {"batches": batches.get_state(), "unlogged": unlogged}
        checkpoints.save(step, state, progress | {"identity": dict(job.identity)})

    def log(step):
        row = meter.row(step, checkpoints.latest)
        advice = job.advise({"step": step} | row)
        if advice:
            logger.warning("step %d: %s", step, advice)
        if telemetry:
            telemetry.scalars(step, row)
            bar.set_postfix_str(f"total {row['total']:.4g}, input wait {row['input_wait']:.1%}")
            if bar.disable:
                logger.info("step %d/%d: %s", step, steps, _describe(row))

    def evaluate(step):
        metrics, pictures = job.evaluate(state, job.frozen)
        if telemetry:
            telemetry.scalars(step, metrics)
            telemetry.pictures(step, pictures)
            logger.info("step %d: %s", step, _describe(metrics))
        meter.restart_clock()

    def due(every, step):
        return (every and step % every == 0) or step == steps

    if telemetry and start < steps:
        logger.info("compiling the step; on a CPU this can take minutes")
    with bar:
        # A kill may have come between this checkpoint and the end of its evaluation.
        resumed = checkpoints.latest == start and due(config.evaluate_every, start)
        if resumed and not distributed.agree(telemetry is None or telemetry.evaluated(start)):
            evaluate(start)
        for step in range(start + 1, steps + 1):
            batch = meter.wait(batches)
            state, metrics = step_function(
                state, batch, job.frozen, phase=job.training.phase(step - 1)
            )
            meter.add(metrics, len(batch["label"]))
            bar.update()
            if due(config.log_every, step):
                log(step)
            # First, so that an evaluation that fails costs no steps.
            if due(config.checkpoint_every, step):
                save(step)
            if due(config.evaluate_every, step):
                meter.check(step, checkpoints.latest)
                evaluate(step)
            if stop.after(step) and step < steps:
                save(step)
                job.finish(state)
                raise RunStopped(
                    f"stopped by {stop.signal} after step {step} of {steps}; all is saved, and the "
                    "same command goes on from there"
                )
        job.finish(state)


class _Meter:
    """Collects metrics on the device and brings them over together, so that steps overlap.

    Attributes:
      rows: one dictionary of floats for each step since the last log.
    """

    def __init__(self, rows: list[dict[str, float]]):
        self.rows = list(rows)
        self._pending = collections.deque()
        self.restart_clock()

    def restart_clock(self):
        self._since, self._waited, self._images = time.monotonic(), 0.0, 0

    def wait(self, batches):
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        return batch

    def add(self, metrics: Mapping[str, jax.Array], images: int):
        self._pending.append(metrics)
        self._images += images
        if len(self._pending) > STEPS_IN_FLIGHT:
            jax.block_until_ready(self._pending[-1 - STEPS_IN_FLIGHT])

    def check(self, step: int, checkpoint: int | None) -> None:
        """Fetches what is pending; raises RunStopped where a value is not finite."""
        fetched = jax.device_get(list(self._pending))
        first = step - len(fetched) + 1
        self._pending.clear()
        for at, metrics in enumerate(fetched, start=first):
            row = {name: float(value) for name, value in metrics.items()}
            bad = [name for name, value in row.items() if not np.isfinite(value)]
            if bad:
                last = f"step {checkpoint}" if checkpoint is not None else "none yet"
                raise RunStopped(
                    f"{', '.join(bad)} became {row[bad[0]]} at step {at}; last good checkpoint: "
                    f"{last}. Try a lower optimizer.rate or a longer warm-up"
                )
            self.rows.append(row)

    def row(self, step: int, checkpoint: int | None) -> dict[str, float]:
        """Means since the last call, with rates; a metric that some steps lack is over the rest."""
        self.check(step, checkpoint)
        values = collections.defaultdict(list)
        for row in self.rows:
            for name, value in row.items():
                values[name].append(value)
        elapsed = max(time.monotonic() - self._since, 1e-9)
        result = {name: float(np.mean(v)) for name, v in values.items()}
        result |= {
            "images_per_second": self._images / elapsed,
            "input_wait": self._waited / elapsed,
        }
        self.rows = []
        self.restart_clock()
        return result


def _describe(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
