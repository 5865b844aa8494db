"""Probes or training runs as one self-contained HTML file, alone or side by side.

This module reads results into plain dictionaries and draws the charts. The template `report.html`
has the text: headings, number formats, captions, notes.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
import functools
import io
import json
import math
import pathlib
from typing import Any

from flax import traverse_util
import jinja2
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
import numpy as np
from PIL import Image

from gigatok_jax.config import from_mapping
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import protocol
from gigatok_jax.files import Path, local_copy, read_json, real_path, replacing
from gigatok_jax.training import TASKS
from gigatok_jax.training.telemetry import read_metrics

PROBE = "probe"
PAPER = pathlib.Path(__file__).parents[1] / "assets" / "paper.json"
HELD_OUT = "held_out/"
FRACTIONS = ("accuracy", "top5_accuracy", "codebook_usage", "input_wait", "mfu")  # in percent
THROUGHPUT = ("images_per_second", "input_wait", "mfu", "peak_memory_gb")
RECONSTRUCTION_DISTANCES = ("rfid", "rfd_dinov2", "rfd_teacher")
GENERATION_DISTANCES = ("gfid", "gfd_dinov2", "gfd_teacher")
UNUSED_SETTINGS = ("generator.data.", "linear_probe.data.")  # overridden by the probe's own data

MAX_REASONS = 6  # why a protocol stands apart
MAX_POINTS = 400  # per curve; more points are invisible and bloat the file
WIDE_RANGE = 8  # ratio of largest to smallest value above which the scale is logarithmic
MAX_PNG_BYTES = 2**20  # larger pictures are embedded as JPEG
COLORS = ("#2f6fde", "#d9622b", "#2a9d6f", "#8e5bd0", "#c23b6b", "#6b7280", "#b58a00", "#0f8ea8")
GRAY = "#9aa3af"
CHART_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": "#374151",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "xtick.color": "#6b7280",
    "ytick.color": "#6b7280",
    "font.size": 9,
    "svg.fonttype": "none",
}


def write(workdirs: Sequence[Path], path: Path) -> None:
    """Writes the report of one run, or of several side by side.

    Args:
      workdirs: of finished probes, or of training runs of one task, finished or not.
      path: the HTML file.

    Raises:
      UserError: a folder holds neither, the kinds differ, or a run has no results yet.
    """
    kinds = [_kind(workdir) for workdir in workdirs]
    for workdir, kind in zip(workdirs, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(
                f"{workdir}: expected a {_describe(kinds[0])} like {workdirs[0]}, "
                f"got a {_describe(kind)}"
            )
    read, compare = (
        (_read_probe, _compare_probes) if kinds[0] == PROBE else (_read_training, _compare_training)
    )
    runs = [read(workdir) for workdir in workdirs]
    looks = zip(labels(workdirs), colors(len(runs)), strict=True)
    for run, (label, color) in zip(runs, looks, strict=True):
        run.update(label=label, color=color)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    html = environment.get_template("report.html").render(
        kind=kinds[0], runs=runs, differing=_differing_settings(runs), **compare(runs)
    )
    with replacing(path) as aside:
        aside.write_text(html, encoding="utf-8")


def _kind(workdir: Path) -> str:
    """`PROBE`, or a training run's task."""
    if (workdir / "probe.json").exists():
        return PROBE
    path = workdir / "config.json"
    record = read_json(path, "the run") if path.exists() else None
    task = record.get("task") if isinstance(record, dict) else None
    if task not in TASKS:
        raise UserError(
            f"{workdir}: expected the workdir of `gigatok probe` or `gigatok train`, found neither "
            "probe.json nor a run's config.json"
        )
    return task


def _describe(kind: str) -> str:
    return kind if kind == PROBE else f"{kind.replace('_', ' ')} training run"


def labels(workdirs: Sequence[Path]) -> list[str]:
    """The shortest tail of each path that distinguishes it from the others."""
    paths = [real_path(workdir) for workdir in workdirs]

    def label(path: Path) -> str:
        for length in range(1, len(path.parts)):
            tail = path.parts[-length:]
            if all(other == path or other.parts[-length:] != tail for other in paths):
                return "/".join(tail)
        return str(path)

    return [label(path) for path in paths]


def colors(count: int) -> list[str]:
    """`count` distinct colors."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    wheel = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, count))
    return [matplotlib.colors.to_hex(color) for color in wheel]


def _number(value: float | str | None, spec: str) -> str:
    """Template filter; a missing value becomes a dash, and "nan" and "inf" stay."""
    if isinstance(value, str):
        return value
    missing = value is None or isinstance(value, jinja2.Undefined)
    return "-" if missing else format(value, spec)


def _flatten(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Nested settings under names such as `a.b`, with values as text."""
    flat = traverse_util.flatten_dict(mapping, sep=".")
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in flat.items()}


