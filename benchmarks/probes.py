"""Trains and probes tokenizers of the embedded drawings, one on each free core."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import functools
import os
import pathlib
import queue
import subprocess
import sys

from gigatok_jax import files
from gigatok_jax.files import as_path

Run = tuple[str, Sequence[str], Sequence[str]]  # name, flags of its training, flags of its probe


def measure(workdir: pathlib.Path, runs: Sequence[Run]) -> list[pathlib.Path]:
    """Trains a tokenizer and probes it, for each run.

    Call it again after a kill: finished runs are skipped, others resume.

    Args:
      workdir: gets a folder NAME for each run, with the tokenizer's training in `tokenizer/` and
        the probe around it, and the output of both in NAME.log.
      runs: name, and the flags of `gigatok train` and `gigatok probe`, without those of folders.

    Returns:
      The folders of the probes, in the order of `runs`.

    Raises:
      RuntimeError: a run failed; those that had begun have ended.
      UserError: a folder holds the results of other flags.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    available = sorted(os.sched_getaffinity(0))
    cores = queue.SimpleQueue()
    for core in available:
        cores.put(core)
    with ThreadPoolExecutor(len(available)) as pool:
        return list(pool.map(functools.partial(_measure, workdir, cores), runs))


def _measure(workdir: pathlib.Path, cores: queue.SimpleQueue, run: Run) -> pathlib.Path:
    name, train_flags, probe_flags = run
    folder, tokenizer, log = workdir / name, workdir / name / "tokenizer", workdir / f"{name}.log"
    made_with = as_path(folder / "flags.json")
    if (folder / "results.json").exists() and not made_with.exists():
        raise RuntimeError(f"{folder}: expected results of this program, found others")
    files.claim(made_with, {"train": train_flags, "probe": probe_flags}, "results")
    if (folder / "results.json").exists():
        return folder
    train = ["train", f"--workdir={tokenizer}"]
    probe = ["probe", f"--workdir={folder}", f"--tokenizer={tokenizer}"]
    # Runs that differ in their seed alone compile once.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.resolve() / "compilations")}
    core = cores.get()
    try:
        for arguments in ([*train, *train_flags], [*probe, *probe_flags]):
            with log.open("a") as output:
                status = subprocess.run(
                    [sys.executable, "-m", "gigatok_jax", *arguments],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=cache | os.environ,
                    preexec_fn=functools.partial(os.sched_setaffinity, 0, {core}),
                ).returncode
            if status:
                raise RuntimeError(f"{name}: {arguments[0]} ended with status {status}, see {log}")
    finally:
        cores.put(core)
    print(name, flush=True)
    return folder
