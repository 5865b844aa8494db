"""Trackers get every row once, traces hold the steps they were asked for, and mfu counts FLOPs."""

import json
import logging
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
import test_loop
from test_loop import ToyBatches, ToyTask, run_toy

from gigatok_jax.config import from_mapping
from gigatok_jax.errors import UserError
from gigatok_jax.planning import chips
from gigatok_jax.planning.chips import CHIPS, Chip
from gigatok_jax.training import loop, trackers
from gigatok_jax.training.task import LoopConfig
from gigatok_jax.training.telemetry import read_metrics
from gigatok_jax.training.tokenizer import TokenizerTask

import train_config

PICTURE = np.full((8, 8, 3), 7, np.uint8)


def evaluate(state, frozen):
    return {"held_out/psnr": float(state.step)}, {"reconstruction": PICTURE}


def die():
    raise KeyError("the machine")


def written(workdir):
    return read_metrics(workdir / "metrics.jsonl")


class Recorder:
    """A tracker that keeps what it is sent: rows by the run's id."""

    sent: dict[str, list]

    def __init__(self, run):
        self.rows = self.sent.setdefault(run.id, [])
        had = [trackers.place(row["step"], row) for row in self.rows if isinstance(row, dict)]
        self.last = max(had, default=-1)

    def row(self, step, values, pictures):
        self.rows.append({"step": step, **values})

    def close(self, *, failed):
        self.rows.append("failed" if failed else "finished")


@pytest.fixture
def recorder(monkeypatch):
    """Takes the place of W&B; returns what it was sent."""
    monkeypatch.setattr(Recorder, "sent", {}, raising=False)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Recorder)
    monkeypatch.setattr(loop, "check_installed", lambda names: None)
    return Recorder.sent


def without_clocks(rows):
    return [{k: v for k, v in row.items() if k not in test_loop.CLOCKS} for row in rows]


# The configuration.


def test_unknown_and_repeated_trackers_are_refused_by_name():
    with pytest.raises(UserError, match=r"^config\.trackers\.1: expected .*'mlflow', got 'excel'$"):
        from_mapping(LoopConfig, {"trackers": ["wandb", "excel"]})
    with pytest.raises(UserError, match=r"^config\.trackers: expected each at most once, got "):
        from_mapping(LoopConfig, {"trackers": ["wandb", "wandb"]})
    assert from_mapping(LoopConfig, {"trackers": []}).trackers == ()


@pytest.mark.parametrize("spec", [None, types.SimpleNamespace(origin=None)])
def test_missing_library_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, spec):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: spec)
    message = r"^config\.loop\.trackers: expected .*'mlflow'; pip install 'gigatok_jax\[mlflow\]'$"
    with pytest.raises(UserError, match=message):
        run_toy(tmp_path / "run", trackers=("tensorboard", "mlflow"))
    assert not (tmp_path / "run").exists()


def test_without_trackers_only_metrics_and_pictures_are_written(tmp_path):
    run_toy(tmp_path, evaluate=evaluate, trackers=())
    assert not (tmp_path / "tensorboard").exists()
    assert len(written(tmp_path)) == 5 and len(list((tmp_path / "pictures").iterdir())) == 1


# What a tracker is sent.


def test_rows_come_once_although_a_killed_run_makes_them_again(tmp_path, recorder):
    options = {"evaluate": evaluate, "log_every": 2, "evaluate_every": 10}
    for step in (18, 13, 13):  # the rows after step 7 or 14 are made again, twice after step 7
        with pytest.raises(KeyError):
            run_toy(tmp_path, ToyBatches(at={step: die}), trackers=("wandb",), **options)
        shutil.rmtree(tmp_path / "checkpoints" / "14", ignore_errors=True)
    run_toy(tmp_path, trackers=("wandb",), **options)
    ((_, sent),) = recorder.items()
    assert [row for row in sent if isinstance(row, str)] == ["failed"] * 3 + ["finished"]
    rows = [row for row in sent if isinstance(row, dict)]
    assert without_clocks(rows) == test_loop.rows(tmp_path)
    assert len(rows) == 12


