"""Probes or training runs as one self-contained HTML file, alone or side by side."""

from collections.abc import Sequence
import pathlib

from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import page, probe_page, run_page
from gigatok_jax.files import read_json
from gigatok_jax.training.tasks import TASKS

PROBE = "probe"


def write(workdirs: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    """Writes the report of one run, or of several side by side.

    Args:
      workdirs: of finished probes, or of training runs of one task, finished or not.
      path: the HTML file.

    Raises:
      UserError: a folder is of neither, they are not all of one kind, or one has nothing to show.
    """
    kinds = [_kind(workdir) for workdir in workdirs]
    for workdir, kind in zip(workdirs, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"{workdir}: {_named(kind)}, but {workdirs[0]} is {_named(kinds[0])}; a report is "
                "of one kind"
            )
    subject = probe_page if kinds[0] == PROBE else run_page
    labels = page.labels(workdirs)
    found = [subject.read(*each) for each in zip(workdirs, labels, strict=True)]
    page.write(subject.make(found), path)


def _kind(workdir: pathlib.Path) -> str:
    """`PROBE`, or a training run's task."""
    if (workdir / "probe.json").exists():
        return PROBE
    path = workdir / "config.json"
    record = read_json(path, "the run") if path.exists() else None
    task = record.get("task") if isinstance(record, dict) else None
    if task not in TASKS:
        raise UserError(
            f"{workdir}: expected what `gigatok probe` or `gigatok train` left, found neither "
            "probe.json nor a run's config.json"
        )
    return task


def _named(kind: str) -> str:
    return "a probe" if kind == PROBE else f"a {kind.replace('_', ' ')}'s training run"
