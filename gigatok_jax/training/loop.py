"""The training loop of every task.

`train` reads top to bottom in the order in which things happen: devices, task, data, workdir,
state, steps. A workdir holds `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`,
`pictures/` and, at the end, `bundle/`.
"""

import collections
from collections.abc import Callable, Hashable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import json
import logging
import time
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
from tqdm import tqdm

from gigatok_jax import bundles, distributed, sharding
from gigatok_jax.config import from_mapping
from gigatok_jax.data import pipeline
from gigatok_jax.errors import RunStopped, UserError
from gigatok_jax.files import MACHINE, Path, as_path, is_of_bucket, read_json, reason, write_json
from gigatok_jax.planning import chips, flops
from gigatok_jax.training import finetuning
from gigatok_jax.training.checkpoints import Checkpoints, Restored, last_good, saved_steps
from gigatok_jax.training.task import HeldOut, RunConfig, Task
from gigatok_jax.training.telemetry import Telemetry, Trace
from gigatok_jax.training.trackers import check_installed

logger = logging.getLogger(__name__)

STEPS_IN_FLIGHT = 2  # keeps a device busy while the host prepares the next step

# Config prefixes that change the structure of a checkpoint, and fields that change it when they go
# to or from zero.
STRUCTURE = (
    "config.task",
    "config.model",
    "config.freeze",
    "config.objective.discriminator",
    "config.optimizer.algorithm",
    "config.optimizer.decayed",
)
SWITCHES = ("config.average_decay", "config.optimizer.clip")


