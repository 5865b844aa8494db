"""Two and four processes, of which any one is killed, stopped or slow."""

from collections.abc import Iterator
import contextlib
import functools
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

from gigatok_jax.training.telemetry import read_metrics
from tests.campaign import verbs

LOST = 20  # seconds without a sign of life after which a process counts as lost


def cases(root: pathlib.Path, count: int) -> Iterator:
    command = verbs.commands(root)["tokenizer"]
    for number in range(count):
        how = ("killed", "stopped", "slow")[number % 3]
        size = (2, 4)[number // 3 % 2]
        yield (
            f"{how} {number} of {size}",
            functools.partial(one, root, command, how, size, number),
        )


def one(root, command: list[str], how: str, size: int, number: int) -> verbs.Outcome:
    """A lost process ends the others within a minute; a slow one does not. The run goes on."""
    expected, _ = verbs.reference(root.with_name("kills"), "tokenizer")
    rng = random.Random(number)
    folder, logs = root / f"{how}_{number}", root / f"logs_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    *rest, flag = command
    started = ["bash", str(verbs.TESTS.parent / "launch" / "local.sh"), str(size), *rest]
    process = subprocess.Popen(
        [*started, f"{flag}={folder}", f"--timeout={LOST}"],
        cwd=verbs.TESTS.parent,
        env=os.environ | {"LOGS": str(logs)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    line = process.stdout.readline()
    while "are " not in line:
        if not line:
            return "failed", "local.sh ended", {}
        line = process.stdout.readline()
    victims = [int(n) for n in re.search(r"are ([\d ]+);", line)[1].split()]
    victim = victims[rng.randrange(size)]
    while not any((folder / "checkpoints").glob("[0-9]*")):
        if process.poll() is not None:
            return "failed", process.stdout.read(), {}
        time.sleep(0.1)
    if how == "killed":
        os.kill(victim, signal.SIGKILL)
    else:
        os.kill(victim, signal.SIGSTOP)
    if how == "slow":
        time.sleep(LOST / 4)
        os.kill(victim, signal.SIGCONT)
    start = time.monotonic()
    try:
        output, _ = process.communicate(timeout=verbs.TIMEOUT)
    except subprocess.TimeoutExpired:
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()
        return "failed", "the others did not end", {}
    finally:
        if how == "stopped":
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
    waited = time.monotonic() - start
    if how != "slow" and process.returncode == 0:
        outcome = "finished before"
    elif how != "slow":
        if "Traceback" in output and "gigatok: error:" not in output:
            return "failed", output, {}
        if waited > 60:
            return "failed", f"the others ended only after {waited:.0f} s", {}
        outcome = "ended in a minute, then went on"
        code, output = verbs.finish(verbs.start(command, folder))
        if code:
            return "failed", output, {}
    elif process.returncode:
        return "failed", output, {}
    else:
        outcome = "went on"
    missing = expected.keys() - verbs.result(folder).keys()
    if missing:
        return "failed", f"missing: {', '.join(missing)}", {}
    # Sums over several processes are rounded in another order.
    single = root.with_name("kills") / "tokenizer_reference"
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (folder, single))
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        return "failed", "other rows", {}
    for one_row, other in zip(ours, theirs, strict=True):
        for name in one_row.keys() - verbs.CLOCKS:
            if not math.isclose(one_row[name], other[name], rel_tol=0.05, abs_tol=0.01):
                text = f"step {other['step']}: {name} {one_row[name]}, alone {other[name]}"
                return "failed", text, {}
    return outcome, "", {}
