"""Probes as one self-contained HTML file: tables, curves and pictures, alone or side by side."""

import base64
from collections.abc import Callable, Sequence
import io
import json
import pathlib
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure
import numpy as np
from PIL import Image

from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import paper
from gigatok_jax.files import read_json, replacing
from gigatok_jax.training.telemetry import read_metrics

# Metric to its heading, its format, and whether less is better (None: neither).
METRICS = {
    "rfid": ("rFID", ".2f", True),
    "rfd_dinov2": ("rFD DINOv2", ".2f", True),
    "rfd_teacher": ("rFD teacher", ".2f", True),
    "lpips": ("LPIPS", ".4f", True),
    "psnr": ("PSNR, dB", ".2f", False),
    "ssim": ("SSIM", ".3f", False),
    "codebook_usage": ("usage", ".1%", False),
    "gfid": ("gFID", ".2f", True),
    "sfid": ("sFID", ".2f", True),
    "gfd_dinov2": ("gFD DINOv2", ".2f", True),
    "gfd_teacher": ("gFD teacher", ".2f", True),
    "inception_score": ("IS", ".1f", False),
    "precision": ("precision", ".3f", False),
    "recall": ("recall", ".3f", False),
    "guidance": ("guidance", ".2f", None),
    "loss": ("val. loss", ".4f", True),
    "linear_accuracy": ("linear acc.", ".1%", False),
}
# Those that Fig. 7 draws against the tokenizer's size, the first that a run has of each.
SCALING = (
    ("rfid", "rfd_dinov2", "rfd_teacher"),
    ("gfid", "gfd_dinov2", "gfd_teacher"),
    ("loss",),
    ("linear_accuracy",),
)
COLOURS = ("#2f6fde", "#d9622b", "#2a9d6f", "#8e5bd0", "#c23b6b", "#6b7280")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa3af",
    "axes.labelcolor": "#374151",
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "grid.color": "#e5e7eb",
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "font.size": 9,
    "svg.fonttype": "none",
}


def write(workdirs: Sequence[pathlib.Path], path: pathlib.Path) -> None:
    """Writes the report of one probe, or of several side by side.

    Args:
      workdirs: of finished probes.
      path: the HTML file.

    Raises:
      UserError: a probe has no results yet.
    """
    probes = [_read(workdir) for workdir in workdirs]
    found = [name for name in METRICS if any(name in p["results"] for p in probes)]
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")
    html = template.render(
        title=probes[0]["name"] if len(probes) == 1 else f"{len(probes)} tokenizers",
        headings=[METRICS[name][0] for name in found],
        rows=[_table_row(probe["name"], probe["results"], found) for probe in probes],
        paper_rows=[
            _table_row(row.name, row.metrics | _size(row), found) | {"source": row.source}
            for row in paper.ROWS
            if row.metrics.keys() & set(found)
        ],
        like_the_paper="rfid" in found or "gfid" in found,
        figures=_common_figures(probes),
        probes=[probe | _own_figures(probe) for probe in probes],
    )
    with replacing(path) as aside:
        aside.write_text(html)


def _size(row: paper.Row) -> dict[str, int]:
    return {"parameters": row.million_parameters * 10**6} if row.million_parameters else {}


