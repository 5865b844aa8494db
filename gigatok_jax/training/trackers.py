"""Trackers: where a run is watched, besides `metrics.jsonl`.

`metrics.jsonl` is the truth and is always written; a tracker is a copy of it that may lag behind.
A tracker knows the last row that it has. At a start it gets the rows that it lacks, so that one
that was away, or that is added to a run later, becomes complete. A resumed run makes the rows since
its checkpoint again, equal but for clocks, and the tracker does not get again what it has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
import pathlib
import secrets
import shutil
import tempfile
import time
from typing import Any, Protocol

from google.protobuf.message import DecodeError
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import Path, as_path, in_bucket, read_json, real_path, upload, write_json

logger = logging.getLogger(__name__)

PROJECT = "gigatok_jax"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set


@dataclasses.dataclass(frozen=True)
class Run:
    """What a tracker is told of a run.

    Attributes:
      workdir: an existing folder; its name is the run's.
      step: number of updates made so far.
      rows: of `metrics.jsonl` so far.
      config: the configuration, flat: `a.b` to a JSON value.
    """

    workdir: Path
    step: int
    rows: Sequence[Mapping[str, float]]
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return real_path(self.workdir).name

    @functools.cached_property
    def id(self) -> str:
        """Of the run in trackers, from `trackers.json`.

        A workdir that was moved goes on as the same run. A copy is a run of its own, as long as the
        original is where it was.
        """
        path = self.workdir / "trackers.json"
        record = {"id": secrets.token_hex(4)}
        if path.exists():
            found = read_json(path, "the run in trackers")
            origin = as_path(found["path"])
            elsewhere = origin != real_path(path) and origin.exists()
            if not elsewhere or read_json(origin, "the run in trackers")["id"] != found["id"]:
                record = found
        write_json(path, record | {"path": str(real_path(path))})
        return record["id"]


class Tracker(Protocol):
    """Shows a run's metrics and pictures. Made from a `Run`; any method may raise any error.

    Attributes:
      last: place of the last row that the tracker had at the start; -1: none.
    """

    last: int

    def row(
        self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        """Takes metrics and uint8 pictures `[H, W, 3]`, by name."""

    def close(self, *, failed: bool) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/`; in a bucket, each row uploads the newest one again.

    A row is one event, so that no kill leaves a part of it, and a file tells which rows it has.
    """

    PART = 4_000_000  # bytes of an event file in a bucket before the next one begins

    def __init__(self, run: Run):
        self._folder = folder = run.workdir / "tensorboard"
        self.last = _last_shown(folder, run.step + 1)
        self._written = folder
        if in_bucket(folder):
            self._written = pathlib.Path(tempfile.mkdtemp(prefix="gigatok-"))
        folder.mkdir(exist_ok=True)
        self._open()
        start = SessionLog(status=SessionLog.START)  # TensorBoard drops later points of older files
        self._write(Event(step=run.step + 1, session_log=start))

    def _open(self) -> None:
        # Not SummaryWriter, whose thread would keep a full disk to itself until the run hangs. By
        # itself the name has only seconds, and an earlier file of this second must stay.
        self._events = EventsWriter(str(self._written / "events"), f".{time.time_ns()}")

    def row(self, step, values, pictures):
        event = Event(step=step)
        for name, array in pictures.items():
            event.summary.MergeFrom(summary.image(name, array, dataformats="HWC"))
        for name, value in values.items():
            event.summary.MergeFrom(summary.scalar(name, value))
        self._write(event)
        if self._written != self._folder:
            upload(self._written, self._folder)
            (part,) = self._written.iterdir()
            if part.stat().st_size > self.PART:
                self._events.close()
                part.unlink()
                self._open()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()

    def close(self, *, failed):
        self._events.close()
        if self._written != self._folder:
            shutil.rmtree(self._written)


def _last_shown(folder: Path, end: int) -> int:
    """Place of the last row before step `end` in a folder's event files; -1: none.

    A row does not count if TensorBoard drops it, because a newer file starts at or before its step.
    """
    for path in sorted(folder.glob("events*"), reverse=True):
        events = list(_read_events(path.read_bytes()))
        rows = [event for event in events if event.summary.value and event.step < end]
        if rows:
            return max(
                place(event.step, {value.tag: 0.0 for value in event.summary.value})
                for event in rows
            )
        end = min([end, *(event.step for event in events if event.HasField("session_log"))])
    return -1


