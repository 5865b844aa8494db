"""The report of training runs, finished or not: their curves in one chart a metric."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from gigatok_jax.config import from_mapping
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import curves, page
from gigatok_jax.evaluation.curves import HELD_OUT
from gigatok_jax.files import read_json
from gigatok_jax.training.tasks import TASKS
from gigatok_jax.training.telemetry import read_metrics

NAMES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "l2": "L2",
    "images_per_second": "images a second",
    "input_wait": "time waiting for input",
    "top5_accuracy": "top-5 accuracy",
}
TOTAL = {
    "tokenizer": "total loss",
    "generator": "cross entropy a code, nats",
    "linear_probe": "cross entropy, nats",
}
THROUGHPUT = ("images_per_second", "input_wait")
AT = "At step {step:,}."
CAPTIONS = {
    "reconstruction": "Held-out images, and below each its reconstruction, at step {step:,}.",
    "samples": "A class a column, drawn at step {step:,}.",
}
LEAD = """What a training run has left in its folder, up to its last logged step. A training value
is a mean over the steps since the one before it, and in the charts of long runs a mean of several
such; held-out values are of images that training does not see."""


def read(workdir: pathlib.Path, label: str) -> dict[str, Any]:
    """All that the report needs of one training run.

    Raises:
      UserError: it has logged nothing yet, or its `config.json` is damaged.
    """
    path = workdir / "config.json"
    mapping = read_json(path, "the run")
    config = from_mapping(TASKS[mapping["task"]], mapping, f"{path}: config")
    metrics = workdir / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.exists() else []
    if not rows:
        raise UserError(
            f"{metrics}: nothing logged yet; the first row comes at step "
            f"{min(config.loop.log_every, config.total_steps):,}"
        )
    return {
        "label": label,
        "task": config.task,
        "steps": config.total_steps,
        "rows": rows,
        "last": {name: v for row in rows for name, v in row.items() if v is not None},
        "settings": page.settings(mapping),
        "pictures": _newest(workdir / "pictures"),
    }


def _newest(folder: pathlib.Path) -> dict[str, tuple[int, pathlib.Path]]:
    """Name to step and file of the newest picture of each name, see `Telemetry.pictures`."""
    found = {}
    for path in sorted(folder.glob("*_[0-9]*.png")):
        name, _, step = path.stem.rpartition("_")
        found[name] = max(found.get(name, (0, path)), (int(step), path))
    return found


def make(runs: Sequence[Mapping[str, Any]]) -> page.Page:
    """The report of what `read` found; all runs are of one task."""
    task = runs[0]["task"]
    return page.Page(
        kind=f"Training of a {task.replace('_', ' ')}",
        lead=LEAD,
        table=_table(runs),
        notes=[],
        groups=_groups(runs),
        sections=[_section(run) for run in runs],
        legend=len(runs) > 1,
    )


def _metrics(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of all that has values: the total, then what is held out, then the rest."""
    names = dict.fromkeys(name for run in runs for name in run["last"])
    order = [name for name in names if name != "step"]
    return sorted(order, key=lambda name: (name != "total", not name.startswith(HELD_OUT)))


def _title(task: str, name: str) -> str:
    base = name.removeprefix(HELD_OUT)
    if base == "total" or (base == "loss" and name != base):
        return TOTAL[task]
    return NAMES.get(base, base.replace("_", " "))


def _table(runs: Sequence[Mapping[str, Any]]) -> page.Table:
    """A run a row: where it is, its loss, and what was last measured on held-out images."""
    names = _metrics(runs)
    shown = [name for name in names if name == "total" or name.startswith(HELD_OUT)]
    rows = []
    for run in runs:
        values = [_format(name, run["last"].get(name)) for name in shown]
        rows.append(page.Row([run["label"], _state(run), *values], "own"))
    return page.Table(["run", "step", *(_label(run["task"], name) for name in shown)], rows)


def _state(run: Mapping[str, Any]) -> str:
    step, steps = run["last"]["step"], run["steps"]
    return f"{step:,}, finished" if step >= steps else f"{step:,} of {steps:,}"


def _label(task: str, name: str) -> str:
    return _title(task, name) + (", held out" if name.startswith(HELD_OUT) else "")


def _format(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if name.removeprefix(HELD_OUT) in curves.SHARES else f"{value:.4g}"


def _groups(runs: Sequence[Mapping[str, Any]]) -> list[page.Group]:
    """A chart for each metric; training and held-out values of one are in one chart."""
    groups = {"Losses and metrics": [], "Optimization": [], "Throughput": []}
    shown = set()
    names = _metrics(runs)
    for name in names:
        trained, held_out = _pair(name, names)
        if trained in shown:
            continue
        shown.add(trained)
        if trained in THROUGHPUT:
            group = "Throughput"
        elif trained == "learning_rate" or trained.endswith("_norm"):
            group = "Optimization"
        else:
            group = "Losses and metrics"
        groups[group].append(_chart(runs, trained, held_out))
    return [page.Group(title, charts) for title, charts in groups.items() if charts]


def _pair(name: str, names: Sequence[str]) -> tuple[str, str]:
    """A metric's names in training and on held-out images; a total is the loss of its task."""
    base = name.removeprefix(HELD_OUT)
    if base in ("loss", "total") and "loss" not in names:
        return "total", f"{HELD_OUT}loss"
    return base, f"{HELD_OUT}{base}"


def _chart(runs: Sequence[Mapping[str, Any]], trained: str, held_out: str) -> page.Picture:
    steps = [row["step"] for run in runs for row in run["rows"]]
    alone = len(runs) == 1

    def draw(axes):
        for run, colour in zip(runs, page.colours(len(runs)), strict=True):
            both = page.colours(2) if alone else (colour, colour)
            curves.draw(axes, run["rows"], trained, held_out, both)
        if trained not in (*curves.SHARES, *THROUGHPUT, "learning_rate"):
            curves.spread(axes)
        margin = 0.02 * (max(steps) - min(steps)) + 0.5
        axes.set_xlim(min(steps) - margin, max(steps) + margin)  # the same in all charts
        if alone and any(line.get_label() == "held out" for line in axes.lines):
            axes.legend(frameon=False)

    return page.chart(_title(runs[0]["task"], trained), draw)


def _section(run: Mapping[str, Any]) -> page.Section:
    return page.Section(
        title=run["label"],
        charts=[],
        notes=[],
        pictures=[
            page.picture(name.capitalize(), path, CAPTIONS.get(name, AT).format(step=at))
            for name, (at, path) in run["pictures"].items()
        ],
        values={_label(run["task"], n): _format(n, run["last"].get(n)) for n in _metrics([run])},
        settings={"Settings": run["settings"]},
    )
