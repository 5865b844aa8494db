"""Many processes as one run: how they find each other, wait for each other, and end together.

The one place that knows JAX's distributed runtime; in a single process, all here does nothing.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
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

from gigatok_jax import files
from gigatok_jax.errors import RunStopped, UserError

TIMEOUT = 120  # seconds
WORKING = 7 * 24 * 3600
GRACE = 10  # seconds in which all processes that fail alike do
CAUSES = "gigatok_causes/"

_timeout = TIMEOUT  # of this run; `start` sets it
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which processes there are.

    Attributes:
      coordinator: address and port of process 0; "": found out from the environment.
      count: how many; 0: found out.
      index: which one this is; -1: found out.
      timeout: seconds after which a process that is silent, or does not come where all others
        wait, is given up, and the run with it.
    """

    coordinator: str = ""
    count: int = 0
    index: int = -1
    timeout: int = TIMEOUT

    def __post_init__(self):
        given = (bool(self.coordinator), self.count > 0, self.index >= 0)
        if any(given) and not all(given):
            raise UserError(
                "--coordinator, --processes and --process: expected all of them or none, got "
                f"{self.coordinator!r}, {self.count} and {self.index}"
            )
        if all(given) and not (":" in self.coordinator and self.index < self.count):
            raise UserError(
                "--coordinator, --processes and --process: expected HOST:PORT, a number and a "
                f"smaller one, got {self.coordinator!r}, {self.count} and {self.index}"
            )
        if self.timeout < 10:
            raise UserError(f"--timeout: expected at least 10 seconds, got {self.timeout}")


def start(processes: Processes) -> None:
    """Joins the other processes, before anything else of JAX is called.

    Without a coordinator they are found where the environment tells of several: TPU pods (Cloud
    and GKE), SLURM's srun, Open MPI. Where it does not, this process is alone.

    Raises:
      RunStopped: the others do not come.
    """
    global _timeout
    if not processes.coordinator and not _several(os.environ):
        return
    _timeout = processes.timeout
    jax.config.update("jax_enable_preemption_service", False)  # until there is something to save
    try:
        jax.distributed.initialize(
            processes.coordinator or None,
            processes.count or None,
            processes.index if processes.coordinator else None,
            # Those of a launcher's environment; given by hand, all of the machine.
            cluster_detection_method="deactivate" if processes.coordinator else None,
            initialization_timeout=processes.timeout,
            heartbeat_timeout_seconds=processes.timeout,
            shutdown_timeout_seconds=processes.timeout,
        )
    except ValueError as error:
        if processes.coordinator:
            raise UserError(f"--coordinator, --processes and --process: {error}") from error
        # Otherwise a TPU machine on its own, of which no cluster knows.
    except RuntimeError as error:
        raise RunStopped(f"the processes of this run did not come together: {error}") from error


