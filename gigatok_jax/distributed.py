"""Runs of several processes: joining, waiting, exchanging values, and stopping together.

Only this module uses JAX's distributed runtime. In a single process its functions are no-ops.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import importlib.util
import os
import pathlib
import re
import signal
import sys
import traceback
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

from gigatok_jax import files, locks
from gigatok_jax.errors import RunStopped, UserError, first_line

TIMEOUT = 120  # seconds
WORKING = 7 * 24 * 3600  # seconds that a barrier waits for processes that are busy
GRACE = 10  # seconds within which every process raises an error common to all
CAUSES = "gigatok_causes/"  # prefix in the runtime's key-value store: errors of failed processes

_timeout = TIMEOUT  # set by `start`
T = TypeVar("T")


def start(coordinator: str = "", count: int = 0, index: int = -1, timeout: int = TIMEOUT) -> None:
    """Joins the other processes of this run; call it before any other JAX function.

    Args:
      coordinator: HOST:PORT of process 0. If empty, the other processes are found from the
        environment on TPU pods (Cloud and GKE), under SLURM's srun, and under Open MPI; anywhere
        else this process runs alone.
      count: number of processes; required with `coordinator`.
      index: index of this process; required with `coordinator`.
      timeout: seconds without a sign of life, or of waiting at a barrier, after which a process
        counts as lost and the run ends.

    Raises:
      UserError: the arguments contradict each other.
      RunStopped: the other processes did not join in time.
    """
    global _timeout
    given = (bool(coordinator), count > 0, index >= 0)
    if any(given) and not (all(given) and ":" in coordinator and index < count):
        raise UserError(
            "--coordinator, --processes and --process: expected all of them or none, as HOST:PORT, "
            f"a count and an index below it, got {coordinator!r}, {count} and {index}"
        )
    if timeout < 10:
        raise UserError(f"--timeout: expected at least 10 seconds, got {timeout}")
    if not coordinator and not _launched_with_others(os.environ):
        return
    _timeout = timeout
    # SIGTERM must end a process at once until there is something to save; see `stop_signals`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator or None,
            count or None,
            index if coordinator else None,
            # Launchers may assign each process some of the devices. A process that is described
            # by flags uses all devices of its machine.
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except ValueError as error:
        if coordinator:
            raise UserError(f"--coordinator, --processes and --process: {error}") from error
        # Otherwise this is a single TPU machine, which JAX cannot find a cluster for.
    except RuntimeError as error:
        raise RunStopped(f"the processes of this run could not connect: {error}") from error


def _launched_with_others(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows started this process as one of several."""
    devices = any(pathlib.Path(name).exists() for name in ("/dev/accel0", "/dev/vfio/0"))
    if devices and environment.get("JAX_PLATFORMS") != "cpu" and importlib.util.find_spec("libtpu"):
        return True  # a TPU: on Cloud only the metadata server knows the others, and JAX asks it
    sizes = [environment.get("OMPI_COMM_WORLD_SIZE", "1")]
    if "SLURM_STEP_NUM_NODES" in environment:  # set by srun, but not in the batch script
        sizes.append(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "") or any(int(n) > 1 for n in sizes)


def started() -> bool:
    """Whether this process has joined a run of several."""
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this process writes the logs, pictures and metrics."""
    return not started() or jax.process_index() == 0


def place() -> tuple[int, int]:
    """Index of this process and number of processes."""
    return (jax.process_index(), jax.process_count()) if started() else (0, 1)


def barrier(name: str, *, working: bool = False) -> None:
    """Waits until every process has reached this barrier.

    Args:
      name: of the barrier, for messages.
      working: let the other processes work for days, and give up only if one of them dies.

    Raises:
      RunStopped: a process is lost.
    """
    if started():
        _wait(name, WORKING if working else _timeout)


def agree(value: int) -> int:
    """Returns process 0's value, an int32, in every process."""
    if not started():
        return int(value)
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def in_main(make: Callable[[], T]) -> T | None:
    """Calls `make` in process 0 while the others wait. They return None.

    Raises:
      UserError: `make` raised it; the other processes refer to process 0.
    """
    result = error = None
    if is_main():
        try:
            result = make()
        except UserError as raised:
            error = raised
    barrier("the work of process 0", working=True)
    if agree(error is not None):
        raise error or UserError("process 0 failed; see its log")
    return result


