"""A leaderboard: tokenizers of the embedded drawings that differ in their quantizer, in one report.

  python -m benchmarks.leaderboard --workdir=runs/leaderboard

Trains a small tokenizer of drawings of 32 pixels with each quantizer, all of 64 codes of 1,024,
probes each, and writes report.html. A restart resumes. Each core works on one tokenizer at a time.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import pathlib

from benchmarks import dilemma, probes
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import lookup
from gigatok_jax.evaluation import report
from gigatok_jax.evaluation.probing import ProbeConfig
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.task import LoopConfig
from gigatok_jax.training.tokenizer import ObjectiveConfig, TokenizerRun

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


def get_config(argument: str = "tokenizer") -> TokenizerRun | ProbeConfig:
    """`tokenizer` or `probe`."""
    return lookup(argument, {"tokenizer": tokenizer, "probe": probe}, "run")()


def tokenizer() -> TokenizerRun:
    size = TransformerSize(depth=1, heads=4, width=64)
    return TokenizerRun(
        model=TokenizerConfig(
            encoder=size,
            decoder=size,
            layout="2d",
            image_size=32,
            latents=64,
            base_channels=16,
            channel_multipliers=(1, 1, 2),
            residual_blocks=1,
            z_channels=32,
            codebook_size=1024,
            semantic_layer=1,
            semantic_dim=96,
            init="fan_in",
        ),
        objective=ObjectiveConfig(
            l2=8.0,
            perceptual=0.1,
            adversarial=0.0,
            semantic=0.1,
            entropy=0.02,
            perceptual_distance="teacher",
            teacher="embedded",
        ),
        data=DataConfig(source="embedded", length=20_000, eval_length=256),
        optimizer=OptimizerConfig(rate=2e-3, final_rate=1e-4, warmup_steps=50, clip=1.0),
        loop=LoopConfig(log_every=100, evaluate_every=500, checkpoint_every=500),
        steps=800,
        batch_size=8,
        average_decay=0.98,
        evaluation_images=256,
    )


def probe() -> ProbeConfig:
    """That of the dilemma, with a larger generator that trains for fewer steps."""
    like = dilemma.probe(seed="0")
    sampling = SamplingConfig(guidance=3.0, temperature=0.8)
    generator = dataclasses.replace(
        like.generator,
        model=GeneratorConfig(
            depth=4,
            heads=2,
            width=128,
            codes=64,
            codebook_size=1024,
            classes=10,
            positions="rotary_2d",
            adaln="block",
            dropout=0.0,
        ),
        optimizer=dataclasses.replace(like.generator.optimizer, warmup_steps=50),
        loop=LoopConfig(log_every=100, evaluate_every=300, checkpoint_every=300),
        sampling=sampling,
        steps=600,
        batch_size=16,
        remat="dots",
    )
    return dataclasses.replace(
        like,
        data=DataConfig(source="embedded", length=6_000, eval_length=500),
        generator=generator,
        linear_probe=dataclasses.replace(like.linear_probe, steps=200),
        samples=400,
        sampling=sampling,
        shard_images=4_000,
    )


def measure(workdir: pathlib.Path) -> pathlib.Path:
    """Writes the report of all quantizers to `workdir`, and returns its path."""
    runs = [
        (
            name,
            [f"--config={__file__}:tokenizer", f"--config.model.quantizer={name}", *own],
            [f"--config={__file__}:probe"],
        )
        for name, own in QUANTIZERS.items()
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
