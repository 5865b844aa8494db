"""Curves of a run's logged metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, PercentFormatter
import numpy as np

HELD_OUT = "held_out/"
POINTS = 400  # of a curve, at most: more would be seen by nobody and make the file large
WIDE = 8  # largest over least value that a linear scale shows well
SHARES = ("accuracy", "top5_accuracy", "codebook_usage", "input_wait")


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric, where it has some; of long runs, means of stretches."""
    pairs = np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None])
    if not len(pairs):
        return np.empty(0), np.empty(0)
    stretches = np.array_split(pairs, min(POINTS, len(pairs)))
    return tuple(np.array([stretch.mean(0) for stretch in stretches]).T)


def draw(axes, rows: Sequence[Mapping[str, Any]], trained: str, held_out: str, colours) -> None:
    """A line of a training metric, and a dotted one of a held-out metric, as far as there are any.

    Args:
      axes: to draw on.
      rows: of `metrics.jsonl`.
      trained, held_out: names of metrics.
      colours: of the two.
    """
    dots = {"marker": "o", "markersize": 3, "linestyle": "--"}
    for name, label, colour, style in (
        (trained, "training", colours[0], {}),
        (held_out, "held out", colours[1], dots),
    ):
        steps, values = series(rows, name)
        if len(steps) == 1:
            style = dots
        if len(steps):
            axes.plot(steps, values, label=label, color=colour, linewidth=1, **style)
    axes.set(xlabel="step")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if trained in SHARES:
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def spread(axes) -> None:
    """A logarithmic scale where all values are positive and the largest is many times the least."""
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    if values.min() > 0 and values.max() > WIDE * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