def gather_rows(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Concatenates host arrays `[n, ...]` in process order; n must be the same everywhere."""
    if not started():
        return dict(arrays)
    # As bytes, because JAX would round float64 to float32.
    bits = {name: np.ascontiguousarray(x).view(np.uint8) for name, x in arrays.items()}
    gathered = multihost_utils.process_allgather(bits, tiled=True)
    return {name: np.asarray(x).view(arrays[name].dtype) for name, x in gathered.items()}


def sums(values: Mapping[str, float | np.ndarray]) -> dict[str, np.ndarray]:
    """Sums over all processes, always in the same order and so bit for bit reproducible."""
    rows = gather_rows({name: np.asarray(value)[None] for name, value in values.items()})
    return {name: row.sum(axis=0) for name, row in rows.items()}


def claim(path: files.Path, record: Mapping[str, Any], describes: str) -> None:
    """`files.claim` for all processes; only process 0 writes."""
    files.claim(path, record, describes, write=is_main())


@contextlib.contextmanager
def replacing(
    path: files.Path, check: Callable[[files.Path], None]
) -> Iterator[pathlib.Path | None]:
    """`files.replacing` in process 0; the others get None, and wait until all is written."""
    in_main(lambda: check(path))  # so that no process waits for another that was refused
    with files.replacing(path, check) if is_main() else contextlib.nullcontext() as aside:
        barrier("start of writing")
        yield aside
        barrier("end of writing", working=True)
    barrier("renaming", working=True)


@contextlib.contextmanager
def locked(folder: files.Path) -> Iterator[None]:
    """`locks.hold` in process 0, for all processes."""
    with contextlib.ExitStack() as stack:
        in_main(lambda: stack.enter_context(locks.hold(folder)))
        yield


class Stop:
    """Whether to stop after a step; every process gets the same answer.

    Attributes:
      signal: name of the signal received, or None.
    """

    def __init__(self):
        self.signal: str | None = None

    def after(self, step: int) -> bool:
        """Whether to stop now; every process must call this after each step."""
        if not started():
            return self.signal is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = "SIGTERM"
        return self.signal is not None


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turns the first SIGTERM or SIGINT to any process into a `Stop`; the second acts as usual."""
    stop, previous = Stop(), {}

    def handle(number, frame):
        stop.signal = signal.Signals(number).name
        print(f"\n{stop.signal}: finishing the step, then saving", file=sys.stderr)
        for other, handler in previous.items():
            signal.signal(other, handler)

    def pass_on(number, frame):
        signal.signal(signal.SIGINT, previous[signal.SIGINT])
        os.kill(os.getpid(), signal.SIGTERM)

    # With several processes, JAX's preemption service handles SIGTERM: it notifies the others and
    # picks a step that all of them can still reach. SIGINT is therefore passed on as SIGTERM.
    several = started()
    handlers = {signal.SIGINT: pass_on if several else handle, signal.SIGTERM: handle}
    for number, handler in handlers.items():
        previous[number] = signal.signal(number, handler)
    try:
        with _preemption_service() if several else contextlib.nullcontext():
            yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _preemption_service() -> Iterator[None]:
    """Runs JAX's preemption service; outside this context SIGTERM ends a process as usual."""
    state = _runtime()
    jax.config.update("jax_enable_preemption_service", True)
    state.initialize_preemption_sync_manager()
    try:
        yield
    finally:
        state.preemption_sync_manager.shutdown()
        state.preemption_sync_manager = None
        jax.config.update("jax_enable_preemption_service", False)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """If another process is lost, raises RunStopped with a message that names it.

    A lost process breaks collectives, which raise cryptic errors in the others. The survivors then
    meet at a barrier, whose failure names the missing process.
    """
    try:
        yield
    except Exception as error:
        if not started():
            raise
        # The loss of another process cannot cause these.
        own = isinstance(error, (UserError, OSError))
        cause = str(error) if own else f"{type(error).__name__}: {first_line(error)}"
        with contextlib.suppress(RuntimeError):
            _client().key_value_set(f"{CAUSES}{jax.process_index()}", cause)
        try:
            # If only this process failed, the others keep running and will not come: wait briefly.
            # Otherwise wait less than the timeout, after which the runtime kills this process.
            _wait("end", GRACE if own else _timeout // 2)
        except RunStopped as lost:
            if not own:
                traceback.print_exception(error)  # it may be the cause after all
                raise lost from error
        raise
    # Process 0 may still be working, and the runtime would report processes that exit as lost.
    barrier("the command's end", working=True)


def _wait(name: str, seconds: int) -> None:
    try:
        _client().wait_at_barrier(f"gigatok_{name}", 1_000 * seconds)
    except RuntimeError as error:
        raise RunStopped(_describe_loss(str(error), name, seconds)) from error


def _describe_loss(message: str, name: str, seconds: int) -> str:
    """Names the processes missing at a barrier, with the errors that they left behind."""
    # The runtime's message lists the missing processes in one of two forms.
    listed = re.search(r"task names:\s*([\d\s,]+)", message)
    missing = listed[1].replace(",", " ").split() if listed else re.findall(r"task:(\d+)", message)
    causes = {}
    with contextlib.suppress(RuntimeError):
        causes = dict(_client().key_value_dir_get(CAUSES)) if listed else {}
    errors = "".join(
        f"; process {key.rpartition('/')[2]}: {text}"
        for key, text in sorted(causes.items())
        if text
    )
    if not missing:
        return (
            f"the processes lost each other at {name!r} ({first_line(Exception(message))}){errors}"
        )
    which = "process" if len(missing) == 1 else "processes"
    return (
        f"lost {which} {', '.join(sorted(missing, key=int))} of 0 to {jax.process_count() - 1}, "
        f"not at {name!r} within {seconds} s{errors}; the same command resumes from the last "
        "checkpoint"
    )


def _client() -> Any:
    return _runtime().client


def _runtime() -> Any:
    # Barriers with a timeout and switching the preemption service have no public API.
    from jax._src import distributed

    return distributed.global_state