def test_tracker_that_is_added_later_gets_the_rows_before(tmp_path, recorder):
    run_toy(tmp_path, evaluate=evaluate, steps=10, trackers=())
    run_toy(tmp_path, evaluate=evaluate, trackers=("wandb", "tensorboard"))
    ((_, sent),) = recorder.items()
    assert sent == [*written(tmp_path), "finished"]
    assert points(tmp_path, "value") == [(5, 1.5), (10, 4.0), (15, 6.5), (20, 9.0)]
    assert [step for step, _ in points(tmp_path, "reconstruction")] == [10, 20]


def test_tracker_that_fails_is_left_out_and_complete_after_a_resume(
    tmp_path, recorder, monkeypatch, caplog
):
    whole = Recorder.row

    def row(self, step, values, pictures):
        if step >= 10:
            raise ConnectionError("no route\nto the server")
        whole(self, step, values, pictures)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "gigatok_jax"):
        patch.setattr(Recorder, "row", row)
        assert len(run_toy(tmp_path, evaluate=evaluate, trackers=("wandb", "tensorboard"))) == 1
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(
        "config.loop.trackers: wandb failed (ConnectionError: no route); the run goes on without it"
    )
    assert len(written(tmp_path)) == 5 and len(points(tmp_path, "value")) == 4
    run_toy(tmp_path, trackers=("wandb",))
    ((_, sent),) = recorder.items()
    assert sent == [*written(tmp_path), "finished"]


def test_moved_run_stays_one_run_and_a_copy_is_another(tmp_path, recorder):
    first, moved, copy = (tmp_path / name for name in ("first", "moved", "copy"))
    run_toy(first, steps=10, trackers=("wandb",))
    first.rename(moved)
    run_toy(moved, steps=15, trackers=("wandb",))
    shutil.copytree(moved, copy)
    for _ in range(2):
        run_toy(copy, trackers=("wandb",))
    assert len(recorder) == 2

    def sent():
        return [[row for row in rows if row != "finished"] for rows in recorder.values()]

    assert sent() == [written(moved), written(copy)]
    run_toy(first, steps=5, trackers=("wandb",))  # a new run where the first one was
    run_toy(moved, trackers=("wandb",))
    assert sent() == [written(moved), written(copy), written(first)]


def test_configuration_is_told_flat(tmp_path, recorder, monkeypatch):
    told = []
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda run: told.append(run) or Recorder(run))
    run_toy(tmp_path / "name", trackers=("wandb",))
    (run,) = told
    assert run.name == "name"
    assert run.config["loop.trackers"] == ["wandb"] and run.config["steps"] == 20


# TensorBoard.


