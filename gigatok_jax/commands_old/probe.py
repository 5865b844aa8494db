"""gigatok probe --tokenizer=DIR --workdir=DIR --config=configs/probe.py [--config.FIELD=VALUE ...]

AR probing (paper, 3.1): evaluates a tokenizer by a small generator trained on its codes. A restart
resumes at the first unfinished step:
  reconstruction  metrics and pictures of the evaluation images
  codes           of all images
  generator       trains the small generator
  loss            its validation loss
  generation      metrics of its samples, at the best guidance
  linear_probe    trains a linear classifier on its features
  samples         samples by class
  maps            principal components of the decoder's features (Fig. 8)
WORKDIR gets a folder for each step, tokenizer.json (what was probed), results.json (all metrics)
and report.html, everything in one file.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from gigatok_jax.config import from_mapping
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import probing

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "how to probe it", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", None, "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "folder for everything", flag_values=FLAGS)
flags.mark_flags_as_required(["config", "tokenizer", "workdir"], flag_values=FLAGS)


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    config = from_mapping(probing.ProbeConfig, FLAGS.config.to_dict())
    probing.probe(FLAGS.tokenizer, config, Path(FLAGS.workdir))