def _differing_settings(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Settings that differ between runs: name to one value per run."""
    differing = {}
    for heading in dict.fromkeys(heading for run in runs for heading in run["settings"]):
        columns = [run["settings"].get(heading, {}) for run in runs]
        for name in dict.fromkeys(name for column in columns for name in column):
            values = [column.get(name, "-") for column in columns]
            if len(set(values)) > 1:
                differing[f"{heading}: {name}"] = values
    return differing


def _read_probe(workdir: Path) -> dict[str, Any]:
    """The results of one probe, with its settings, charts and pictures."""
    if not (workdir / "results.json").exists():
        raise UserError(
            f"{workdir}: expected a finished probe, found no results.json; "
            f"gigatok probe --workdir={workdir} ... resumes it"
        )
    record = read_json(workdir / "probe.json", "the probe")
    results = read_json(workdir / "results.json", "the probe's results")
    if record.get("config.ssim_range", 1) == 2:
        results["ssim_range_2"] = results.pop("ssim")
    own = {name.removeprefix("config."): value for name, value in record.items()}
    settings = {"Settings": {k: v for k, v in own.items() if not k.startswith(UNUSED_SETTINGS)}}
    if (workdir / "tokenizer.json").exists():
        tokenizer = read_json(workdir / "tokenizer.json", "the tokenizer")
        run = dict(tokenizer["made_by"].get("run", {}))
        run.pop("model", None)  # a copy of tokenizer["model"]
        settings["Tokenizer"] = {"model": tokenizer["model"]} | tokenizer["made_by"] | {"run": run}
        if "family" not in tokenizer:  # an older probe, of the only family then
            model = tokenizer["model"]
            tokenizer |= {"family": "gigatok", "codes": model["latents"]}
            tokenizer |= {name: model[name] for name in ("image_size", "codebook_size")}
        results |= _sizes(tokenizer, results["loss"])
    results["comparable"] = protocol.comparable(results.get("protocol", {}))
    settings["Protocol"] = results.setdefault("protocol", {})
    if time := settings["Protocol"].get("time"):
        results["timed_on"] = f"{time['hardware']}, batch {time['batch_size']}"
    linear_bundle = workdir / "linear_probe" / "bundle" / "config.json"
    generator_bundle = workdir / "generator" / "bundle" / "config.json"
    pictures = {
        "reconstructions": workdir / "reconstruction" / "grid.png",
        "samples": workdir / "samples" / "grid.png",
        "features": workdir / "maps.png",
    }
    return results | {
        "steps": own["generator.steps"],
        "epochs": own["generator.epochs"],
        "schedule": own["sampling.schedule"],
        "classes": read_json(generator_bundle, "the generator")["config"]["classes"],
        "linear_features": read_json(linear_bundle, "the linear probe")["made_by"]["features"],
        "charts": _probe_charts(workdir, results),
        "pictures": {name: _picture(path) for name, path in pictures.items() if path.exists()},
        "settings": {heading: _flatten(values) for heading, values in settings.items()},
    }


def _sizes(tokenizer: Mapping[str, Any], loss: float) -> dict[str, Any]:
    """What an image's codes take, and the loss in units that compare all tokenizers."""
    codes = tokenizer["codes"]
    loss = codes * loss / math.log(2)
    return {
        "family": tokenizer["family"],
        "codes": codes,
        "bits": codes * math.log2(tokenizer["codebook_size"]),
        "loss_image": loss,
        "loss_pixel": loss / tokenizer["image_size"] ** 2,
    }


def _probe_charts(workdir: Path, results: Mapping[str, Any]) -> dict[str, str]:
    pair = colors(2)
    generator = _read_metrics(workdir / "generator" / "metrics.jsonl")
    linear_probe = _read_metrics(workdir / "linear_probe" / "metrics.jsonl")
    counts = np.sort(np.load(local_copy(workdir / "reconstruction" / "code_counts.npy")))[::-1]
    search = results.get("search", [])

    def draw_loss(axes):
        _draw_curves(axes, generator, "total", pair)
        axes.legend(frameon=False)

    def draw_search(axes):
        distance = next(name for name in GENERATION_DISTANCES if name in results)
        scales, values = [row["guidance"] for row in search], [row[distance] for row in search]
        axes.plot(scales, values, marker="o", markersize=4, color=pair[0])
        axes.axvline(results["guidance"], color=GRAY, linewidth=1, linestyle=":")
        axes.set(xlabel="guidance")

    def draw_accuracy(axes):
        _draw_curves(axes, linear_probe, "accuracy", pair)
        axes.set_ylim(0, 1)
        axes.legend(frameon=False)

    def draw_usage(axes):
        axes.fill_between(np.arange(len(counts)), counts / counts.mean(), step="mid", color=pair[0])
        axes.axhline(1, color=GRAY, linewidth=1, linestyle=":")
        axes.set(xlabel="code, most frequent first")

    charts = {"generator": draw_loss, "linear_probe": draw_accuracy, "codebook": draw_usage}
    if len(search) > 1:
        charts["guidance"] = draw_search
    return {name: chart(draw) for name, draw in charts.items()}


def _compare_probes(probes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """More variables for the template; `scaling` is as in the paper's Figs. 3 and 7.

    Charts show only the probes of the first one's protocol.
    """
    groups = _by_protocol(probes)
    everything, (_, probes) = probes, groups[0]

    def shared(names: Sequence[str]) -> str | None:
        return next((name for name in names if all(name in probe for probe in probes)), None)

    scaling, tradeoff = {}, None
    measures = (RECONSTRUCTION_DISTANCES, GENERATION_DISTANCES, ("loss_pixel",))
    for name in filter(None, map(shared, (*measures, ("linear_accuracy",)))):
        known = [probe for probe in probes if probe["parameters"]]
        if len(known) > 1:
            scaling[name] = chart(functools.partial(_draw_scaling, probes=known, name=name))
    pair = shared(RECONSTRUCTION_DISTANCES), shared(GENERATION_DISTANCES)
    if len(probes) > 1 and all(pair):
        tradeoff = chart(functools.partial(_draw_tradeoff, probes=probes, names=pair))
    return {
        "measured": set().union(*everything),
        "by_protocol": groups,
        "scaling": scaling,
        "tradeoff": tradeoff,
        "reconstruction_distances": RECONSTRUCTION_DISTANCES,
        "generation_distances": GENERATION_DISTANCES,
        "paper": read_json(PAPER, "the paper's results")["rows"],
    }


def _by_protocol(
    probes: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Probes of each protocol, and what sets it apart from the first one, which has ""."""
    first, groups = probes[0]["comparable"], []
    for probe in probes:
        for group in groups:
            if not protocol.differences(group[0]["comparable"], probe["comparable"]):
                group.append(probe)
                break
        else:
            groups.append([probe])

    def reason(found: Mapping[str, Any]) -> str:
        reasons = protocol.differences(first, found)
        if reasons and not (first and found):
            return "an older program has not recorded one of the protocols"
        more = reasons[MAX_REASONS:]
        return "; ".join(reasons[:MAX_REASONS]) + (f"; and {len(more)} more" if more else "")

    return [(reason(group[0]["comparable"]), group) for group in groups]


def _draw_scaling(axes, probes: Sequence[Mapping[str, Any]], name: str) -> None:
    """A metric against the tokenizer's size."""
    sizes = [probe["parameters"] / 1e6 for probe in probes]
    for probe, size in zip(probes, sizes, strict=True):
        point = (size, probe[name])
        axes.scatter(*point, s=36, zorder=3, color=probe["color"])
        # Labels of large tokenizers go to the left, where the edge does not cut them off.
        offset, side = (5, "left") if size**2 <= min(sizes) * max(sizes) else (-5, "right")
        place = {"xytext": (offset, 5), "textcoords": "offset points", "ha": side}
        axes.annotate(probe["label"], point, fontsize=8, **place)
    ends = sorted({min(sizes), max(sizes)})
    axes.set(xscale="log", xlabel="tokenizer, million parameters")
    axes.set_xticks(ends, [f"{size:,.3g}" for size in ends])
    axes.minorticks_off()
    axes.margins(x=0.2, y=0.15)
    if name == "linear_accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def _draw_tradeoff(axes, probes: Sequence[Mapping[str, Any]], names: tuple[str, str]) -> None:
    """The distance of samples against that of reconstructions."""
    for probe in probes:
        point = tuple(probe[name] for name in names)
        axes.scatter(*point, s=36, zorder=3, color=probe["color"])
        axes.annotate(probe["label"], point, (5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="distance of reconstructions", ylabel="distance of samples")
    axes.margins(x=0.25, y=0.15)


def _read_training(workdir: Path) -> dict[str, Any]:
    """The logged metrics of one training run, with its settings and newest pictures."""
    path = workdir / "config.json"
    mapping = read_json(path, "the run")
    config = from_mapping(TASKS[mapping["task"]], mapping, f"{path}: config")
    metrics = workdir / "metrics.jsonl"
    rows = _read_metrics(metrics)
    if not rows:
        raise UserError(
            f"{metrics}: nothing logged yet; the first row comes at step "
            f"{min(config.loop.log_every, config.total_steps):,}"
        )
    # Names end in a zero-padded step, so the newest picture of each name comes last.
    newest = {
        file.stem.rpartition("_")[0]: file
        for file in sorted((workdir / "pictures").glob("*_[0-9]*.png"))
    }
    return {
        "rows": rows,
        "last": {name: value for row in rows for name, value in row.items()},
        "total_steps": config.total_steps,
        "pictures": {
            name: {"step": int(file.stem.rpartition("_")[2]), "source": _picture(file)}
            for name, file in newest.items()
        },
        "settings": {"Settings": _flatten(mapping)},
    }


def _compare_training(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """More variables for the template: names of all metrics, and their charts by group."""
    logged = dict.fromkeys(name for run in runs for name in run["last"] if name != "step")
    metrics = sorted(logged, key=lambda name: (name != "total", not name.startswith(HELD_OUT)))
    groups = {"Losses and metrics": {}, "Optimization": {}, "Throughput": {}}
    for name in dict.fromkeys(name.removeprefix(HELD_OUT) for name in metrics):
        if name in THROUGHPUT:
            group = "Throughput"
        elif name == "learning_rate" or name.endswith("_norm"):
            group = "Optimization"
        else:
            group = "Losses and metrics"
        groups[group][name] = chart(functools.partial(_draw_metric, runs=runs, name=name))
    return {"metrics": metrics, "groups": groups, "fractions": FRACTIONS}


def _draw_metric(axes, runs: Sequence[Mapping[str, Any]], name: str) -> None:
    """One metric of all runs. A single run gets a legend here, several share one on the page."""
    single = len(runs) == 1
    for run in runs:
        _draw_curves(axes, run["rows"], name, colors(2) if single else [run["color"]] * 2)
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    linear = name in (*FRACTIONS, *THROUGHPUT, "learning_rate")
    if not linear and values.min() > 0 and values.max() > WIDE_RANGE * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    steps = [row["step"] for run in runs for row in run["rows"]]
    margin = 0.02 * (max(steps) - min(steps)) + 0.5
    axes.set_xlim(min(steps) - margin, max(steps) + margin)  # equal in all charts
    if single and any(line.get_label() == "held out" for line in axes.lines):
        axes.legend(frameon=False)


def _read_metrics(path: Path) -> list[dict[str, float]]:
    """Finite values in a `metrics.jsonl`; the held-out loss takes the training loss's name."""
    rows = read_metrics(path) if path.exists() else []
    names = {f"{HELD_OUT}loss": f"{HELD_OUT}total"}
    return [
        {names.get(name, name): value for name, value in row.items() if math.isfinite(value)}
        for row in rows
    ]


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a metric where it was logged, averaged over neighbors in long runs."""
    pairs = np.array([(row["step"], row[name]) for row in rows if row.get(name) is not None])
    if not len(pairs):
        return np.empty(0), np.empty(0)
    stretches = np.array_split(pairs, min(MAX_POINTS, len(pairs)))
    return tuple(np.array([stretch.mean(0) for stretch in stretches]).T)


def _draw_curves(axes, rows: Sequence[Mapping[str, Any]], name: str, pair: Sequence[str]) -> None:
    """Draws a metric in training as a line, and its held-out counterpart as a dashed line."""
    dots = {"marker": "o", "markersize": 3, "linestyle": "--"}
    for key, label, color, style in (
        (name, "training", pair[0], {}),
        (HELD_OUT + name, "held out", pair[1], dots),
    ):
        steps, values = series(rows, key)
        if len(steps) == 1:
            style = dots
        if len(steps):
            axes.plot(steps, values, label=label, color=color, linewidth=1, **style)
    axes.set(xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if name in FRACTIONS:
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def chart(draw: Callable[[Any], None]) -> str:
    """What `draw` draws on Matplotlib axes, as an SVG in a data URL."""
    with matplotlib.rc_context(CHART_STYLE):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        draw(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _data_url("image/svg+xml", buffer.getvalue())


def _picture(path: Path) -> str:
    """A PNG file as a data URL; a large one becomes a JPEG."""
    content = path.read_bytes()
    if len(content) <= MAX_PNG_BYTES:
        return _data_url("image/png", content)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).convert("RGB").save(buffer, "jpeg", quality=90)
    return _data_url("image/jpeg", buffer.getvalue())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
