"""Two and four processes, of which any one is killed, stopped or slow."""

from collections.abc import Iterator
import contextlib
import functools
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

from tests.campaign import kills, verbs

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


def one(root, command: list[str], how: str, size: int, number: int) -> tuple[str, str]:
    """A lost process ends the others within a minute; a slow one does not. The run goes on."""
    expected, _ = kills._reference(root.with_name("kills"), "tokenizer", command)
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
            return "failed", "local.sh ended"
        line = process.stdout.readline()
    victims = [int(n) for n in re.search(r"are ([\d ]+);", line)[1].split()]
    victim = victims[rng.randrange(size)]
    while not any((folder / "checkpoints").glob("[0-9]*")):
        if process.poll() is not None:
            return "failed", process.stdout.read()
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
        for number in victims:
            os.kill(number, signal.SIGKILL)
        return "failed", "the others did not end"
    finally:
        if how == "stopped":
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
    waited = time.monotonic() - start
    if how != "slow" and process.returncode == 0:
        outcome = "finished before"
    elif how != "slow":
        if "Traceback" in output and "gigatok: error:" not in output:
            return "failed", output
        if waited > 60:
            return "failed", f"the others ended only after {waited:.0f} s"
        outcome = "ended in a minute, then went on"
        code, output = verbs.finish(verbs.start(command, folder))
        if code:
            return "failed", output
    elif process.returncode:
        return "failed", output
    else:
        outcome = "went on"
    found = verbs.result(folder)
    # Of several processes, sums are rounded in another order.
    missing = expected.keys() - found.keys()
    return ("failed", f"missing: {missing}") if missing else (outcome, "")
