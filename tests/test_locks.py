"""Locks on folders: one command at a time, whatever happens to its process."""

import errno
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from gigatok_jax import locks
from gigatok_jax.errors import UserError

HOLDER = """
import pathlib, sys, time
from gigatok_jax import locks
with locks.hold(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLDER, tmp_path / "run"]
    root = pathlib.Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_held_folder_is_refused_until_its_holder_dies(holder, tmp_path):
    message = rf"run: in use by process {holder.pid} on \S+ since .*; wait until it ends, or choose"
    with pytest.raises(UserError, match=message), locks.hold(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    with locks.hold(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_folder_without_results_is_removed_and_another_is_kept(tmp_path):
    with locks.hold(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()
    with locks.hold(tmp_path / "used"):
        (tmp_path / "used" / "x").touch()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["x"]


def test_what_a_killed_process_left_half_done_is_undone(tmp_path):
    for name in (".a.json.7.partial", "images/.b.png.7.partial", ".bundle.7.partial/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in (".bundle.7.old/weights", ".codes.7.old/x", "codes/y", ".hidden", "c.partial"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with locks.hold(tmp_path):
        pass
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == [".hidden", "bundle/weights", "c.partial", "codes/y"]


@pytest.mark.parametrize("alive", [True, False])
def test_the_holder_on_another_machine_is_watched(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(locks, "LOST", 0.5)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: beat())
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "noon"}))
    beats = []

    def beat():
        beats.append(time.monotonic())
        if alive:
            os.utime(path, (1, len(beats)))

    monkeypatch.setattr(locks, "OLD", float("inf"))
    if alive:
        with pytest.raises(UserError, match="in use by process 7 on elsewhere since noon"):
            locks._acquire(path)
    else:
        locks._acquire(path).close()
    assert beats


def test_a_lock_that_was_left_long_ago_is_taken_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: pytest.fail("waited"))
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7, "since": "noon"}))
    os.utime(path, (1, 1))
    locks._acquire(path).close()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 10_000, b"7", b""])
def test_a_damaged_lock_that_nobody_holds_is_taken(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with locks.hold(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not any(tmp_path.iterdir())


def test_write_that_fails_names_the_folder(tmp_path):
    with pytest.raises(OSError) as caught, locks.hold(tmp_path / "run"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as from a write to an open file
    assert caught.value.filename == str(tmp_path / "run")
