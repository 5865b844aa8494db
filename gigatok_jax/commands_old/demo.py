"""gigatok demo [--workdir=DIR] [--tokenizer.FIELD=VALUE ...] [--probe.FIELD=VALUE ...]

The main job on drawings that the program makes itself, with the teacher that comes with it: trains
a tiny tokenizer with every loss, reconstructs held-out drawings, and probes it: trains a small
generator on its codes, samples by class, and writes report.html (configs/demo.py). Takes minutes
on two cores. DIR gets tokenizer/ (the run), drawings/ (held out), reconstructions/, samples/, and
probe/, see `gigatok probe`.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from gigatok_jax import config, demo
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation.probing import ProbeConfig
from gigatok_jax.training.tokenizer_run import TokenizerRun

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "runs/demo", "folder for everything", flag_values=FLAGS)
for name, text in (("tokenizer", "what to train"), ("probe", "how to probe it")):
    file = config.CONFIGS / "demo.py"
    config_flags.DEFINE_config_file(name, f"{file}:{name}", text, flag_values=FLAGS)


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    demo.demo(
        Path(FLAGS.workdir),
        config.from_mapping(TokenizerRun, FLAGS.tokenizer.to_dict(), "tokenizer"),
        config.from_mapping(ProbeConfig, FLAGS.probe.to_dict(), "probe"),
    )
