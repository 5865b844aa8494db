"""The report of probes: the paper's table and figures with one's own tokenizers in them."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

import numpy as np

from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import curves, page, paper
from gigatok_jax.files import read_json
from gigatok_jax.training.telemetry import read_metrics

# Metric to its heading, its format, and whether less is better.
METRICS = {
    "rfid": ("rFID", ".2f", True),
    "rfd_dinov2": ("rFD DINOv2", ".2f", True),
    "rfd_teacher": ("rFD teacher", ".2f", True),
    "lpips": ("LPIPS", ".4f", True),
    "psnr": ("PSNR, dB", ".2f", False),
    "ssim": ("SSIM, range 1", ".3f", False),
    "ssim_range_2": ("SSIM, range 2", ".3f", False),
    "codebook_usage": ("usage", ".1%", False),
    "gfid": ("gFID", ".2f", True),
    "sfid": ("sFID", ".2f", True),
    "gfd_dinov2": ("gFD DINOv2", ".2f", True),
    "gfd_teacher": ("gFD teacher", ".2f", True),
    "inception_score": ("IS", ".1f", False),
    "precision": ("precision", ".3f", False),
    "recall": ("recall", ".3f", False),
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
UNUSED = ("generator.data.", "linear_probe.data.")  # in their place are the probe's own data
LEAD = """A tokenizer is judged by a small generator trained on its codes (GigaTok, 3.1): how well
images are reconstructed, how well the generator draws and predicts codes it has not seen, and how
well a linear layer tells classes from its features."""
ON_THE_PAPER = (
    """Rows with a table's number are the paper's. Those of 50 epochs and constant guidance are AR
    probing, what a probe measures. Those of 300 epochs are its system-level comparison: generator B
    as well, but trained six times as long and guided by a step function (none for the first 18% of
    the codes); their gFID, IS, precision, recall and linear accuracy are not to be set beside a
    probe's. Of LlamaGen's tokenizer, the paper does not say the setting.""",
    """The paper's SSIM is the reference program's, which tells scikit-image that the data span 2;
    that gives higher values than 1, their true range. A probe measures it
    where its setting ssim_range is 2.""",
)
OTHER_IMAGES = """The paper's rows are of ImageNet at 256 pixels and FID's Inception. These probes
are of other features, over which precision and recall are too: no distance, precision or recall
here can be set beside the paper's, and nothing else where the images are others."""


def read(workdir: pathlib.Path, label: str) -> dict[str, Any]:
    """All that the report needs of one probe.

    Raises:
      UserError: it has no results yet.
    """
    path = workdir / "results.json"
    if not path.exists():
        raise UserError(f"{workdir}: no results of a probe; gigatok probe --workdir={workdir} ...")
    record = read_json(workdir / "probe.json", "the probe")
    results = read_json(path, "the probe's results")
    if record.get("config.ssim_range", 1) != 1:
        results[f"ssim_range_{record['config.ssim_range']}"] = results.pop("ssim")
    own = {name.removeprefix("config."): value for name, value in record.items()}
    settings = {"Settings": {k: v for k, v in own.items() if not k.startswith(UNUSED)}}
    if (workdir / "tokenizer.json").exists():
        settings["Tokenizer"] = _tokenizer(read_json(workdir / "tokenizer.json", "the tokenizer"))
    linear_bundle = workdir / "linear_probe" / "bundle" / "config.json"
    return {
        "label": label,
        "workdir": workdir,
        "results": results,
        "length": _length(record),
        "guidance": f"{results['guidance']:.2f}, {record['config.sampling.schedule']}",
        "settings": {heading: page.settings(values) for heading, values in settings.items()},
        "generator_rows": read_metrics(workdir / "generator" / "metrics.jsonl"),
        "linear_rows": read_metrics(workdir / "linear_probe" / "metrics.jsonl"),
        "linear_features": read_json(linear_bundle, "the linear probe")["made_by"]["features"],
        "counts": np.load(workdir / "reconstruction" / "code_counts.npy"),
    }