def _table_row(name: str, results: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    cells = [format(results[m], METRICS[m][1]) if m in results else "-" for m in metrics]
    size = results.get("parameters")
    return {"name": name, "size": f"{size / 1e6:,.1f} M" if size else "-", "cells": cells}


def _read(workdir: pathlib.Path) -> dict[str, Any]:
    """All that the report needs of one probe."""
    path = workdir / "results.json"
    if not path.exists():
        raise UserError(f"{workdir}: no results of a probe; gigatok probe --workdir={workdir} ...")
    record = read_json(workdir / "probe.json", "the probe")
    results = read_json(path, "the probe's results")
    images = {
        "reconstructions": workdir / "reconstruction" / "grid.png",
        "samples": workdir / "samples" / "grid.png",
        "maps": workdir / "maps.png",
    }
    return {
        "name": workdir.resolve().name,
        "results": results,
        "settings": {
            name.removeprefix("config."): value if isinstance(value, str) else json.dumps(value)
            for name, value in record.items()
        },
        "generator_rows": read_metrics(workdir / "generator" / "metrics.jsonl"),
        "linear_rows": read_metrics(workdir / "linear_probe" / "metrics.jsonl"),
        "linear_features": read_json(
            workdir / "linear_probe" / "bundle" / "config.json", "the linear probe"
        )["made_by"]["features"],
        "counts": np.load(workdir / "reconstruction" / "code_counts.npy"),
        "images": {name: _png(file) for name, file in images.items() if file.exists()},
    }


def _png(path: pathlib.Path) -> str:
    """A picture as a data URL; large ones are stored as JPEG."""
    content, kind = path.read_bytes(), "png"
    if len(content) > 2**20:
        buffer, kind = io.BytesIO(), "jpeg"
        Image.open(path).convert("RGB").save(buffer, "jpeg", quality=90)
        content = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _figure(draw: Callable[[Any], None], width: float = 4.2) -> str:
    """An SVG of what `draw` makes of axes, as a data URL."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 2.8), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _common_figures(probes: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Metrics against the tokenizer's size, as in Figs. 3 and 7, where there are several."""
    if len(probes) < 2:
        return []
    figures = []
    for names in SCALING:
        name = next((n for n in names if all(n in p["results"] for p in probes)), None)
        if name is None:
            continue
        heading, _, less = METRICS[name]
        direction = "lower is better" if less else "higher is better"

        def draw(axes, name=name, heading=heading):
            for probe in probes:
                size = probe["results"]["parameters"] / 1e6
                axes.scatter(size, probe["results"][name], s=36, zorder=3)
                axes.annotate(
                    probe["name"],
                    (size, probe["results"][name]),
                    textcoords="offset points",
                    xytext=(5, 5),
                    fontsize=8,
                )
            sizes = [probe["results"]["parameters"] / 1e6 for probe in probes]
            ends = sorted({min(sizes), max(sizes)})
            axes.set(xscale="log", xlabel="tokenizer, million parameters", ylabel=heading)
            axes.set_xticks(ends, [f"{size:,.3g}" for size in ends])
            axes.minorticks_off()
            axes.margins(x=0.2, y=0.15)

        figures.append({"title": f"{heading} ({direction})", "image": _figure(draw)})
    return figures


def _own_figures(probe: dict[str, Any]) -> dict[str, Any]:
    figures = []

    def losses(axes):
        axes.plot(*_series(probe["generator_rows"], "total"), label="training", linewidth=1)
        steps, values = _series(probe["generator_rows"], "held_out/loss")
        axes.plot(steps, values, label="held out", marker="o", markersize=3)
        axes.set(xlabel="step", ylabel="cross entropy a code, nats")
        axes.legend(frameon=False)

    figures.append({"title": "Generator", "image": _figure(losses)})
    search = probe["results"].get("search", [])
    distance = next((n for n in SCALING[1] if n in probe["results"]), None)
    if len(search) > 1:

        def guidance(axes):
            scales = [row["guidance"] for row in search]
            axes.plot(scales, [row[distance] for row in search], marker="o", markersize=4)
            axes.axvline(probe["results"]["guidance"], color="#9aa3af", linewidth=1, linestyle=":")
            axes.set(xlabel="guidance", ylabel=METRICS[distance][0])

        figures.append({"title": "Search for guidance", "image": _figure(guidance)})

    def accuracy(axes):
        axes.plot(*_series(probe["linear_rows"], "accuracy"), label="training", linewidth=1)
        steps, values = _series(probe["linear_rows"], "held_out/accuracy")
        axes.plot(steps, values, label="held out", marker="o", markersize=3)
        axes.set(xlabel="step", ylabel="accuracy", ylim=(0, 1))
        axes.legend(frameon=False)

    figures.append({"title": "Linear probe", "image": _figure(accuracy)})

    def usage(axes):
        counts = np.sort(probe["counts"])[::-1]
        axes.fill_between(np.arange(len(counts)), counts / counts.sum() * len(counts), step="mid")
        axes.axhline(1, color="#9aa3af", linewidth=1, linestyle=":")
        axes.set(xlabel="code, the most frequent first", ylabel="frequency / even frequency")

    figures.append({"title": "Use of the codebook", "image": _figure(usage)})
    return {"own_figures": figures}
