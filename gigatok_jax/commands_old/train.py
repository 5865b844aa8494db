"""gigatok train --config=configs/tokenizer.py:b_l --workdir=DIR [--config.FIELD=VALUE ...]

Trains from scratch, or goes on from DIR's newest checkpoint. DIR gets checkpoints/,
metrics.jsonl, tensorboard/, pictures/, config.json and, at the end, bundle/.
"""

import dataclasses
import json
import logging
import pathlib

from absl import flags
from ml_collections import config_flags

from gigatok_jax import distributed, sharding
from gigatok_jax.config import from_mapping
from gigatok_jax.errors import UserError
from gigatok_jax.files import read_json, write_json
from gigatok_jax.training import loop
from gigatok_jax.training.tasks import TASKS

logger = logging.getLogger(__name__)

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "what to train", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "where the run lives", flag_values=FLAGS)
flags.mark_flags_as_required(["config", "workdir"], flag_values=FLAGS)

# How fields begin that what is in a checkpoint depends on; of the average, only whether it is kept.
STRUCTURE = ("config.task", "config.model", "config.objective.discriminator")
AVERAGE = "config.average_decay"


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    train(FLAGS.config.to_dict(), pathlib.Path(FLAGS.workdir))


def train(mapping: dict, workdir: pathlib.Path) -> None:
    """Runs what `mapping`, a whole configuration, describes.

    Raises:
      UserError: the configuration, the data, or what is in `workdir` cannot work.
      RunStopped: see `training.loop.run`.
    """
    task = mapping.get("task")
    if task not in TASKS:
        raise UserError(f"config.task: expected one of {', '.join(TASKS)}, got {task!r}")
    config = from_mapping(TASKS[task], mapping)
    if config.steps == 0 and not getattr(config, "branch_from", ""):
        logger.info("%g epochs are %d steps", config.epochs, config.total_steps)
    try:
        mesh = sharding.make_mesh(config.mesh)
        sharding.check_batch(config.batch_size, config.accumulate, mesh)
        sharding.batch_block(mesh)  # or a run's data could not be dealt out
    except ValueError as error:
        raise UserError(f"config.{error}") from error
    job = config.job(workdir, mesh)
    _settle(workdir, config)
    shard_frozen = config.mesh.shard_frozen
    loop.run(job, config.loop, mesh, workdir, config.seed, shard_frozen=shard_frozen)


def _settle(workdir: pathlib.Path, config) -> None:
    """Writes `config.json`; refuses a workdir that another architecture's run lives in."""
    path = workdir / "config.json"
    new = _plain(config)
    if path.exists() and any((workdir / "checkpoints").glob("[0-9]*")):
        old = read_json(path, "the run there")
        # What the program has learned since the run started is at its default there.
        task = TASKS.get(old.get("task"), type(config))
        old = _plain(from_mapping(task, old, f"{path}: config"))
        changed = list(_differences(old, new, "config"))
        for name, before, now in changed:
            if name.startswith(STRUCTURE) or (name == AVERAGE and bool(before) != bool(now)):
                raise UserError(f"{name}: {now!r}, but the run in {workdir} has {before!r}")
            logger.warning("%s: %r, was %r when this run started", name, now, before)
    distributed.barrier("config", working=True)  # all have read the old one
    if distributed.is_main():
        write_json(path, new)


def _plain(config) -> dict:
    """A run's configuration as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _differences(old, new, path):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield path, old, new
