"""Kills at random moments, half of them in the middle of a save; results stay bit for bit."""

from collections.abc import Iterator
import contextlib
import functools
import pathlib
import random
import shutil
import time

from tests.campaign import verbs

VERBS = ("tokenizer", "generator", "linear", "encode", "sample", "probe")
KILLS = 5  # of a case: each run goes on where the one before was killed
PARTIAL = ("*.partial", "*tmp*", "*.partial/*")  # what a save that is under way looks like


def cases(root: pathlib.Path, count: int) -> Iterator:
    for verb in VERBS:
        for number in range(count // KILLS):
            yield f"{verb} {number}", functools.partial(one, root, verb, number)


def one(root: pathlib.Path, verb: str, number: int) -> verbs.Outcome:
    """Kills runs until there were `KILLS`; compares each finished one with an unbroken one."""
    command = verbs.commands(root)[verb]
    expected, seconds = verbs.reference(root, verb)
    rng = random.Random(f"{verb} {number}")
    folder = root / f"{verb}_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    kills = saving = 0
    while True:
        process = verbs.start(command, folder)
        if kills < KILLS:
            in_save = kills % 2 == 0 and _wait_for_save(process, folder, rng, seconds)
            if not in_save:
                time.sleep(rng.uniform(0.1, 1) * seconds)
            if process.poll() is None:
                process.kill()
                process.communicate()
                kills += 1
                saving += in_save
                continue
        code, output = verbs.finish(process)
        if code or "Traceback" in output:
            return "failed", output, {"kills": kills}
        if different := verbs.differences(expected, folder):
            return "failed", f"different: {', '.join(different)}", {"kills": kills}
        shutil.rmtree(folder)
        if kills == KILLS:
            return "equal", "", {"kills": kills, "in a save": saving}


def _wait_for_save(process, folder: pathlib.Path, rng: random.Random, seconds: float) -> bool:
    """Waits for a random one of the saves to begin; False if the run is over before."""
    left = _partial(folder)  # by a kill before
    skipped, seen = rng.randrange(4), set()
    end = time.monotonic() + 3 * seconds
    while process.poll() is None and time.monotonic() < end:
        seen |= _partial(folder) - left
        if len(seen) > skipped:
            return True
        time.sleep(0.001)
    return False


def _partial(folder: pathlib.Path) -> set[tuple]:
    """Paths of saves that are under way, with the time of their last change."""
    found = set()
    with contextlib.suppress(FileNotFoundError):  # renamed while it is listed
        for pattern in PARTIAL:
            found.update((path, path.stat().st_mtime_ns) for path in folder.rglob(pattern))
    return found