def _several(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started this process as one of several."""
    devices = any(pathlib.Path(name).exists() for name in ("/dev/accel0", "/dev/vfio/0"))
    if devices and environment.get("JAX_PLATFORMS") != "cpu" and importlib.util.find_spec("libtpu"):
        return True  # A TPU: on Cloud only its metadata server knows of others, and JAX asks it.
    sizes = [environment.get("OMPI_COMM_WORLD_SIZE", "1")]
    if "SLURM_STEP_NUM_NODES" in environment:  # of srun, not of the batch script around it
        sizes.append(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "") or any(int(n) > 1 for n in sizes)


def started() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def is_main() -> bool:
    """Whether this is the process that writes logs, pictures and metrics."""
    return not started() or jax.process_index() == 0


def place() -> tuple[int, int]:
    """Which process this is, and of how many."""
    return (jax.process_index(), jax.process_count()) if started() else (0, 1)


def barrier(name: str, *, working: bool = False) -> None:
    """Waits until all processes are here.

    Args:
      name: what it follows, for messages.
      working: the others may be at work for long; only a silent process is given up.

    Raises:
      RunStopped: one does not come.
    """
    if started():
        _wait(name, WORKING if working else _timeout)


def agree(value: int) -> int:
    """Process 0's value, in all processes."""
    if not started():
        return int(value)
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def in_main(make: Callable[[], T]) -> T | None:
    """What `make` gives, called in process 0 while the others wait; they get None.

    Raises:
      UserError: process 0's; the others raise one that points to it.
    """
    result = error = None
    if is_main():
        try:
            result = make()
        except UserError as raised:
            error = raised
    barrier("the work of process 0", working=True)
    if agree(error is not None):
        raise error or UserError("process 0 cannot go on; it says why")
    return result


def gather_rows(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of all processes, those of process 0 first; exact for any type, float64 too.

    Args:
      arrays: host arrays `[n, ...]`, n the same in all processes.
    """
    if not started():
        return dict(arrays)
    bits = {name: np.ascontiguousarray(x).view(np.uint8) for name, x in arrays.items()}
    gathered = multihost_utils.process_allgather(bits, tiled=True)
    return {name: np.asarray(x).view(arrays[name].dtype) for name, x in gathered.items()}


def sums(values: Mapping[str, float | np.ndarray]) -> dict[str, np.ndarray]:
    """Sums over all processes, in the order of processes."""
    rows = gather_rows({name: np.asarray(value)[None] for name, value in values.items()})
    return {name: row.sum(axis=0) for name, row in rows.items()}


def claim(path: pathlib.Path, record: Mapping[str, Any], describes: str) -> None:
    """`files.claim`, of which process 0 alone writes."""
    files.claim(path, record, describes, write=is_main())


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """`files.replacing`, with one path aside, which all processes write to."""
    aside = files.aside_path(path, agree(os.getpid()))
    if is_main():
        with files.replacing(path):
            barrier("start of writing")
            yield aside
            barrier("end of writing", working=True)
    else:
        barrier("start of writing")
        yield aside
        barrier("end of writing", working=True)
    barrier("renaming", working=True)


class Stop:
    """Whether to stop after a step: the same answer in all processes, which ask after each step.

    Attributes:
      signal: name of the one that was the reason, or None.
    """

    def __init__(self):
        self.signal: str | None = None

    def after(self, step: int) -> bool:
        if not started():
            return self.signal is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = "SIGTERM"
        return self.signal is not None


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """A `Stop` for the first SIGTERM or SIGINT that any process gets within.

    In a single process, a second one acts at once.
    """
    stop, previous = Stop(), {}

    def handle(number, frame):
        del frame
        stop.signal = signal.Signals(number).name
        print(f"\n{stop.signal}: finishing the step, then saving", file=sys.stderr)
        for other, handler in previous.items():
            signal.signal(other, handler)

    def pass_on(number, frame):
        del number, frame
        signal.signal(signal.SIGINT, previous[signal.SIGINT])
        os.kill(os.getpid(), signal.SIGTERM)

    service = _preemption_service() if started() else contextlib.nullcontext()
    # With it SIGTERM is the runtime's, which tells the other processes and finds a common step.
    handlers = {signal.SIGINT: pass_on if started() else handle, signal.SIGTERM: handle}
    for number, handler in handlers.items():
        previous[number] = signal.signal(number, handler)
    try:
        with service:
            yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _preemption_service() -> Iterator[None]:
    """Lets the runtime wait for SIGTERM; outside, that ends a process as it ends any other."""
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
    """Ends this process when another one is lost, with a message that names it.

    Raises:
      RunStopped: instead of what a broken collective raises.
    """
    try:
        yield
    except Exception as error:
        if not started():
            raise
        own = isinstance(
            error, (UserError, OSError)
        )  # not what the loss of another may have caused
        cause = str(error) if own else f"{type(error).__name__}: {str(error).splitlines()[:1]}"
        with contextlib.suppress(RuntimeError):
            _client().key_value_set(f"{CAUSES}{jax.process_index()}", cause)
        try:
            # The others of an error that only this process has go on until it ends.
            _wait("end", GRACE if own else _timeout // 2)  # before the runtime ends us
        except RunStopped as lost:
            if not own:
                traceback.print_exception(error)  # it may be the cause after all
                raise lost from error
        raise
    # Process 0 may have more to do; the runtime takes those that leave for a failure.
    barrier("the command's end", working=True)


def _wait(name: str, seconds: int) -> None:
    try:
        _client().wait_at_barrier(f"gigatok_{name}", 1_000 * seconds)
    except RuntimeError as error:
        raise RunStopped(_loss(str(error), name, seconds)) from error


def _loss(message: str, name: str, seconds: int) -> str:
    """Says of a broken barrier which processes are missing, and why where they told."""
    listed = re.search(r"task names:\s*([\d\s,]+)", message)
    missing = listed[1].replace(",", " ").split() if listed else re.findall(r"task:(\d+)", message)
    causes = {}
    with contextlib.suppress(RuntimeError):
        causes = dict(_client().key_value_dir_get(CAUSES)) if listed else {}
    told = "".join(
        f"; process {key.rpartition('/')[2]}: {text}"
        for key, text in sorted(causes.items())
        if text
    )
    if not missing:
        return f"the run's processes lost each other at {name!r} ({message.splitlines()[0]}){told}"
    which = "process" if len(missing) == 1 else "processes"
    return (
        f"lost {which} {', '.join(sorted(missing, key=int))} of 0 to {jax.process_count() - 1}, "
        f"not at {name!r} within {seconds} s{told}; the same command goes on from the last "
        "checkpoint"
    )


def _client() -> Any:
    return _runtime().client


def _runtime() -> Any:
    # Barriers with a time-out, and when the runtime takes SIGTERM, have no public name.
    from jax._src import distributed

    return distributed.global_state
