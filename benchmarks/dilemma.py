"""The dilemma of reconstruction vs. generation (paper, 3.2 and 4.2), on the embedded drawings.

  python -m benchmarks.dilemma --workdir=runs/dilemma

Trains tokenizers of several sizes, with and without semantic regularization, from several seeds,
probes each (`gigatok probe`), and writes table.md, results.json and report.html. A restart resumes.
Each core works on one tokenizer at a time.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib

import numpy as np

from benchmarks import probes
from gigatok_jax.evaluation import report
from gigatok_jax.files import replacing, write_json

# Depth and width of both transformers; the CNN stays the same, as it does in the paper.
SIZES = {"S": (1, 32), "M": (2, 64), "L": (4, 128)}
ARMS = {
    "vanilla": ("--config.objective.semantic=0.0", "--config.model.semantic_dim=0"),
    "semantic": ("--config.objective.semantic=0.3",),
}
SEEDS = (0, 1)
METRICS = {
    "psnr": "PSNR, dB",
    "rfd_teacher": "rFD teacher",
    "loss": "validation loss",
    "gfd_teacher": "gFD teacher",
    "linear_accuracy": "linear accuracy",
}


def flags(size: str, arm: str, seed: int) -> tuple[str, list[str], list[str]]:
    """One tokenizer's run, see `probes.Run`."""
    depth, width = SIZES[size]
    shape = [
        f"--config.model.{part}.{name}={value}"
        for part in ("encoder", "decoder")
        for name, value in (("depth", depth), ("width", width))
    ]
    seeds = [f"--config.{part}seed={seed}" for part in ("", "generator.", "linear_probe.")]
    return f"{size}_{arm}_{seed}", [*seeds[:1], *shape, *ARMS[arm]], seeds


def table(workdir: pathlib.Path, sizes: Sequence[str]) -> tuple[list[str], dict]:
    """A Markdown table of means over seeds, with the seeds' values, and all results."""
    heads = ["tokenizer", "million parameters", *METRICS.values()]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    results = {}
    for arm in ARMS:
        for size in sizes:
            found = [
                json.loads((workdir / f"{size}_{arm}_{seed}" / "results.json").read_text())
                for seed in SEEDS
            ]
            results[f"{size}_{arm}"] = found
            cells = [f"{size} {arm}", f"{found[0]['parameters'] / 1e6:.2f}"]
            for name in METRICS:
                values = [result[name] for result in found]
                each = ", ".join(f"{value:.3f}" for value in values)
                cells.append(f"{np.mean(values):.3f} ({each})")
            lines.append(f"| {' | '.join(cells)} |")
    return lines, results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The dilemma on the embedded drawings.")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/dilemma"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args(arguments)
    runs = [(size, arm, seed) for seed in SEEDS for size in options.sizes for arm in ARMS]
    probes.measure(options.workdir, [flags(*run) for run in runs])
    lines, results = table(options.workdir, options.sizes)
    write_json(options.workdir / "results.json", results)
    with replacing(options.workdir / "table.md") as aside:
        aside.write_text("\n".join(lines) + "\n")
    folders = [options.workdir / f"{s}_{arm}_{SEEDS[0]}" for s in options.sizes for arm in ARMS]
    report.write(folders, options.workdir / "report.html")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