def train(run: RunConfig, workdir: Path) -> None:
    """Trains to the end, resuming from the newest checkpoint in `workdir` if it has one.

    Args:
      run: what to train.
      workdir: where the run lives; created if it is missing, and locked against other runs.

    Raises:
      UserError: the configuration, data, weights or `workdir` cannot be used; the results in
        `workdir` are then as they were.
      RunStopped: a metric became non-finite or the disk full (without a checkpoint), or a signal
        stopped the run (after a checkpoint).
    """
    if not run.steps and not getattr(run, "branch_from", ""):
        logger.info(
            "%g epochs of %d images are %d steps", run.epochs, run.epoch_images, run.total_steps
        )

    # Check first what needs no files: a bad mesh is rejected before networks and data load.
    try:
        mesh = sharding.make_mesh(run.mesh)
        sharding.check_batch(run.batch_size, run.accumulate, mesh)
        block = sharding.batch_block(mesh)
    except ValueError as error:
        raise UserError(f"config.{error}") from error
    distributed.in_main(lambda: check_installed(run.loop.trackers))

    # Open networks and data first, so that a run that cannot start leaves nothing behind.
    task = run.open_task()
    batches = pipeline.train_batches(run.data, task.image_size, run.batch_size, run.seed, *block)
    task.set_data(batches)
    held_out = HeldOut(task, mesh)

    config, steps = run.loop, run.total_steps
    with contextlib.ExitStack() as stack:
        stack.callback(batches.close)
        stack.enter_context(distributed.locked(workdir))
        stack.enter_context(_unwritable(workdir))
        changed = _check_workdir(workdir, run)
        distributed.in_main(lambda: bundles.check_replaceable(workdir / "bundle"))
        given = finetuning.read(task) if run.init_from and changed is None else None
        # Place frozen networks once; host arrays would be copied to the devices at every step.
        shardings = sharding.frozen_shardings(task.frozen, mesh, shard=run.mesh.shard_frozen)
        frozen = sharding.put(task.frozen, shardings)

        # The state comes from the newest checkpoint, another run, a bundle, or initialization.
        abstract = abstract_state(task, mesh)
        origin = as_path(task.branch[0]) if task.branch and changed is None else workdir
        # Before the state is read, whose shapes depend on what must be equal.
        check_progress = functools.partial(_check_progress, task, origin)
        branch = _restore_branch(task, abstract, check_progress) if origin != workdir else None
        telemetry = None
        # Closed after the checkpoints are written, because trackers may wait for their servers.
        stack.push(lambda kind, *_: telemetry and telemetry.close(failed=kind is not None))
        checkpoints = Checkpoints(
            workdir / "checkpoints",
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            commit=config.commit,
        )
        stack.callback(checkpoints.close)
        restored = branch or checkpoints.restore(abstract, check=check_progress)
        if restored is None:
            start, state, unlogged = 0, fresh_state(task, abstract, run.seed), []
            if run.freeze and not given and distributed.is_main():
                parts = ", ".join(run.freeze)
                logger.warning("config.freeze: without init_from, %s keep random weights", parts)
            if given:
                state = finetuning.adopt(state, given)
                task.provenance = given.provenance
                del given  # the host's copy
        else:
            start, state, progress = restored
            task.provenance = progress.get("provenance", {})
            batches.set_state(progress["batches"])
            unlogged = progress["unlogged"]
            logger.info("resuming from step %d in %s", start, origin)
        distributed.barrier("config", working=True)  # all processes have read the old one
        if distributed.is_main():
            for line in changed or ():
                logger.warning(line)
            write_json(workdir / "config.json", _as_json(run))

        if distributed.is_main():
            # Drops rows of steps after `start`.
            telemetry = Telemetry(workdir, start, config.trackers, _flat(_as_json(run)))
        stop = stack.enter_context(distributed.stop_signals())
        replicated = sharding.replicated(mesh)
        norms = jax.jit(task.norms, static_argnames="phase", out_shardings=replicated)
        meter = Meter(unlogged)

        def check(step, state):
            phase = task.phase(step - 1)
            return meter.check(step, norms(state, phase=phase), checkpoints.latest)

        def save(step, state):
            # Never save non-finite values: a run that resumes from them could not recover.
            check(step, state)
            progress = {
                "batches": device_batches.get_state(),
                # With the rows since the last log, a resumed run logs the same means as one that
                # never stopped. Copied, because the list grows while the checkpoint is written.
                "unlogged": list(meter.rows),
                "identity": dict(task.identity),
                "provenance": dict(task.provenance),
                "data_version": task.data_version,
            }
            checkpoints.save(step, state, progress)

        def evaluate(step, state):
            metrics, pictures = held_out(state, frozen)  # collective: all processes
            if telemetry:
                telemetry.row(step, metrics, pictures)
                logger.info("step %d: %s", step, _describe(metrics))
            meter.restart_clock()

        def due(every, step):
            return (every and step % every == 0) or step == steps

        # The checkpoint of a step is saved before its evaluation, so a kill in between leaves the
        # evaluation missing. Only process 0, which has the log, can tell. A fresh run or a branch
        # has no checkpoint of its own yet.
        resumed = checkpoints.latest == start and due(config.evaluate_every, start)
        if resumed and not distributed.agree(telemetry is None or telemetry.evaluated(start)):
            evaluate(start, state)

        step_function = jit_step(task, state, mesh)
        device_batches = pipeline.prefetch_to_device(
            batches, functools.partial(sharding.put_batch, mesh)
        )
        peak = chips.peak_flops(mesh.devices.flat) if telemetry else None
        plain = jit_step(task.without_remat(), state, mesh)

        @functools.cache
        def step_flops(phase):
            return flops.count(plain.trace(abstract, batch, frozen, phase=phase).jaxpr)

        if telemetry and 0 < config.profile_at <= start:
            logger.info(
                "config.loop.profile_at: no trace of step %d: the run goes on after step %d",
                *(config.profile_at, start),
            )
        # One process is enough for a trace: all run the same program.
        trace = Trace(
            workdir / "tensorboard",
            first=config.profile_at if telemetry else 0,
            last=min(config.profile_at + config.profile_steps - 1, steps),
            paused=meter.paused,
        )
        stack.callback(trace.close)
        if telemetry and start < steps:
            logger.info("compiling the training step; on a CPU this can take minutes")
        silent = None if telemetry else True  # None shows the bar only on a terminal
        bar = stack.enter_context(
            tqdm(initial=start, total=steps, unit="step", disable=silent, mininterval=1)
        )
        for step in range(start + 1, steps + 1):
            phase = task.phase(step - 1)
            trace.before(step, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                batch = meter.wait(device_batches)
                state, metrics = step_function(state, batch, frozen, phase=phase)
                meter.add(metrics, len(batch["label"]), phase)
            trace.after(step, state)
            bar.update()

            # Fetch metrics only here; fetching at every step would stall the devices.
            if due(config.log_every, step):
                row = check(step, state) | meter.row(step_flops, peak)
                checkpoints.check()
                if telemetry:
                    row |= peak_memory(mesh)
                    if advice := task.advise({"step": step} | row):
                        logger.warning("step %d: %s", step, advice)
                    telemetry.row(step, row)
                    bar.set_postfix_str(
                        f"total {row['total']:.4g}, input wait {row['input_wait']:.1%}"
                    )
                    if bar.disable:
                        logger.info("step %d/%d: %s", step, steps, _describe(row))

            # Save before evaluating, so that a failed evaluation costs no steps.
            if due(config.checkpoint_every, step):
                save(step, state)

            if due(config.evaluate_every, step):
                check(step, state)  # do not evaluate non-finite weights
                evaluate(step, state)

            # Stop only when this step is completely done. All processes agree on the step.
            if stop.after(step) and step < steps:
                save(step, state)
                bundles.save(workdir / "bundle", *task.bundle(state))
                raise RunStopped(
                    f"stopped by {stop.signal} after step {step} of {steps}; the state is "
                    "saved, and the same command resumes the run"
                )
        bundles.save(workdir / "bundle", *task.bundle(state))
        if telemetry:
            logger.info("done; the trained weights are in %s", workdir / "bundle")


def abstract_state(task: Task, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, types and shardings of a task's state; nothing is allocated."""
    boxed = jax.eval_shape(task.init, jax.random.key(0))
    return sharding.abstract(nn.meta.unbox(boxed), sharding.state_shardings(boxed, mesh))


def fresh_state(task: Task, abstract: Any, seed: int) -> Any:
    """A new state, created sharded, so that no device ever holds all of it."""

    def init(key):
        return nn.meta.unbox(task.init(key))

    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    # This runs once, and on CPU optimizing its hundreds of random generators would take a minute.
    (device,) = {leaf.sharding.mesh.devices.flat[0] for leaf in jax.tree.leaves(abstract)}
    options = {"xla_backend_optimization_level": 0} if device.platform == "cpu" else None
    return jax.jit(init, out_shardings=shardings, compiler_options=options)(jax.random.key(seed))


def jit_step(task: Task, state: Any, mesh: jax.sharding.Mesh) -> Callable:
    """Compiles `task.step` as `(state, batch, frozen, *, phase) -> (state, metrics)`.

    The input state is donated: do not use it after the call. The output state gets the shardings of
    `state`, which may be abstract.
    """

    def step(state, batch, frozen, *, phase):
        with sharding.use(mesh):
            return task.step(state, batch, frozen, phase)

    return jax.jit(
        step,
        donate_argnums=0,
        static_argnames="phase",
        out_shardings=(jax.tree.map(lambda array: array.sharding, state), None),
    )


def _restore_branch(task: Task, abstract: Any, check: Callable) -> Restored:
    """Restores the checkpoint of another run to start from, without its unlogged metrics."""
    workdir, step = task.branch
    checkpoints = Checkpoints(as_path(workdir) / "checkpoints", read_only=True)
    restored = checkpoints.restore(abstract, step, check)
    steps = ", ".join(map(str, checkpoints.steps)) or "none"
    checkpoints.close()
    if restored is None:
        raise UserError(f"{workdir}: expected a checkpoint of step {step}, found {steps}")
    return restored._replace(progress=restored.progress | {"unlogged": []})


@contextlib.contextmanager
def _unwritable(workdir: Path) -> Iterator[None]:
    """Turns the error of a file that cannot be written in the middle of a run into RunStopped."""
    try:
        yield
    except Exception as error:
        if not is_of_bucket(error) and getattr(error, "errno", None) not in MACHINE:
            raise
        where = f"{getattr(error, 'filename', None) or workdir}: {reason(error)}"
        raise RunStopped(f"{where}; {last_good(workdir / 'checkpoints')}") from error


def _check_workdir(workdir: Path, run: RunConfig) -> list[str] | None:
    """Compares `run` with the one that left checkpoints in `workdir`; None if there are none.

    Returns:
      A line for each field that differs and may.

    Raises:
      UserError: a field differs on which the structure of the checkpoints depends.
    """
    path = workdir / "config.json"
    if not saved_steps(workdir / "checkpoints") or not path.exists():
        return None
    old = read_json(path, "the run there")
    if old.get("task") == run.task:
        # Options added after the run was created are missing from its config.json; use their
        # defaults.
        old = _as_json(from_mapping(type(run), old, f"{path}: config"))
    old, new = (_flat({"config": mapping}) for mapping in (old, _as_json(run)))
    changed = []
    for name in sorted(old.keys() | new.keys()):
        before, now = old.get(name), new.get(name)
        if before == now:
            continue
        if name.startswith(STRUCTURE) or (name in SWITCHES and bool(before) != bool(now)):
            raise UserError(f"{name}: {now!r}, but the run in {workdir} has {before!r}")
        changed.append(f"{name}: {now!r}, was {before!r} when this run started")
    return changed


def _check_progress(task: Task, origin: Path, start: int, progress: Mapping) -> None:
    """Raises UserError if a run cannot go on from this checkpoint; warns if its data changed."""
    for name, value in task.identity.items():
        if progress["identity"].get(name) != value:
            raise UserError(f"{origin}: its checkpoint was trained with another {name}")
    if start > task.run.total_steps:
        raise UserError(
            f"config.steps: expected at least {start}, the step of the checkpoint in {origin}, "
            f"got {task.run.total_steps}"
        )
    if progress.get("data_version") != task.data_version and distributed.is_main():
        logger.warning(
            "the data have changed since the checkpoint in %s; the order of the training images "
            "has changed as well",
            origin,
        )


def _as_json(run: RunConfig) -> dict[str, Any]:
    """The run as `config.json` stores it, with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def _flat(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(mapping, sep=".")


def peak_memory(mesh: jax.sharding.Mesh) -> dict[str, float]:
    """The most memory that a device of this process had in use; empty where it is not known."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    found = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return {"peak_memory_gb": max(found) / 1e9} if found else {}


class Meter:
    """Collects metrics on the devices and fetches many at once, so that steps overlap.

    Attributes:
      rows: the metrics of each step since the last log.
    """

    def __init__(self, rows: list[dict[str, float]]):
        self.rows = list(rows)
        self._pending = collections.deque()
        self.restart_clock()

    def restart_clock(self):
        self._since, self._waited, self._images = time.monotonic(), 0.0, 0
        self._phases = collections.Counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of a block, which is not training, out of the rates."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def wait(self, batches):
        start = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - start
        return batch

    def add(self, metrics: Mapping[str, jax.Array], images: int, phase: Hashable):
        self._pending.append(metrics)
        self._images += images
        self._phases[phase] += 1
        if len(self._pending) > STEPS_IN_FLIGHT:
            # Otherwise the host would run ahead, and its batches would fill the memory.
            jax.block_until_ready(self._pending[-1 - STEPS_IN_FLIGHT])

    def check(
        self, step: int, norms: Mapping[str, jax.Array], checkpoint: int | None
    ) -> dict[str, float]:
        """Fetches pending metrics and the norms of the weights, and returns these.

        Raises:
          RunStopped: one of the values is not finite.
        """
        *fetched, norms = jax.device_get([*self._pending, norms])
        first = step - len(fetched) + 1
        self._pending.clear()
        for at, metrics in enumerate(fetched, start=first):
            self.rows.append(_finite(metrics, at, checkpoint))
        return _finite(norms, step, checkpoint)

    def row(self, step_flops: Callable[[Hashable], float], peak: float | None) -> dict[str, float]:
        """Means and rates since the last call, of what `check` has fetched.

        A metric that some steps lack (a term that starts later) is averaged over the rest.

        Args:
          step_flops: FLOPs of the model in a step of a phase. Counting them takes seconds the first
            time, which are not in the rates.
          peak: FLOPs per second of all devices; None if unknown: no `mfu`.
        """
        values = collections.defaultdict(list)
        for row in self.rows:
            for name, value in row.items():
                values[name].append(value)
        elapsed = max(time.monotonic() - self._since, 1e-9)
        result = {name: float(np.mean(v)) for name, v in values.items()}
        result["images_per_second"] = self._images / elapsed
        result["input_wait"] = self._waited / elapsed
        if peak:
            total = sum(steps * step_flops(phase) for phase, steps in self._phases.items())
            result["mfu"] = total / elapsed / peak
        self.rows = []
        self.restart_clock()
        return result


def _finite(metrics: Mapping[str, Any], step: int, checkpoint: int | None) -> dict[str, float]:
    """Metrics as numbers; raises RunStopped if one is not finite."""
    row = {name: float(value) for name, value in metrics.items()}
    bad = [name for name, value in row.items() if not np.isfinite(value)]
    if bad:
        last = f"step {checkpoint}" if checkpoint is not None else "none yet"
        raise RunStopped(
            f"{', '.join(bad)} became {row[bad[0]]} at step {step}; last good checkpoint: {last}. "
            "Try a lower optimizer.rate or a longer warm-up"
        )
    return row


def _describe(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
