"""A leaderboard: tokenizers of the embedded drawings that differ in their quantizer, in one report.

  python -m benchmarks.leaderboard --workdir=runs/leaderboard

Trains the demo's tokenizer with each quantizer, all of 1,024 codes, probes each, and writes
report.html. A restart resumes. Each core works on one tokenizer at a time.
"""

import argparse
from collections.abc import Sequence
import pathlib

from benchmarks import probes
from gigatok_jax.evaluation import report

DEMO = pathlib.Path(__file__).parents[1] / "configs" / "demo.py"

QUANTIZERS = {
    "vq": (),
    "fsq": (
        "--config.model.fsq_levels=(4,4,4,4,4)",
        "--config.model.code_dim=5",
        "--config.objective.entropy=0.0",
    ),
    "lfq": ("--config.model.code_dim=10",),
    "ibq": (),
}
TRAINING = ("--config.steps=800", "--config.objective.adversarial=0.0")
PROBE = ("--config.generator.steps=600", "--config.linear_probe.steps=200")


def measure(
    workdir: pathlib.Path, training: Sequence[str] = TRAINING, probe: Sequence[str] = PROBE
) -> pathlib.Path:
    """Writes the report of all quantizers, and returns its path.

    Args:
      workdir: see `probes.measure`.
      training: flags of every tokenizer's training.
      probe: flags of every probe.
    """
    runs = [
        (
            name,
            [f"--config={DEMO}:tokenizer", f"--config.model.quantizer={name}", *flags, *training],
            [f"--config={DEMO}:probe", *probe],
        )
        for name, flags in QUANTIZERS.items()
    ]
    path = workdir / "report.html"
    report.write(probes.measure(workdir, runs), path)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Quantizers compared on the embedded drawings.")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/leaderboard"))
    print(measure(parser.parse_args(arguments).workdir))


if __name__ == "__main__":
    main()
