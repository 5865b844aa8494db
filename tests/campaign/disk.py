"""Full disks: each verb on a small tmpfs that fills at a random moment; needs root."""

from collections.abc import Iterator
import contextlib
import functools
import pathlib
import random
import shutil
import subprocess
import time

from tests.campaign import kills, verbs

SIZE = 64  # MiB of the tmpfs; what is not free is filled with a file


def cases(root: pathlib.Path, count: int) -> Iterator:
    for verb, command in verbs.commands(root).items():
        for number in range(count):
            yield f"{verb} {number}", functools.partial(one, root, verb, command, number)


def one(root: pathlib.Path, verb: str, command: list[str], number: int) -> tuple[str, str]:
    """Fills the disk while a verb runs, makes room, and lets the same command go on."""
    expected, seconds = kills._reference(root.with_name("kills"), verb, command)
    rng = random.Random(f"{verb} {number}")
    mount = root / "mount"
    mount.mkdir(parents=True, exist_ok=True)
    options = ["-o", f"size={SIZE}m", "tmpfs", mount]
    subprocess.run(["mount", "-t", "tmpfs", *options], check=True)
    try:
        folder = mount / "run"
        process = verbs.start(command, folder)
        time.sleep(rng.uniform(0, 1) * seconds)
        free = shutil.disk_usage(mount).free
        with contextlib.suppress(OSError):  # the verb may be quicker
            (mount / "filler").write_bytes(b"\0" * max(free - rng.randrange(20_000), 0))
        code, output = verbs.finish(process)
        line = verbs.error_line(output)
        if code == 0:
            outcome = "finished before"
        elif code == 1 and "the disk is full" in line:
            outcome = "one line"
        else:
            return "failed", f"exit {code}: {output}"
        (mount / "filler").unlink()
        code, output = verbs.finish(verbs.start(command, folder))
        if code:
            return "failed", f"does not go on: exit {code}: {output}"
        found = verbs.result(folder)
        different = [name for name in expected | found if expected.get(name) != found.get(name)]
        if different:
            return "failed", f"different: {', '.join(different)}"
        return f"{outcome}, then equal", line
    finally:
        subprocess.run(["umount", "-l", mount], check=True)
