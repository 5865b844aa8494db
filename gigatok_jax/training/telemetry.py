"""Records of a run: `metrics.jsonl`, TensorBoard events, pictures."""

from collections.abc import Mapping
import json
import pathlib
import time

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from gigatok_jax.files import json_text, replacing
from gigatok_jax.pictures import save_png


class Telemetry:
    """Writes one process's metrics and pictures into a workdir.

    Rows after `step`, which a killed run left behind, are dropped.

    Args:
      workdir: an existing folder.
      step: number of updates made so far.
    """

    def __init__(self, workdir: pathlib.Path, step: int):
        self._pictures = workdir / "pictures"
        self._path = workdir / "metrics.jsonl"
        _keep_rows(self._path, step)
        self._file = self._path.open("a")
        # Not SummaryWriter, whose thread would keep a full disk to itself until the run hangs.
        (workdir / "tensorboard").mkdir(exist_ok=True)
        self._events = EventsWriter(str(workdir / "tensorboard" / "events"))
        start = SessionLog(status=SessionLog.START)  # TensorBoard drops later points of older files
        self._write(Event(step=step + 1, session_log=start))

    def evaluated(self, step: int) -> bool:
        """Whether `metrics.jsonl` has the step's held-out metrics, whose row has no `total`."""
        rows = read_metrics(self._path)
        return any(row["step"] == step and "total" not in row for row in rows)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json_text({"step": step} | dict(values)) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._write(Event(step=step, summary=summary.scalar(name, value)))

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes uint8 `[H, W, 3]` arrays as `pictures/NAME_STEP.png`."""
        for name, array in pictures.items():
            save_png(self._pictures / f"{name}_{step:08d}.png", array)
            image = summary.image(name, array, dataformats="HWC")
            self._write(Event(step=step, summary=image))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()

    def close(self) -> None:
        self._file.close()
        self._events.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
    """Rows of a `metrics.jsonl`, up to the first line that a kill cut off or that is damaged."""
    rows = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            # NaN and infinity are stored as strings, see `json_text`.
            stored = json.loads(line).items()
            row = {name: float(value) for name, value in stored if value is not None}
            rows.append(row | {"step": int(row["step"])})
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError, OverflowError):
            break
    return rows


def _keep_rows(path: pathlib.Path, step: int) -> None:
    if path.exists():
        rows = [row for row in read_metrics(path) if row["step"] <= step]
        with replacing(path) as aside:
            aside.write_text("".join(json_text(row) + "\n" for row in rows))
