"""Trains the included models of drawings: `python -m tools.train_drawings`.

This is `gigatok demo` with the flags of `LONGER`; more flags of the demo may follow. The tokenizer
is rounded to 16 bits and written to the package before its generator is trained, because a
generator belongs to the very weights that made its codes. A second call resumes where the first one
stopped.
"""

from collections.abc import Sequence
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gigatok_jax import bundles, cli, commands, demo, locate
from gigatok_jax.evaluation import probing
from gigatok_jax.files import Path, as_path
from gigatok_jax.training.loop import train
from gigatok_jax.weights import convert

LONGER = (
    "--tokenizer.steps=2000",
    "--tokenizer.average_decay=0.99",
    "--tokenizer.data.length=16000",
    "--probe.data.length=16000",
    "--probe.generator.steps=2000",
)


def main(arguments: Sequence[str]) -> None:
    flags = cli.parse("demo", commands.VERBS["demo"], [*LONGER, *arguments])
    workdir = as_path(flags["workdir"] or "runs/drawings")
    train(flags["tokenizer"], workdir / "tokenizer")
    include(demo.TOKENIZER, workdir / "tokenizer")
    results = probing.probe(demo.TOKENIZER, flags["probe"], workdir / "probe")
    temperature = flags["probe"].sampling.temperature
    include(
        demo.GENERATOR,
        workdir / "probe" / "generator",
        published_tokenizer=demo.TOKENIZER,
        sampling={"guidance": results["guidance"], "temperature": temperature},
    )
    demo.quick(workdir / "quick")


def include(name: str, workdir: Path, **made_by: Any) -> None:
    """Writes a run's bundle to the package as `name`, with floats of 16 bits."""
    kind, folder = locate.INCLUDED[name]
    bundle = bundles.load(workdir, kind, convert.KINDS[kind].config)
    weights = jax.tree.map(
        lambda x: x.astype(np.float16) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        bundle.weights,
    )
    run = bundle.made_by["run"]
    run["data"]["path"] = ""  # of codes on the machine that trained
    bundles.save(folder, kind, bundle.config, weights, bundle.made_by | made_by)


if __name__ == "__main__":
    main(sys.argv[1:])
