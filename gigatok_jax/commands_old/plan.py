"""gigatok plan --config=configs/tokenizer.py:xl_xxl --topology=v5p:4x4x2 [--config.FIELD=VALUE ...]

Compiles the training step (or, with --job=sample, a generator's sampling) for devices that need
not be there: TPUs v4, v5e, v5p, v6e as CHIP:AxB or CHIP:AxBxC, with the `tpu` extra. Prints each
device's memory by part, FLOPs, bytes, a bound on the step's time, and days of training. GPUs (a100,
h100, h200, b200 as CHIP:COUNT), and TPUs without the extra, are estimated from shapes. The exit
code is 1 where the memory does not suffice; settings that do are then listed.
"""

import dataclasses
import os

from absl import flags
from ml_collections import config_flags

from gigatok_jax.config import from_mapping
from gigatok_jax.errors import RunStopped, UserError
from gigatok_jax.planning import chips, plan
from gigatok_jax.training.generator_run import GeneratorRun
from gigatok_jax.training.tokenizer_run import TokenizerRun

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "what to train", flag_values=FLAGS)
flags.DEFINE_string("topology", None, "devices, such as v5e:4x4 or h100:8", flag_values=FLAGS)
flags.DEFINE_enum("job", "train", ["train", "sample"], "which program", flag_values=FLAGS)
flags.DEFINE_float(
    "utilisation",
    0.4,
    "share of the peak FLOPs that a step reaches",
    lower_bound=0.01,
    upper_bound=1.0,
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "effort",
    -1.0,
    "of the compiler: -1 is quick, 0 what a run itself takes; until JAX 0.10",
    lower_bound=-1.0,
    upper_bound=1.0,
    flag_values=FLAGS,
)
flags.mark_flags_as_required(["config", "topology"], flag_values=FLAGS)

TASKS = {"tokenizer": TokenizerRun, "generator": GeneratorRun}

# No device is used: the compiler need not look for any, nor lock those that there are.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    mapping = FLAGS.config.to_dict()
    task = mapping.get("task")
    if task not in TASKS:
        raise UserError(f"config.task: expected one of {', '.join(TASKS)}, got {task!r}")
    if FLAGS.job == "sample" and task != "generator":
        raise UserError(f"--job: sample needs a generator's config, got a {task}'s")
    config = from_mapping(TASKS[task], mapping)
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype="bfloat16")
    topology = chips.topology(FLAGS.topology)
    try:
        made = plan.make(config, topology, FLAGS.job, FLAGS.effort)
    except ValueError as error:
        raise UserError(f"config.{error}") from error
    print("\n".join(describe(made, FLAGS.utilisation)))
    if made.fits:
        return
    if FLAGS.job == "train":
        print("settings that by estimate fit, with a tenth to spare:")
        found = plan.alternatives(config, topology)
        lines = [
            f"  --config.remat={s.remat} --config.mesh.data=-1 --config.mesh.fsdp={s.fsdp}"
            + (f" --config.accumulate={s.accumulate}" if s.accumulate > 1 else "")
            + f": {_size(s.bytes)}"
            for s in found
        ]
        print("\n".join(lines) or "  none: more devices or a smaller batch_size are needed")
    raise RunStopped(f"{topology.name}: the memory of a device does not suffice")


def describe(made: plan.Plan, utilisation: float) -> list[str]:
    """A plan as lines of text."""
    topology, chip = made.topology, made.topology.chip
    estimated = made.compiled_flops is None
    how = "estimated from shapes" if estimated else f"compiled in {made.compile_seconds:.0f} s"
    if made.refusal:
        how = "refused by the compiler"
    lines = [f"{topology.name}: {topology.count} devices, {how}", "memory of a device:"]
    parts = dict(made.parts)
    if made.temporaries is not None:
        name = "activations and gradients" if made.steps > 1 else "temporaries"
        parts[name] = made.temporaries
    if made.code:
        parts["compiled program"] = made.code
    lines += [f"  {name:<26} {_size(size):>12}" for name, size in parts.items()]
    what = "total" if made.temporaries is not None else "total without temporaries"
    lines.append(
        f"  {what:<26} {_size(made.bytes):>12} of {_size(chip.memory)}: "
        + (f"fits, {made.spare:.0%} to spare" if made.fits else "does NOT fit")
    )
    if made.refusal:
        lines.append(f"  {made.refusal}")
    devices = topology.count
    lines += [
        "FLOPs of a step on all devices (products and convolutions):",
        f"  {'model, traced':<26} {made.model_flops / 1e12:9.1f} T",
        f"  {'model and remat, traced':<26} {made.traced_flops / 1e12:9.1f} T",
    ]
    if made.compiled_flops is not None:
        compiled = made.compiled_flops * devices
        share = compiled / made.traced_flops - 1
        lines.append(f"  {'compiled':<26} {compiled / 1e12:9.1f} T ({share:+.1%})")
        lines.append(f"bytes moved by a device: {_size(made.bytes_moved)}")
    seconds = made.step_seconds(utilisation)
    lines.append(
        f"a step takes at least {made.bound_seconds * 1e3:.1f} ms, "
        f"{seconds * 1e3:.1f} ms at {utilisation:.0%} of the peak FLOPs"
    )
    if made.steps > 1:
        days = seconds * made.steps / 86_400
        lines.append(f"{made.steps} steps: {days:.1f} days at {utilisation:.0%}")
    return lines


def _size(count: float) -> str:
    """Bytes, in decimal units as data sheets have them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.2f} kB"