def events(workdir):
    """The events of a run in the order of writing."""
    found = []
    for path in sorted((workdir / "tensorboard").glob("events*")):
        content, at = path.read_bytes(), 0
        while at < len(content):  # length, its checksum, the event, its checksum
            (size,) = struct.unpack_from("<Q", content, at)
            if at + size + 16 <= len(content):
                found.append(Event.FromString(content[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def shown(workdir, name):
    """The points that TensorBoard shows: a start drops the points of its step and later ones."""
    found = []
    for event in events(workdir):
        if event.HasField("session_log"):
            found = [point for point in found if point[0] < event.step]
        for value in event.summary.value:
            if value.tag == name:
                found.append((event.step, value.simple_value))
    return found


def points(workdir, name):
    return [
        (event.step, value.simple_value)
        for event in events(workdir)
        for value in event.summary.value
        if value.tag == name
    ]


def test_tensorboard_has_points_pictures_and_a_start_after_each_resume(tmp_path):
    run_toy(tmp_path, evaluate=evaluate, steps=10)
    run_toy(tmp_path, evaluate=evaluate)
    assert points(tmp_path, "value") == [(5, 1.5), (10, 4.0), (15, 6.5), (20, 9.0)]
    assert points(tmp_path, "held_out/psnr") == [(10, 10.0), (20, 20.0)]
    assert [step for step, _ in points(tmp_path, "reconstruction")] == [10, 20]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 11]


def assert_all_shown(workdir):
    """Asserts that TensorBoard shows each number of `metrics.jsonl` once, in order."""
    for name in ("total", "late", "held_out/psnr"):
        rows = [(row["step"], row[name]) for row in written(workdir) if name in row]
        assert shown(workdir, name) == rows


def test_tensorboard_gets_rows_of_the_time_when_it_was_off_or_had_failed(tmp_path, monkeypatch):
    options = {"evaluate": evaluate, "log_every": 2, "evaluate_every": 10}
    run_toy(tmp_path, **options, steps=10)
    run_toy(tmp_path, **options, steps=20, trackers=())
    run_toy(tmp_path, **options, steps=30)
    assert len(shown(tmp_path, "total")) == 15
    assert_all_shown(tmp_path)

    def full(self, step, values, pictures):
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(trackers.TensorBoard, "row", full)
        run_toy(tmp_path, **options, steps=40)
    run_toy(tmp_path, **options, steps=50)
    assert len(shown(tmp_path, "held_out/psnr")) == 5
    assert_all_shown(tmp_path)


def test_tensorboard_shows_one_curve_after_kills(tmp_path):
    options = {"evaluate": evaluate, "log_every": 2, "evaluate_every": 10}
    # The second run dies before it has made again what the first one had shown.
    for step in (14, 9, 19):
        with pytest.raises(KeyError):
            run_toy(tmp_path, ToyBatches(at={step: die}), **options)
    newest = max((tmp_path / "tensorboard").glob("events*"))
    newest.write_bytes(newest.read_bytes()[:-9])  # in the middle of a row
    run_toy(tmp_path, **options)
    assert len(shown(tmp_path, "total")) == 10
    assert_all_shown(tmp_path)


# W&B, offline.


def folders(workdir):
    """What each `.wandb` file has, oldest first: the run's record, and rows of JSON values.

    A file is a log in LevelDB's format: blocks of 32 KiB with pieces of records, each after its
    checksum, length and type.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((workdir / "wandb").glob("offline-run-*/*.wandb")):
        content, at, piece, run, rows = path.read_bytes(), 7, b"", None, []
        while at + 7 <= len(content):
            if 2**15 - at % 2**15 < 7:  # the end of a block, too short for a piece
                at += 2**15 - at % 2**15
                continue
            _, size, kind = struct.unpack_from("<IHB", content, at)
            piece += content[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last piece
                record, piece = Record.FromString(piece), b""
                run = record.run if record.HasField("run") else run
                if record.HasField("history"):
                    items = record.history.item
                    rows.append({item.key or item.nested_key[0]: item.value_json for item in items})
        found.append((run, rows))
    return found


PROGRAM = """
import os, pathlib, sys, test_trackers
from test_trackers import ToyBatches, evaluate, run_toy

at = {18: lambda: os.kill(os.getpid(), 9)} if sys.argv[2] == "kill" else {}
run_toy(pathlib.Path(sys.argv[1]), ToyBatches(at=at), evaluate=evaluate, log_every=2,
        evaluate_every=10, trackers=("wandb",))
"""


def test_wandb_has_the_rows_of_metrics_jsonl_after_a_kill(tmp_path):
    pytest.importorskip("wandb")
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    environment.pop("WANDB_DIR", None)
    for how, code in (("kill", -9), ("whole", 0)):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), how]
        found = subprocess.run(
            command,
            cwd=pathlib.Path(__file__).parent,
            env=environment | {"PYTHONPATH": str(test_loop.ROOT)},
            capture_output=True,
            text=True,
        )
        assert found.returncode == code, found.stderr
    _, (run, rows) = folders(tmp_path)
    expected = test_loop.rows(tmp_path)
    assert len(rows) == len(expected) == 12
    for row, wanted in zip(rows, expected, strict=True):
        assert {name: float(row[name]) for name in wanted} == wanted
    places = [int(row["_step"]) for row in rows]
    assert places == sorted(set(places))
    pictured = ["held_out/psnr" in row for row in expected]
    assert ["reconstruction" in row for row in rows] == pictured
    identity = json.loads((tmp_path / "trackers.json").read_text())["id"]
    assert (run.run_id, run.display_name, run.project) == (identity, tmp_path.name, "gigatok_jax")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["loop.log_every"] == 2 and config["loop.trackers"] == ["wandb"]


# MLflow.


def test_mlflow_has_the_rows_of_metrics_jsonl_after_a_resume(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "drawings")
    monkeypatch.chdir(tmp_path)  # artifacts of a store without a server
    mlflow.set_tracking_uri(None)
    options = {"evaluate": evaluate, "log_every": 2, "evaluate_every": 10}
    workdir = tmp_path / "run"
    with pytest.raises(KeyError):
        run_toy(workdir, ToyBatches(at={18: die}), trackers=("mlflow",), **options)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("drawings").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FAILED"
    run_toy(workdir, trackers=("mlflow",), **options)
    (run,) = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["loop.log_every"] == "2"
    for name in ("total", "late", "held_out/psnr"):
        expected = [(row["step"], row[name]) for row in written(workdir) if name in row]
        found = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in found] == expected
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert len([path for path in pictures if path.endswith(".png")]) == 2


# Traces.


def traced_steps(workdir):
    """Numbers of the steps in a workdir's traces."""
    found = []
    for path in workdir.glob("tensorboard/plugins/profile/*/*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name == "train":
                        found.append(dict(event.stats)["step_num"])
    return sorted(int(step) for step in found)


def test_trace_has_its_steps_and_a_resumed_run_makes_no_other(tmp_path, caplog):
    run_toy(tmp_path, steps=9, profile_at=8, profile_steps=3)
    assert traced_steps(tmp_path) == [8, 9]  # the run ends before the trace
    with caplog.at_level(logging.INFO, "gigatok_jax"):
        run_toy(tmp_path, profile_at=9)
    assert traced_steps(tmp_path) == [8, 9]
    line = "config.loop.profile_at: no trace of step 9: the run goes on after step 9"
    assert line in caplog.messages


def test_trace_after_the_last_step_is_refused():
    message = r"loop\.profile_at: expected at most the run's 20 steps, got 21"
    with pytest.raises(ValueError, match=message):
        test_loop.ToyRun(loop=LoopConfig(profile_at=21))
    assert test_loop.ToyRun(loop=LoopConfig(profile_at=20)).total_steps == 20


def test_trace_is_closed_when_the_run_fails(tmp_path):
    with pytest.raises(KeyError):
        run_toy(tmp_path, ToyBatches(at={18: die}), profile_at=10, profile_steps=50)
    run_toy(tmp_path / "other", profile_at=10, profile_steps=1)
    assert traced_steps(tmp_path / "other") == [10]


# What the devices do.


def test_mfu_is_the_share_of_the_peak(tmp_path, monkeypatch):
    plain = ToyTask.step

    def step(self, state, batch, frozen, phase):
        """128,000 FLOPs more in early steps, 512,000 in late ones."""
        state, metrics = plain(self, state, batch, frozen, phase)
        size = 40 if phase == "early" else 80
        product = jnp.ones((size, size)) @ jnp.ones((size, 40))
        return state.replace(w=state.w + 1e-9 * product.sum()), metrics

    monkeypatch.setattr(ToyTask, "step", step)
    monkeypatch.setattr(chips, "find", lambda device: Chip(0, 1e9, 0))
    run_toy(tmp_path, log_every=4)
    devices = len(jax.devices())
    for row in written(tmp_path)[:-1]:
        count = {4: 128e3, 8: 128e3, 12: 320e3}.get(row["step"], 512e3)
        steps_per_second = row["images_per_second"] / 4
        assert row["mfu"] == pytest.approx(steps_per_second * count / 1e9 / devices)


def test_unknown_devices_have_no_mfu(tmp_path):
    run_toy(tmp_path)
    assert not any({"mfu", "peak_memory_gb"} & row.keys() for row in written(tmp_path))


def test_recomputation_is_not_in_the_models_flops():
    task = TokenizerTask(train_config.get_config())
    assert (task.tokenizer.remat, task.without_remat().tokenizer.remat) == ("dots", "none")
    assert task.without_remat().step.__func__ is TokenizerTask.step


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GB200", None),
        ("cpu", None),
    ],
)
def test_devices_are_found_by_their_kind(kind, name):
    assert chips.find(types.SimpleNamespace(device_kind=kind)) == CHIPS.get(name)


def test_peak_memory_is_that_of_the_fullest_device():
    stats = [None, {"peak_bytes_in_use": 2_000_000_000}, {"peak_bytes_in_use": 3_500_000_000}]
    devices = [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]
    row = loop.peak_memory(types.SimpleNamespace(local_devices=devices))
    assert row == {"peak_memory_gb": 3.5}
    assert loop.peak_memory(types.SimpleNamespace(local_devices=devices[:1])) == {}