def _tokenizer(record: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture and recipe, without the recipe's copy of the architecture."""
    run = record["made_by"].get("run", {})
    recipe = {name: value for name, value in run.items() if name != "model"}
    return {"model": record["model"], **record["made_by"], "run": recipe}


def _length(record: Mapping[str, Any]) -> str:
    """Of the generator's training."""
    steps = record["config.generator.steps"]
    return f"{steps:,} steps" if steps else f"{record['config.generator.epochs']:g} epochs"


def make(probes: Sequence[Mapping[str, Any]]) -> page.Page:
    """The report of what `read` found, side by side."""
    measured = set().union(*(probe["results"] for probe in probes))
    if measured & {"ssim", "ssim_range_2"}:
        measured |= {"ssim_range_2"}
    found = [name for name in METRICS if name in measured]
    headings = ["tokenizer", "parameters", "generator trained", "guidance"]
    headings += [METRICS[name][0] for name in found]
    scaling = _scaling(probes)
    like_the_paper = "rfid" in found or "gfid" in found
    return page.Page(
        kind="AR probing",
        lead=LEAD,
        table=page.Table(headings, _rows(probes, found)),
        notes=[*ON_THE_PAPER, *([] if like_the_paper else [OTHER_IMAGES])],
        groups=[page.Group("Against the tokenizer's size", scaling)] if scaling else [],
        sections=[_section(probe) for probe in probes],
    )


def _rows(probes: Sequence[Mapping[str, Any]], found: Sequence[str]) -> list[page.Row]:
    """The probes' rows, and those of the paper with one of their metrics, setting by setting."""

    def row(kind, results, label, length, guidance):
        size = f"{results['parameters'] / 1e6:,.1f} M" if "parameters" in results else "-"
        values = [format(results[m], METRICS[m][1]) if m in results else "-" for m in found]
        return page.Row([label, size, length, guidance, *values], kind)

    rows = [row("own", p["results"], p["label"], p["length"], p["guidance"]) for p in probes]
    previous = None
    for other in paper.ROWS:
        if not other.metrics.keys() & set(found):
            continue
        results = dict(other.metrics)
        if other.million_parameters:
            results["parameters"] = other.million_parameters * 10**6
        kind = "paper" if other.epochs == previous else "paper first"
        previous = other.epochs
        length = f"{other.epochs} epochs" if other.epochs else "-"
        label = f"{other.name} ({other.source})"
        rows.append(row(kind, results, label, length, other.schedule or "-"))
    return rows


def _scaling(probes: Sequence[Mapping[str, Any]]) -> list[page.Picture]:
    """Metrics against the tokenizer's size, as in Figs. 3 and 7, where there are several."""
    if len(probes) < 2:
        return []
    charts = []
    for names in SCALING:
        name = next((n for n in names if all(n in p["results"] for p in probes)), None)
        if name is None:
            continue
        heading, _, less = METRICS[name]

        def draw(axes, name=name, heading=heading):
            sizes = [probe["results"]["parameters"] / 1e6 for probe in probes]
            colours = page.colours(len(probes))
            for probe, size, colour in zip(probes, sizes, colours, strict=True):
                place = (size, probe["results"][name])
                axes.scatter(*place, s=36, zorder=3, color=colour)
                offset = {"textcoords": "offset points", "xytext": (5, 5), "fontsize": 8}
                axes.annotate(probe["label"], place, **offset)
            ends = sorted({min(sizes), max(sizes)})
            axes.set(xscale="log", xlabel="tokenizer, million parameters", ylabel=heading)
            axes.set_xticks(ends, [f"{size:,.3g}" for size in ends])
            axes.minorticks_off()
            axes.margins(x=0.2, y=0.15)

        direction = "lower is better" if less else "higher is better"
        charts.append(page.chart(f"{heading} ({direction})", draw))
    return charts


def _section(probe: Mapping[str, Any]) -> page.Section:
    results, workdir = probe["results"], probe["workdir"]
    notes = [f"Linear probe of: {probe['linear_features']}."]
    if "generation_images" in results:
        notes.append(
            f"Measured on {results['reconstruction_images']:,} evaluation images and "
            f"{results['generation_images']:,} samples."
        )
    pictures = (
        (
            "Reconstructions",
            workdir / "reconstruction" / "grid.png",
            "Evaluation images, and below each its reconstruction.",
        ),
        (
            "Samples by class",
            workdir / "samples" / "grid.png",
            "Drawn at the best guidance; a class a row, its number and name before it.",
        ),
        (
            "Features",
            workdir / "maps.png",
            "Images of one class, and the first three principal components of the decoder's "
            "first-layer features over all of them (as Fig. 8): the same colour is the same "
            "meaning.",
        ),
    )
    return page.Section(
        title=probe["label"],
        charts=_charts(probe),
        notes=notes,
        pictures=[page.picture(*each) for each in pictures if each[1].exists()],
        values={},
        settings=probe["settings"],
    )


def _charts(probe: Mapping[str, Any]) -> list[page.Picture]:
    results, colours = probe["results"], page.colours(2)

    def losses(axes):
        curves.draw(axes, probe["generator_rows"], "total", "held_out/loss", colours)
        axes.set(ylabel="cross entropy a code, nats")
        axes.legend(frameon=False)

    def accuracy(axes):
        curves.draw(axes, probe["linear_rows"], "accuracy", "held_out/accuracy", colours)
        axes.set(ylabel="accuracy", ylim=(0, 1))
        axes.legend(frameon=False)

    def usage(axes):
        counts = np.sort(probe["counts"])[::-1]
        even = counts / counts.sum() * len(counts)
        axes.fill_between(np.arange(len(counts)), even, step="mid", color=colours[0])
        axes.axhline(1, color="#9aa3af", linewidth=1, linestyle=":")
        axes.set(xlabel="code, the most frequent first", ylabel="frequency / even frequency")

    charts = [page.chart("Generator", losses)]
    search = results.get("search", [])
    distance = next((n for n in SCALING[1] if n in results), None)
    if len(search) > 1:

        def guidance(axes):
            scales = [row["guidance"] for row in search]
            values = [row[distance] for row in search]
            axes.plot(scales, values, marker="o", markersize=4, color=colours[0])
            axes.axvline(results["guidance"], color="#9aa3af", linewidth=1, linestyle=":")
            axes.set(xlabel="guidance", ylabel=METRICS[distance][0])

        charts.append(page.chart("Search for guidance", guidance))
    charts.append(page.chart("Linear probe", accuracy))
    charts.append(page.chart("Use of the codebook", usage))
    return charts