def _read_events(content: bytes) -> Iterator[Event]:
    """The events of a file, up to the first one that a kill cut off or that is damaged."""
    start, around = 0, 12  # before an event: its length and a checksum; after it: another, 4 bytes
    while start + around <= len(content):
        size = int.from_bytes(content[start : start + 8], "little")
        data = content[start + around : start + around + size]
        if len(data) < size:
            return
        try:
            yield Event.FromString(data)
        except DecodeError:
            return
        start += around + size + 4


class Wandb:
    """Weights & Biases.

    W&B's own step must grow from row to row, and a step that is evaluated has two rows: it is the
    row's place, and charts have the metric `step` as their x axis. A resumed run goes on from the
    last step that the server has.

    Offline, W&B loses its last rows in a kill, and versions differ in whether `wandb sync` appends
    resumed parts. So the folder of each process has the run's rows from the first one on, and does
    not ask to be a resumed part: synced in order, as `wandb sync` does, each replaces the one
    before.
    """

    def __init__(self, run: Run):
        # By default W&B waits at the end of a run until its server is back.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")
        import wandb

        given = "WANDB_DIR" in os.environ or in_bucket(run.workdir)  # W&B's default: this folder
        folder = {} if given else {"dir": str(run.workdir)}
        offline = wandb.setup().settings.mode in ("offline", "dryrun")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id,
            resume=None if offline else "allow",
            config=dict(run.config),
            **folder,
        )
        self._run.define_metric("*", step_metric="step")
        self._image = wandb.Image
        self.last = self._run.step - 1

    def row(self, step, values, pictures):
        images = {name: self._image(array) for name, array in pictures.items()}
        row = {"step": step, **values, **images}
        self._run.log(row, step=place(step, values), commit=True)

    def close(self, *, failed):
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """An MLflow server or store: that of MLFLOW_TRACKING_URI, or MLflow's default.

    Tags of the run have its id, and the place of the last row, which is sent together with the row.
    """

    ID, LAST = "gigatok_jax.id", "gigatok_jax.last_row"

    def __init__(self, run: Run):
        # By default MLflow tries for minutes, in which all devices would wait for a dead server.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        import mlflow
        from mlflow.entities import Metric, Param, RunTag

        self._metric, self._tag, self._client = Metric, RunTag, mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        runs = self._client.search_runs([experiment], f"tags.`{self.ID}` = '{run.id}'")
        if runs:
            (info, tags) = runs[0].info, runs[0].data.tags
            self._client.update_run(info.run_id, status="RUNNING")
        else:
            tags = {self.ID: run.id}
            info = self._client.create_run(experiment, tags=tags, run_name=run.name).info
            params = [Param(name, str(value)) for name, value in run.config.items()]
            self._client.log_batch(info.run_id, params=params)
        self._id, self.last = info.run_id, int(tags.get(self.LAST, -1))

    def row(self, step, values, pictures):
        for name, array in pictures.items():
            self._client.log_image(self._id, array, key=name, step=step, synchronous=True)
        now = int(1_000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        last = self._tag(self.LAST, str(place(step, values)))
        self._client.log_batch(self._id, metrics=metrics, tags=[last])

    def close(self, *, failed):
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def place(step: int, values: Mapping[str, float]) -> int:
    """Of a row among the others: the evaluation of a step comes after its training metrics."""
    return 2 * step + is_evaluation(values)


def is_evaluation(row: Mapping[str, float]) -> bool:
    """Whether a row has held-out metrics, not those of training."""
    return "total" not in row


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
      stored: the pictures of a step that were written before.
    """

    def __init__(
        self, names: Sequence[str], run: Run, stored: Callable[[int], Mapping[str, np.ndarray]]
    ):
        self._open: dict[str, Tracker] = {}
        for name in names:
            with self._going_on_without(name):
                tracker = self._open[name] = TRACKERS[name](run)
                for row in run.rows:
                    step, values = int(row["step"]), {k: v for k, v in row.items() if k != "step"}
                    if place(step, values) > tracker.last:
                        tracker.row(step, values, stored(step) if is_evaluation(values) else {})

    def row(
        self, step: int, values: Mapping[str, float], pictures: Mapping[str, np.ndarray]
    ) -> None:
        for name, tracker in list(self._open.items()):
            if place(step, values) > tracker.last:
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
