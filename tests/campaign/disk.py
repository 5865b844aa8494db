"""Full disks: each verb on a small tmpfs that is filled by its writes; needs root."""

from collections.abc import Iterator
import functools
import pathlib
import random
import subprocess

from tests.campaign import verbs

FILLINGS = 5  # of a case: after each one, the disk grows, and the same command goes on
PAGE = 4096


def cases(root: pathlib.Path, count: int) -> Iterator:
    for verb in verbs.commands(root):
        for number in range(count // FILLINGS):
            yield f"{verb} {number}", functools.partial(one, root, verb, number)


def one(root: pathlib.Path, verb: str, number: int) -> verbs.Outcome:
    """Runs a verb on a disk that is too small, makes room, and goes on, until it is done."""
    command = verbs.commands(root)[verb]
    expected, _ = verbs.reference(root.with_name("kills"), verb)
    needed = verbs.pages(root.with_name("kills") / f"{verb}_reference")
    rng = random.Random(f"{verb} {number}")
    sizes = sorted(rng.randrange(1, needed) for _ in range(FILLINGS))
    mount = root / "mount"
    mount.mkdir(parents=True, exist_ok=True)
    _mount(mount, sizes[0])
    fillings = 0
    try:
        folder = mount / "run"
        for size in (*sizes, 100 * needed):
            _mount(mount, size, "remount,")
            code, output = verbs.finish(verbs.start(command, folder))
            if code == 0:
                break
            if code != 1 or "the disk is full" not in verbs.error_line(output):
                return "failed", f"exit {code}: {output}", {"fillings": fillings}
            fillings += 1
        else:
            return "failed", f"does not go on: {output}", {"fillings": fillings}
        if different := verbs.differences(expected, folder):
            return "failed", f"different: {', '.join(different)}", {"fillings": fillings}
        return "one line each, then equal", "", {"fillings": fillings}
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


def _mount(folder: pathlib.Path, pages: int, how: str = "") -> None:
    options = f"{how}size={pages * PAGE}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
