"""Trackers: where a run is watched, besides `metrics.jsonl`.

`metrics.jsonl` is the truth and is always written; trackers show it. TensorBoard can forget: at a
resume it drops the points after the checkpoint, as `metrics.jsonl` does, and gets them again. W&B
and MLflow cannot, so they get each row once. `trackers/NAME.json` in the workdir says which run of
the tracker this is, and the last row that it has. At a start it gets the rows that it lacks, and
no row that it has, although a resumed run makes the rows since its checkpoint again: they are equal
but for clocks. So a tracker that was away, or that is added to a run later, becomes complete.

A kill between a row and its note in that file sends the row twice: W&B drops the second online,
and in MLflow equal points lie on each other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import importlib.util
import logging
import os
import pathlib
import secrets
import time
from typing import Any, Protocol

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import read_json, write_json

logger = logging.getLogger(__name__)

PROJECT = "gigatok_jax"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set


@dataclasses.dataclass(frozen=True)
class Run:
    """What a tracker is told of a run.

    Attributes:
      workdir: an existing folder; its name is the run's.
      step: number of updates made so far.
      config: the configuration, flat: `a.b` to a JSON value.
      id: of the run in the tracker, the same after a resume.
    """

    workdir: pathlib.Path
    step: int = 0
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    id: str = ""

    @property
    def name(self) -> str:
        return self.workdir.resolve().name


class Tracker(Protocol):
    """Shows a run's metrics and pictures. Made from a `Run`; any method may raise any error."""

    def row(
        self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """Takes metrics and uint8 pictures `[H, W, 3]`, by name."""

    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, run: Run):
        folder = run.workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Not SummaryWriter, whose thread would keep a full disk to itself until the run hangs.
        self._events = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)  # TensorBoard drops later points of older files
        self._write(Event(step=run.step + 1, session_log=start))

    def row(self, step, values, pictures):
        for name, array in pictures.items():
            image = summary.image(name, array, dataformats="HWC")
            self._write(Event(step=step, summary=image))
        for name, value in values.items():
            self._write(Event(step=step, summary=summary.scalar(name, value)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()

    def close(self, *, failed):
        self._events.close()


class Wandb:
    """Weights & Biases. Offline, each process leaves its own folder, of the same run.

    W&B's own step must grow from row to row, and a step has two rows if it is evaluated; so it is
    the row's place, in all folders, and charts have the metric `step` as their x axis.
    `wandb sync` (0.30 and newer) appends the folders of a run to each other, oldest first.
    """

    def __init__(self, run: Run):
        # By default W&B waits at the end of a run until its server is back.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        import wandb

        folder = {} if "WANDB_DIR" in os.environ else {"dir": str(run.workdir)}
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id,
            resume="allow",
            config=dict(run.config),
            **folder,
        )
        self._run.define_metric("*", step_metric="step")
        self._image = wandb.Image

    def row(self, step, values, pictures):
        images = {name: self._image(array) for name, array in pictures.items()}
        self._run.log({"step": step, **values, **images}, step=_place(step, values))

    def close(self, *, failed):
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """An MLflow server or store: that of MLFLOW_TRACKING_URI, or MLflow's default."""

    TAG = "gigatok_jax.run"

    def __init__(self, run: Run):
        # By default MLflow tries for minutes, in which all devices would wait for a dead server.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, mlflow.MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        runs = self._client.search_runs([place], f"tags.`{self.TAG}` = '{run.id}'", max_results=1)
        if runs:
            self._id = runs[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {self.TAG: run.id}
            self._id = self._client.create_run(place, tags=tags, run_name=run.name).info.run_id
            params = [Param(name, str(value)) for name, value in run.config.items()]
            self._client.log_batch(self._id, params=params)

    def row(self, step, values, pictures):
        for name, array in pictures.items():
            self._client.log_image(self._id, array, key=name, step=step, synchronous=True)
        now = int(1_000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, *, failed):
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class Once:
    """Sends a tracker the rows that it does not have yet; see the module's text.

    Args:
      name: of the tracker.
      make: makes it.
      run: what to tell it.
      rows: the rows of `metrics.jsonl`.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[Run], Tracker],
        run: Run,
        rows: Sequence[Mapping[str, float]],
    ):
        self._path = run.workdir / "trackers" / f"{name}.json"
        self._record = _own_record(self._path)
        write_json(self._path, self._record)
        self._tracker = make(dataclasses.replace(run, id=self._record["id"]))
        for row in rows:
            values = dict(row)
            self.row(values.pop("step"), values, {})

    def row(self, step, values, pictures):
        if _place(step, values) > self._record["sent"]:
            self._tracker.row(step, values, pictures)
            self._record["sent"] = _place(step, values)
            write_json(self._path, self._record)

    def close(self, *, failed):
        self._tracker.close(failed=failed)


def _place(step: int, values: Mapping[str, float]) -> int:
    """Grows from row to row: the evaluation of a step comes after its training metrics."""
    return 2 * step + is_evaluation(values)


def is_evaluation(values: Mapping[str, float]) -> bool:
    """Whether a row has held-out metrics, not those of training."""
    return "total" not in values


def _own_record(path: pathlib.Path) -> dict[str, Any]:
    """The record at `path`, or a new one if there is none or it was copied from another workdir.

    A workdir that was moved goes on as the same run. A copy is a run of its own, as long as the
    original is where it was.
    """
    here = str(path.resolve())
    record = {"id": secrets.token_hex(4), "path": here, "sent": -1}
    if path.exists():
        found = read_json(path, "what a tracker has")
        origin = pathlib.Path(found["path"])
        copied = found["path"] != here and origin.exists()
        if not copied or read_json(origin, "what a tracker has")["id"] != found["id"]:
            record = found | {"path": here}
    return record


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def check_installed(names: Sequence[str]) -> None:
    """Raises UserError for the first tracker whose library is missing."""
    for name in names:
        # A folder called wandb, which W&B leaves, is a package without an origin.
        spec = None if name == "tensorboard" else importlib.util.find_spec(name)
        if name != "tensorboard" and (spec is None or spec.origin is None):
            raise UserError(
                f"config.loop.trackers: expected trackers that are installed, got {name!r}; "
                f"pip install 'gigatok_jax[{name}]'"
            )


class Trackers:
    """The trackers of a run. One that fails is left out from then on, with one warning.

    Args:
      names: of the trackers, see `TRACKERS`.
      run: what to tell them.
      rows: the rows of `metrics.jsonl` so far.
    """

    def __init__(self, names: Sequence[str], run: Run, rows: Sequence[Mapping[str, float]]):
        self._open: dict[str, Tracker] = {}
        for name in names:
            with self._going_on_without(name):
                make = TRACKERS[name]
                forgets = make is TensorBoard
                self._open[name] = make(run) if forgets else Once(name, make, run, rows)

    def row(
        self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        for name, tracker in list(self._open.items()):
            with self._going_on_without(name):
                tracker.row(step, values, pictures)

    def close(self, *, failed: bool) -> None:
        for name, tracker in list(self._open.items()):
            with self._going_on_without(name):
                tracker.close(failed=failed)

    @contextlib.contextmanager
    def _going_on_without(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any type: they are other people's programs
            self._open.pop(name, None)
            logger.warning(
                "config.loop.trackers: %s failed (%s: %s); the run goes on without it, and "
                "metrics.jsonl has all metrics",
                *(name, type(error).__name__, first_line(error)),
            )
