"""gigatok plan --config=configs/tokenizer.py:xl_xxl --topology=v5p:4x4x2 [--config.FIELD=VALUE ...]

Compiles the training step (or, with --job=sample, a generator's sampling) for devices that need
not exist: TPUs v4, v5e, v5p, v6e as CHIP:AxB or CHIP:AxBxC, with the `tpu` extra. Prints each
device's memory by part, FLOPs, bytes, a bound on the step's time, and days of training. GPUs (a100,
h100, h200, b200 as CHIP:COUNT), and TPUs without the extra, are estimated from shapes. If the
memory does not suffice, lists settings that do, and exits with code 1.
"""

from absl import flags
from ml_collections import config_flags

from gigatok_jax.config import from_mapping
from gigatok_jax.errors import UserError
from gigatok_jax.planning import plan
from gigatok_jax.training.generator_run import GeneratorRun
from gigatok_jax.training.tokenizer_run import TokenizerRun

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "what to train", flag_values=FLAGS)
flags.DEFINE_string("topology", None, "devices, such as v5e:4x4 or h100:8", flag_values=FLAGS)
flags.DEFINE_enum("job", "train", ["train", "sample"], "which program", flag_values=FLAGS)
of_peak = "share of the peak FLOPs that a step reaches"
flags.DEFINE_float("utilisation", 0.4, of_peak, 0.01, 1.0, flag_values=FLAGS)
effort = "of the compiler: -1 is the quickest, 0 what runs take; JAX 0.10 only"
flags.DEFINE_float("effort", -1.0, effort, -1.0, 1.0, flag_values=FLAGS)
flags.mark_flags_as_required(["config", "topology"], flag_values=FLAGS)

TASKS = {"tokenizer": TokenizerRun, "generator": GeneratorRun}


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    mapping = FLAGS.config.to_dict()
    task = mapping.get("task")
    if task not in TASKS:
        raise UserError(f"config.task: expected one of {', '.join(TASKS)}, got {task!r}")
    config = from_mapping(TASKS[task], mapping)
    plan.plan(config, FLAGS.topology, FLAGS.job, FLAGS.utilisation, FLAGS.effort)
