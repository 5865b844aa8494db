"""The dilemma of reconstruction vs. generation (paper, 3.2 and 4.2), on the embedded drawings.

  python -m benchmarks.dilemma --workdir=runs/dilemma

Trains tokenizers of several sizes, with and without semantic regularization, from several seeds,
probes each (`gigatok probe`), and writes table.md, results.json and report.html. A restart resumes.
Each core works on one tokenizer at a time.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import functools
import json
import os
import pathlib
import queue
import subprocess
import sys

import numpy as np

from gigatok_jax.evaluation import report
from gigatok_jax.files import replacing, write_json

DEMO = pathlib.Path(__file__).parents[1] / "configs" / "demo.py"

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


def measure(workdir: pathlib.Path, run: tuple[str, str, int], cores: queue.Queue) -> None:
    """Trains and probes one tokenizer on a free core, unless its results exist."""
    size, arm, seed = run
    folder = workdir / f"{size}_{arm}_{seed}"
    if (folder / "results.json").exists():
        return
    depth, width = SIZES[size]
    shape = [
        f"--config.model.{part}.{name}={value}"
        for part in ("encoder", "decoder")
        for name, value in (("depth", depth), ("width", width))
    ]
    commands = [
        [
            "train",
            f"--config={DEMO}:tokenizer",
            f"--workdir={folder / 'tokenizer'}",
            f"--config.seed={seed}",
            *shape,
            *ARMS[arm],
        ],
        [
            "probe",
            f"--config={DEMO}:probe",
            f"--tokenizer={folder / 'tokenizer'}",
            f"--workdir={folder}",
            f"--config.seed={seed}",
            f"--config.generator.seed={seed}",
            f"--config.linear_probe.seed={seed}",
        ],
    ]
    core = cores.get()
    try:
        for arguments in commands:
            with (workdir / f"{folder.name}.log").open("a") as log:
                subprocess.run(
                    [sys.executable, "-m", "gigatok_jax", *arguments],
                    check=True,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=functools.partial(os.sched_setaffinity, 0, {core}),
                )
    finally:
        cores.put(core)
    print(folder.name, flush=True)


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
    flags = parser.parse_args(arguments)
    flags.workdir.mkdir(parents=True, exist_ok=True)
    runs = [(size, arm, seed) for seed in SEEDS for size in flags.sizes for arm in ARMS]
    available = sorted(os.sched_getaffinity(0))
    cores = queue.Queue()
    for core in available:
        cores.put(core)
    with ThreadPoolExecutor(len(available)) as pool:
        list(pool.map(lambda run: measure(flags.workdir, run, cores), runs))
    lines, results = table(flags.workdir, flags.sizes)
    write_json(flags.workdir / "results.json", results)
    with replacing(flags.workdir / "table.md") as aside:
        aside.write_text("\n".join(lines) + "\n")
    folders = [flags.workdir / f"{s}_{arm}_{SEEDS[0]}" for s in flags.sizes for arm in ARMS]
    report.write(folders, flags.workdir / "report.html")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
