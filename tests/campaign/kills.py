"""Kills at random moments, half of them in the middle of a save; results stay bit for bit."""

from collections.abc import Iterator
import contextlib
import functools
import pathlib
import random
import shutil
import time

from tests.campaign import verbs

PARTIAL = ("*.partial", "*tmp*", "*.partial/*")  # what a save that is under way looks like


def cases(root: pathlib.Path, count: int) -> Iterator:
    for verb, command in verbs.commands(root).items():
        for number in range(count):
            yield f"{verb} {number}", functools.partial(one, root, verb, command, number)


def one(root: pathlib.Path, verb: str, command: list[str], number: int) -> tuple[str, str]:
    """Kills a run once or twice, lets it finish, and compares with one that was never killed."""
    expected, seconds = _reference(root, verb, command)
    rng = random.Random(f"{verb} {number}")
    folder = root / f"{verb}_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    saving = 0
    for _ in range(rng.choice((1, 1, 2))):
        process = verbs.start(command, folder)
        in_save = number % 2 == 0 and _wait_for_save(process, folder, rng, seconds)
        if not in_save:
            time.sleep(rng.uniform(0.1, 1) * seconds)
        saving += in_save
        process.kill()
        process.communicate()
    code, output = verbs.finish(verbs.start(command, folder))
    if code or "Traceback" in output:
        return "failed", output
    found = verbs.result(folder)
    different = [name for name in expected | found if expected.get(name) != found.get(name)]
    if different:
        return "failed", f"different: {', '.join(different)}"
    shutil.rmtree(folder)
    return ("equal, killed in a save" if saving else "equal"), ""


def _reference(root: pathlib.Path, verb: str, command: list[str]) -> tuple[dict, float]:
    """Results of an unbroken run, and the seconds that one takes with compiled programs."""
    folder, clock = root / f"{verb}_reference", root / f"{verb}_seconds"
    if not clock.exists():
        for _ in range(2):  # the first one compiles
            shutil.rmtree(folder, ignore_errors=True)
            start = time.monotonic()
            code, output = verbs.finish(verbs.start(command, folder))
            if code:
                raise RuntimeError(output[-500:])
        clock.write_text(str(time.monotonic() - start))
    return dict(verbs.result(folder)), float(clock.read_text())


def _wait_for_save(process, folder: pathlib.Path, rng: random.Random, seconds: float) -> bool:
    """Waits for a random one of the saves to begin; False if the run is over before."""
    skipped, seen = rng.randrange(4), set()
    end = time.monotonic() + 3 * seconds
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(FileNotFoundError):  # renamed while it is listed
            for pattern in PARTIAL:
                seen.update(folder.rglob(pattern))
        if len(seen) > skipped:
            return True
        time.sleep(0.001)
    return False
