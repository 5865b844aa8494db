"""Locks on folders that only one command at a time may write to."""

from collections.abc import Callable, Iterator
import contextlib
import json
import logging
import os
import pathlib
import socket
import threading
import time
from typing import IO
import uuid

from gigatok_jax import files
from gigatok_jax.errors import RunStopped, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

NAME = ".lock"
BEAT = 10.0  # seconds between signs of life
LOST = 45.0  # seconds without a sign of life after which the owner on another machine is lost
SETTLED = 1.0  # seconds after which the owner of a lock in a bucket is known
OLD = 3600.0  # seconds after which no wait is needed, even if the machines' clocks disagree


@contextlib.contextmanager
def hold(folder: files.Path) -> Iterator[None]:
    """Holds the lock of a folder, which is created if it is missing.

    The operating system releases the lock when this process ends, even if it is killed. Shared file
    systems may keep such locks from other machines, so the owner also touches the file regularly.
    In buckets that is all: the next command waits until a killed owner counts as lost.

    Raises:
      UserError: another process holds the lock.
    """
    if files.in_bucket(folder):
        with _hold_object(folder / NAME):
            yield
        return
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    done = threading.Event()
    try:
        with _acquire(path) as file:
            file.truncate(0)
            file.write(json.dumps(_myself()))
            file.flush()
            files.clean(folder)
            threading.Thread(target=_beat, args=(done, lambda: os.utime(path)), daemon=True).start()
            try:
                yield
            finally:
                done.set()
                if _same(file, path):  # not that of a process that took this one for lost
                    path.unlink()
    except OSError as error:
        if error.errno in files.MACHINE and error.filename is None:
            error.filename = str(folder)  # the most likely one
        raise
    finally:
        if created:  # a command that was rejected leaves nothing
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def _hold_object(path: files.Path) -> Iterator[None]:
    """Holds a lock that is an object in a bucket, which its owner writes again and again."""
    mine, done = _myself() | {"id": uuid.uuid4().hex}, threading.Event()

    def text() -> str:
        return json.dumps(mine | {"time": time.time()})

    if not files.create(path, text()):
        owner = _owner(path)
        if owner and not _has_ended(owner) and _beats(path, owner):
            raise UserError(_held(path, owner))
        path.write_text(text())
        # Of processes that take over a lost lock at the same time, the last one to write has it.
        time.sleep(SETTLED)
        owner = _owner(path)
        if owner.get("id") != mine["id"]:
            raise UserError(_held(path, owner))

    def beat():
        if _owner(path).get("id") == mine["id"]:
            path.write_text(text())
        elif not done.is_set():
            logger.error("%s: another process took this one for lost; stopping", path.parent)
            os._exit(RunStopped.exit_code)  # at once: all that it writes now is the other's

    thread = threading.Thread(target=_beat, args=(done, beat), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()  # its last beat would write the lock again
        if _owner(path).get("id") == mine["id"]:
            path.unlink()


def _owner(path: files.Path) -> dict[str, object]:
    """Of a lock in a bucket; empty if it has none."""
    try:
        return _parse(path.read_text())
    except FileNotFoundError:
        return {}


def _myself() -> dict[str, object]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}


def _has_ended(owner: dict[str, object]) -> bool:
    """Whether the owner was a process of this machine that has ended."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        pass
    return False


def _held(path: files.Path, owner: dict[str, object]) -> str:
    return (
        f"{path.parent}: in use by process {owner.get('pid', '?')} on {owner.get('host', '?')} "
        f"since {owner.get('since', '?')}; wait until it ends, or choose another folder"
    )


def _beat(done: threading.Event, beat: Callable[[], None]) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(Exception):  # also those of a bucket's client
            beat()


def _acquire(path: pathlib.Path) -> IO[str]:
    """Opens and locks the file; raises UserError if it has a living owner."""
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")  # a damaged one has no owner
        try:
            locked = _lock(file)
            file.seek(0)
            owner = _parse(file.read())
            # The owner may have removed the file after it was opened here: then try again.
            current = _same(file, path)
            elsewhere = owner.get("host") != socket.gethostname()
            # Within a machine, having got the lock is proof that its last owner is gone.
            if locked is False or (
                current and owner and (locked is None or elsewhere) and _beats(path, owner)
            ):
                raise UserError(_held(path, owner))
            if current:
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _same(file: IO[str], path: pathlib.Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> bool | None:
    """Whether the file could be locked; None if the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _parse(text: str) -> dict[str, object]:
    try:
        owner = json.loads(text)
    except (ValueError, RecursionError):  # empty: its owner has just created it
        return {}
    return owner if isinstance(owner, dict) else {}


def _beats(path: files.Path, owner: dict[str, object]) -> bool:
    """Watches for a sign of life of an owner that may be on another machine."""
    with contextlib.suppress(FileNotFoundError):
        seen = _sign(path)
        if time.time() - seen > OLD:
            return False
        logger.info(
            "%s: last used by %s; watching for %g s whether it still is",
            path.parent,
            owner.get("host"),
            LOST,
        )
        end = time.monotonic() + LOST
        while time.monotonic() < end:
            time.sleep(min(1.0, LOST))
            if _sign(path) != seen:
                return True
    return False


def _sign(path: files.Path) -> float:
    """When the owner last showed a sign of life, by its own clock in buckets."""
    if not files.in_bucket(path):
        return path.stat().st_mtime
    found = _parse(path.read_text()).get("time")
    return found if isinstance(found, float) else 0.0
