"""The dilemma of reconstruction vs. generation (paper, 3.2 and 4.2), on the embedded drawings.

  python -m benchmarks.dilemma --workdir=runs/dilemma

Trains tokenizers of two sizes, with and without semantic regularization, from three seeds, probes
each (`gigatok probe`), and writes table.md, results.json, dilemma.png and report.html. A restart
resumes. Each core works on one tokenizer at a time.

Drawings have 16 pixels and 16 codes of 256, so that the larger tokenizer can be trained until it
reconstructs better than the smaller one, as the question requires. The loss is L2 alone, besides
the semantic loss: a perceptual loss or a discriminator on the teacher's features would teach the
unregularized tokenizers what they are meant to lack.
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import pathlib

from matplotlib.figure import Figure
import numpy as np

from benchmarks import probes
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import lookup
from gigatok_jax.evaluation import report
from gigatok_jax.evaluation.probing import ProbeConfig
from gigatok_jax.files import as_path, replacing, write_json
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training.generator import GeneratorRun
from gigatok_jax.training.linear_probe import LinearProbeRun
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.task import LoopConfig
from gigatok_jax.training.tokenizer import ObjectiveConfig, TokenizerRun

# Depth, heads and width of both transformers, and the learning rate. The CNN stays the same, as it
# does in the paper.
SIZES = {"S": (1, 1, 16, 3e-3), "L": (2, 3, 96, 1.5e-3)}
ARMS = {"vanilla": 0.0, "semantic": 0.5}  # weight of the semantic loss
SEEDS = (0, 1, 2)
METRICS = {
    "psnr": "PSNR, dB",
    "rfd_teacher": "rFD teacher",
    "loss": "validation loss, nats a code",
    "gfd_teacher": "gFD teacher",
    "linear_accuracy": "linear accuracy",
}
DATA = DataConfig(source="embedded", length=8_192, eval_length=500)


def get_config(argument: str) -> TokenizerRun | ProbeConfig:
    """`tokenizer,SIZE,ARM,SEED` or `probe,SEED`."""
    kind, *rest = argument.split(",")
    return lookup(kind, {"tokenizer": tokenizer, "probe": probe}, "run")(*rest)


def tokenizer(size: str, arm: str, seed: str) -> TokenizerRun:
    depth, heads, width, rate = SIZES[size]
    transformer = TransformerSize(depth, heads, width)
    return TokenizerRun(
        model=TokenizerConfig(
            encoder=transformer,
            decoder=transformer,
            image_size=16,
            latents=16,
            base_channels=4,
            channel_multipliers=(1, 2, 4),
            residual_blocks=1,
            z_channels=32,
            codebook_size=256,
            semantic_layer=1,
            semantic_dim=96 if ARMS[arm] else 0,
            init="fan_in",
        ),
        objective=ObjectiveConfig(
            l2=8.0,
            perceptual=0.0,
            adversarial=0.0,
            semantic=ARMS[arm],
            entropy=0.02,
            teacher="embedded",
        ),
        data=DATA,
        optimizer=OptimizerConfig(rate=rate, final_rate=1e-4, warmup_steps=100, clip=1.0),
        loop=LoopConfig(log_every=500, evaluate_every=1_000, checkpoint_every=1_000),
        steps=3_000,
        batch_size=16,
        average_decay=0.99,
        remat="none",
        evaluation_images=256,
        seed=int(seed),
    )


def probe(seed: str) -> ProbeConfig:
    return ProbeConfig(
        data=DATA,
        crop_factors=(),
        generator=GeneratorRun(
            model=GeneratorConfig(depth=2, heads=2, width=64, classes=10, dropout=0.1),
            optimizer=OptimizerConfig(
                rate=2e-3,
                schedule="warmup_stable_decay",
                warmup_steps=100,
                weight_decay=0.05,
                decayed="matrices",
                clip=1.0,
            ),
            loop=LoopConfig(log_every=250, evaluate_every=500, checkpoint_every=1_000),
            sampling=SamplingConfig(guidance=2.0),
            steps=2_000,
            batch_size=32,
            remat="none",
            evaluation_images=256,
            seed=int(seed),
        ),
        linear_probe=LinearProbeRun(
            optimizer=OptimizerConfig(rate=1e-2, final_rate=0.0, weight_decay=0.0),
            loop=LoopConfig(log_every=100, evaluate_every=200, checkpoint_every=0),
            steps=400,
            batch_size=100,
            evaluation_images=500,
            seed=int(seed),
        ),
        features="embedded",
        samples=1_000,
        sampling=SamplingConfig(guidance=1.5),
        batch_size=100,
        shard_images=8_000,
        sample_batch_size=100,
        seed=int(seed),
    )


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """A Markdown table of means over seeds, with the seeds' values."""
    heads = ["tokenizer", "million parameters", *METRICS.values()]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, found in results.items():
        cells = [name, f"{found[0]['parameters'] / 1e6:.2f}"]
        for metric in METRICS:
            values = [result[metric] for result in found]
            each = ", ".join(f"{value:.3f}" for value in values)
            cells.append(f"{np.mean(values):.3f} ({each})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(results: Mapping[str, Sequence[Mapping[str, float]]], path: pathlib.Path) -> None:
    """Metrics against the tokenizer's size, a line per arm and a dot per seed (Figs. 3 and 7)."""
    figure = Figure(figsize=(3.2 * len(METRICS), 3), layout="constrained")
    for axes, (metric, heading) in zip(
        figure.subplots(1, len(METRICS)), METRICS.items(), strict=True
    ):
        for arm, color in zip(ARMS, report.colors(len(ARMS)), strict=True):
            runs = [results[f"{size} {arm}"] for size in SIZES]
            sizes = [found[0]["parameters"] / 1e6 for found in runs]
            values = np.array([[result[metric] for result in found] for found in runs])
            axes.plot(sizes, values.mean(1), color=color, label=arm)
            for seed in range(values.shape[1]):
                axes.scatter(sizes, values[:, seed], color=color, s=14, alpha=0.6)
        axes.set(title=heading, xlabel="tokenizer, million parameters", xscale="log")
        axes.set_xticks(sizes, [f"{size:.2g}" for size in sizes])
        axes.minorticks_off()
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The dilemma on the embedded drawings.")
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/dilemma"))
    workdir = parser.parse_args(arguments).workdir
    runs = [(size, arm, seed) for seed in SEEDS for size in SIZES for arm in ARMS]
    flags = [
        (
            f"{size}_{arm}_{seed}",
            [f"--config={__file__}:tokenizer,{size},{arm},{seed}"],
            [f"--config={__file__}:probe,{seed}"],
        )
        for size, arm, seed in runs
    ]
    folders = dict(zip(runs, probes.measure(workdir, flags), strict=True))
    results = {
        f"{size} {arm}": [
            json.loads((folders[size, arm, seed] / "results.json").read_text()) for seed in SEEDS
        ]
        for size in SIZES
        for arm in ARMS
    }
    write_json(as_path(workdir / "results.json"), results)
    lines = table(results)
    with replacing(workdir / "table.md") as aside:
        aside.write_text("\n".join(lines) + "\n")
    plot(results, workdir / "dilemma.png")
    report.write(
        [folders[s, arm, SEEDS[0]] for s in SIZES for arm in ARMS], workdir / "report.html"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
