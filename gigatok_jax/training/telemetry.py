"""Records of a run: `metrics.jsonl`, pictures, what trackers are sent, and traces."""

from collections.abc import Callable, Mapping, Sequence
import json
import logging
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

from gigatok_jax import pictures as png
from gigatok_jax.files import Lines, Path, in_bucket, json_text, replacing, upload
from gigatok_jax.training.trackers import Run, Trackers, is_evaluation

logger = logging.getLogger(__name__)


class Telemetry:
    """Writes one process's metrics and pictures into a workdir, and sends them to trackers.

    Rows after `step`, which a killed run left behind, are dropped.

    Args:
      workdir: an existing folder.
      step: number of updates made so far.
      trackers: their names, see `trackers.TRACKERS`.
      config: the run's configuration, flat, for trackers.
    """

    def __init__(
        self,
        workdir: Path,
        step: int,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ):
        self._pictures = workdir / "pictures"
        self._path = workdir / "metrics.jsonl"
        rows = _keep_rows(self._path, step)
        self._lines = Lines(self._path)
        self._trackers = Trackers(trackers, Run(workdir, step, rows, config or {}), self._stored)

    def evaluated(self, step: int) -> bool:
        """Whether `metrics.jsonl` has the step's held-out metrics."""
        return any(row["step"] == step and is_evaluation(row) for row in read_metrics(self._path))

    def row(
        self,
        step: int,
        values: Mapping[str, float],
        pictures: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Records metrics, and uint8 pictures `[H, W, 3]` as `pictures/NAME_STEP.png`."""
        pictures = pictures or {}
        for name, array in pictures.items():
            png.save_png(self._pictures / f"{name}_{step:08d}.png", array)
        # After the pictures: the row says that the evaluation is done.
        self._lines.add(json_text({"step": step} | dict(values)))
        self._trackers.row(step, values, pictures)

    def _stored(self, step: int) -> dict[str, np.ndarray]:
        """The pictures of a step that were written before."""
        ending = f"_{step:08d}.png"
        paths = sorted(self._pictures.glob(f"*{ending}"))
        return {path.name.removesuffix(ending): png.read(path) for path in paths}

    def close(self, *, failed: bool = False) -> None:
        self._lines.close()
        self._trackers.close(failed=failed)


class Trace:
    """A trace of a few steps, which TensorBoard's profile plugin and XProf open.

    Args:
      folder: gets `plugins/profile/TIME/HOST.xplane.pb`.
      first: the first step to trace; 0: none.
      last: the last one.
      paused: context manager around what is not part of training.
    """

    def __init__(self, folder: Path, first: int, last: int, paused: Callable):
        self._folder, self._first, self._last, self._paused = folder, first, last, paused
        self._written: pathlib.Path | None = None  # where, while a trace is taken

    def before(self, step: int, state: Any) -> None:
        """Starts the trace before its first step; `state` is what the step before returned."""
        if step == self._first:
            jax.block_until_ready(state)  # so that earlier steps are not in the trace
            with self._paused():
                here = not in_bucket(self._folder)
                self._written = self._folder if here else pathlib.Path(tempfile.mkdtemp())
                jax.profiler.start_trace(self._written)

    def after(self, step: int, state: Any) -> None:
        if self._written and step == self._last:
            jax.block_until_ready(state)
            with self._paused():
                self.close()

    def close(self) -> None:
        if self._written:
            written, self._written = self._written, None
            jax.profiler.stop_trace()
            logger.info("traced steps %d to %d into %s", self._first, self._last, self._folder)
            if written != self._folder:
                upload(written, self._folder)
                shutil.rmtree(written)


def read_metrics(path: Path) -> list[dict[str, float]]:
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


def _keep_rows(path: Path, step: int) -> list[dict[str, float]]:
    """Drops the rows after `step`, and returns the others."""
    if not path.exists():
        return []
    rows = [row for row in read_metrics(path) if row["step"] <= step]
    with replacing(path) as aside:
        aside.write_text("".join(json_text(row) + "\n" for row in rows))
    return rows
