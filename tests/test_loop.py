"""The training loop: what it writes, how it stops, and that going on changes nothing."""

import dataclasses
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import Literal
from unittest import mock

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from gigatok_jax import bundles, sharding
from gigatok_jax.config import configclass, from_mapping, to_config_dict
from gigatok_jax.errors import RunStopped, UserError
from gigatok_jax.training import checkpoints, loop
from gigatok_jax.training.checkpoints import Checkpoints
from gigatok_jax.training.task import LoopConfig, RunConfig, Task
from gigatok_jax.training.telemetry import read_metrics
from gigatok_jax.training.tokenizer import TokenizerRun, TokenizerTask

import train_config

ROOT = pathlib.Path(__file__).parent.parent
CLOCKS = {"images_per_second", "input_wait"}


# A task whose program compiles at once: `w` sums up the batches' numbers.


@flax.struct.dataclass
class ToyState:
    step: jax.Array
    w: jax.Array


@configclass(kw_only=True)
class ToyRun(RunConfig):
    task: Literal["toy"] = "toy"
    steps: int = 20
    batch_size: int = 4

    def open_task(self):
        return ToyTask(self)


class ToyTask(Task):
    """The loss `value` is the batch's number; `late` exists from step 11 on."""

    frozen = np.float32(0.5)

    def __init__(self, run, advise=None):
        self.run = run
        self.advise = advise or (lambda row: None)

    def init(self, key):
        return ToyState(jnp.zeros((), jnp.int32), jax.random.normal(key, (1_000,)))

    def phase(self, step):
        return "late" if step >= 10 else "early"

    def step(self, state, batch, frozen, phase):
        value = batch["label"].mean() * frozen
        metrics = {"total": value + 1, "value": value}
        if phase == "late":
            metrics["late"] = value
        return ToyState(state.step + 1, state.w * 0.9 + value), metrics

    def norms(self, state, phase):
        return {f"norm_{phase}": jnp.linalg.norm(state.w)}

    def bundle(self, state):
        return (state,)


class ToyBatches:
    """Batch n holds `values(n)`; `at` maps numbers to what happens as a batch is read."""

    class_names = ()

    def version(self):
        return "toy"

    def __init__(self, values=float, at=None):
        self._values, self._at, self._next = values, at or {}, 1

    def __next__(self):
        self._at.get(self._next, lambda: None)()
        value, self._next = self._values(self._next), self._next + 1
        return {"label": np.full(4, value, np.float32)}

    def get_state(self):
        return {"next": self._next}

    def set_state(self, state):
        self._next = state["next"]

    def close(self):
        pass


def run_toy(workdir, batches=None, *, finish=None, evaluate=None, advise=None, steps=20, **config):
    """Runs the toy; returns the states of bundles that it wrote, at most one."""
    config = {"log_every": 5, "evaluate_every": 0, "checkpoint_every": 7} | config
    run = ToyRun(steps=steps, loop=LoopConfig(**config), seed=3)
    evaluate = evaluate or (lambda state, frozen: ({}, {}))
    finished = []
    finish = finish or finished.append
    batches = batches or ToyBatches()
    with (
        mock.patch.object(ToyRun, "open_task", lambda run: ToyTask(run, advise)),
        mock.patch.object(loop.pipeline, "train_batches", lambda *args: batches),
        mock.patch.object(loop, "HeldOut", lambda task, mesh: evaluate),
        mock.patch.object(loop.bundles, "save", lambda path, state: finish(state)),
    ):
        loop.train(run, workdir)
    return finished


def saved_steps(workdir):
    folders = (workdir / "checkpoints").glob("[0-9]*")
    return sorted(int(folder.name) for folder in folders if folder.name.isdigit())


def rows(workdir):
    """What is in `metrics.jsonl`, but for the clocks."""
    metrics = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in metrics]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    (state,) = run_toy(workdir)
    return workdir, state


def test_rows_are_means_since_the_last_row(whole):
    found = [row for row in rows(whole[0]) if "total" in row]
    assert [row["step"] for row in found] == [5, 10, 15, 20]
    np.testing.assert_allclose([row["value"] for row in found], [1.5, 4.0, 6.5, 9.0])
    assert "late" not in found[1]
    assert found[2]["late"] == found[2]["value"]


@pytest.mark.parametrize(
    "step, number",
    [(3, signal.SIGTERM), (13, signal.SIGINT), (14, signal.SIGTERM), (19, signal.SIGTERM)],
)
def test_stop_saves_and_going_on_equals_a_whole_run(tmp_path, whole, step, number):
    before = signal.getsignal(number)
    # The loop reads two batches ahead, so this signal comes during step `step`.
    ahead = {step + 1: lambda: os.kill(os.getpid(), number)}
    with pytest.raises(RunStopped, match=f"stopped by {number.name} after step {step} of 20"):
        run_toy(tmp_path, ToyBatches(at=ahead))
    assert signal.getsignal(number) is before
    assert saved_steps(tmp_path)[-1] == step
    (state,) = run_toy(tmp_path)
    assert rows(tmp_path) == rows(whole[0])
    np.testing.assert_array_equal(state.w, whole[1].w)
    assert state.step == 20


def test_run_that_dies_goes_on_from_its_last_checkpoint(tmp_path, whole):
    def die():
        raise KeyError("the machine")

    with pytest.raises(KeyError):
        run_toy(tmp_path, ToyBatches(at={18: die}))
    assert saved_steps(tmp_path) == [7, 14]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "val')  # cut off by a kill
    (state,) = run_toy(tmp_path)
    assert rows(tmp_path) == rows(whole[0])
    np.testing.assert_array_equal(state.w, whole[1].w)


def test_signal_in_the_last_step_does_not_stop_a_run_that_is_done(tmp_path):
    def evaluate(state, frozen):
        os.kill(os.getpid(), signal.SIGTERM)
        return {}, {}

    assert len(run_toy(tmp_path, evaluate=evaluate)) == 1


def test_checkpoints_are_of_their_step_although_training_goes_on(tmp_path):
    run_toy(tmp_path, keep_last=5, checkpoint_every=1, steps=5)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    toy = ToyTask(ToyRun())
    abstract = loop.abstract_state(toy, mesh)
    w = np.asarray(loop.fresh_state(toy, abstract, seed=3).w)
    expected = [w := w * np.float32(0.9) + np.float32(step * 0.5) for step in range(1, 6)]
    for step in range(5, 0, -1):
        opened = Checkpoints(tmp_path / "checkpoints", keep_last=5)
        found = opened.restore(abstract)
        opened.close()
        assert found.step == found.state.step == step
        np.testing.assert_allclose(found.state.w, expected[step - 1], rtol=1e-5, atol=1e-6)
        shutil.rmtree(tmp_path / "checkpoints" / str(step))


def test_checkpoint_that_was_cut_off_in_place_is_ignored_and_written_again(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    options = {"keep_last": 3, "checkpoint_every": 2, "steps": 6}
    (expected,) = run_toy(tmp_path, commit="file", **options)
    (folder / "6" / checkpoints.DONE).unlink()
    shutil.rmtree(folder / "6" / "progress")
    assert checkpoints.saved_steps(folder) == [2, 4]
    with caplog.at_level(logging.INFO, logger="gigatok_jax"):
        (state,) = run_toy(tmp_path, **options)  # without commit="file"
    assert f"resuming from step 4 in {tmp_path}" in caplog.text
    assert checkpoints.saved_steps(folder) == [2, 4, 6]
    np.testing.assert_array_equal(state.w, expected.w)


def test_no_changed_byte_of_a_checkpoint_is_restored(tmp_path):
    run_toy(tmp_path / "run", keep_last=1, steps=5)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    abstract = loop.abstract_state(ToyTask(ToyRun()), mesh)

    def restore(folder):
        opened = Checkpoints(folder, read_only=True)
        found = opened.restore(abstract)
        opened.close()
        return np.asarray(found.state.w).tobytes(), found.progress

    whole, copy = tmp_path / "run" / "checkpoints", tmp_path / "copy"
    expected, refused = restore(whole), 0
    shutil.copytree(whole, copy)
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for place in range(0, len(content), max(len(content) // 20, 1)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
            try:
                assert restore(copy) == expected, (path, place)
            except UserError as error:
                refused += 1
                assert str(error).startswith(f"{copy / '5'}: checkpoint is damaged")
        path.write_bytes(content)
    assert restore(copy) == expected and refused


def test_damaged_checkpoint_is_one_line_of_a_process(tmp_path):
    run_toy(tmp_path, steps=5)
    (path,) = (tmp_path / "checkpoints" / "5" / "state" / "d").iterdir()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    # TensorStore reports to event loops that Orbax has closed.
    program = f"""
import pathlib, test_loop
from gigatok_jax import cli, errors

def main():
    try:
        test_loop.run_toy(pathlib.Path({str(tmp_path)!r}))
    except errors.UserError as error:
        print(error)
        return 2

cli.main = main
cli.entry()
"""
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    line = found.stdout.splitlines()[-1]
    assert line.startswith(f"{tmp_path}/checkpoints/5: checkpoint is damaged") and len(line) < 600


def test_digest_of_a_checkpoint_sees_order_sign_and_keys():
    key = jax.random.key(0)
    state = {"a": jax.random.normal(key, (8, 6)), "b": jnp.arange(8, dtype=jnp.bfloat16), "k": key}
    for name, other in {"a": state["a"][::-1], "b": -state["b"], "k": jax.random.key(1)}.items():
        assert checkpoints._digests(state | {name: other}, {}) != checkpoints._digests(state, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_value_that_is_not_finite_stops_and_nothing_bad_is_saved(tmp_path, bad):
    # Step 14 itself is bad, and due for a checkpoint.
    batches = ToyBatches(lambda n: bad if n >= 14 else float(n))
    message = rf"late, total, value became {bad} at step 14; last good checkpoint: step 7"
    with pytest.raises(RunStopped, match=message):
        run_toy(tmp_path, batches, finish=lambda state: pytest.fail("no bundle of a bad state"))
    assert saved_steps(tmp_path) == [7]
    assert len(run_toy(tmp_path)) == 1  # goes on from step 7 with good batches
    assert rows(tmp_path)[-1]["step"] == 20


def test_value_that_is_not_finite_is_seen_before_anything_is_saved(tmp_path):
    batches = ToyBatches(lambda n: float("nan"))
    with pytest.raises(RunStopped, match="at step 1; last good checkpoint: none yet"):
        run_toy(tmp_path, batches)
    assert saved_steps(tmp_path) == []


def test_weights_that_are_not_finite_are_not_saved_even_if_the_metrics_are(tmp_path, monkeypatch):
    plain = ToyTask.step

    def step(self, state, batch, frozen, phase):
        state, metrics = plain(self, state, batch, frozen, phase)
        return state.replace(w=jnp.where(state.step > 10, jnp.inf, state.w)), metrics

    monkeypatch.setattr(ToyTask, "step", step)
    message = "norm_late became inf at step 14; last good checkpoint: step 7"
    with pytest.raises(RunStopped, match=message):
        run_toy(tmp_path, log_every=20)
    assert saved_steps(tmp_path) == [7]


def test_finished_run_that_goes_on_and_explodes_keeps_what_was_good(tmp_path):
    run_toy(tmp_path)
    batches = ToyBatches(lambda n: float("nan") if n > 20 else float(n))
    with pytest.raises(RunStopped, match="at step 21; last good checkpoint: step 20"):
        run_toy(
            tmp_path,
            batches,
            steps=40,
            checkpoint_every=1,
            finish=lambda state: pytest.fail("the bundle stays that of step 20"),
        )
    assert saved_steps(tmp_path) == [14, 20]


@pytest.mark.parametrize(
    "keep_last, keep_every, expected",
    [(1, 0, [20]), (2, 6, [6, 12, 18, 20])],
)
def test_kept_checkpoints(tmp_path, keep_last, keep_every, expected):
    run_toy(tmp_path, checkpoint_every=2, keep_last=keep_last, keep_every=keep_every)
    assert saved_steps(tmp_path) == expected


def test_finished_run_started_again_does_nothing_new(tmp_path):
    run_toy(tmp_path)
    before = rows(tmp_path)
    (state,) = run_toy(tmp_path)
    assert state.step == 20
    assert rows(tmp_path) == before


def test_evaluations_and_pictures_come_at_intervals_and_at_the_end(tmp_path):
    def evaluate(state, frozen):
        picture = np.full((3, 5, 3), int(state.step), np.uint8)
        return {"held_out/psnr": float(state.step)}, {"reconstruction": picture}

    run_toy(tmp_path, evaluate=evaluate, evaluate_every=8)
    found = [row["step"] for row in rows(tmp_path) if "held_out/psnr" in row]
    assert found == [8, 16, 20]
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"reconstruction_{s:08d}.png" for s in found]
    assert Image.open(pictures[0]).size == (5, 3)
    assert np.asarray(Image.open(pictures[0])).max() == 8


def test_advice_is_logged(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "gigatok_jax"):
        run_toy(tmp_path, advise=lambda row: "eat well" if row["step"] == 10 else None)
    assert [record.getMessage() for record in caplog.records] == ["step 10: eat well"]


@pytest.mark.parametrize(
    "field, value", [("log_every", 0), ("keep_last", 0), ("evaluate_every", -1)]
)
def test_impossible_intervals_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: .*{value}"):
        LoopConfig(**{field: value})


# Advice on codebook usage.


def usage_task(**fields):
    model = train_config.get_config().model
    model = dataclasses.replace(model, image_size=16, latents=256, codebook_size=16_384)
    run = dataclasses.replace(train_config.get_config(), model=model, batch_size=128, **fields)
    return TokenizerTask(run)


def advised(usages, every=50):
    """Steps at which advice comes for a usage each `every` steps, and the advice."""
    task = usage_task()
    found = {}
    for i, usage in enumerate(usages, start=1):
        text = task.advise({"step": i * every, "codebook_usage": usage})
        if text:
            found[i * every] = text
    return found


def test_low_usage_is_advised_on_after_patience_and_once():
    found = advised([0.01] * 100)
    assert list(found) == [1_050]  # low since the first row, at step 50
    for word in ("1.0%", "16384", "step 50", "objective.entropy", "warmup_steps", "rotation"):
        assert word in found[1_050]


def test_recovery_restarts_patience_and_healthy_runs_get_no_advice():
    assert not advised([0.6] * 100)
    assert not advised(([0.01] * 20 + [0.5]) * 5)
    assert list(advised([0.01] * 20 + [0.5] + [0.01] * 40)) == [2_100]


def test_short_history_is_not_taken_for_collapse():
    run = train_config.get_config()
    model = dataclasses.replace(run.model, codebook_size=16_384)  # 4 codes per image
    task = TokenizerTask(dataclasses.replace(run, model=model, batch_size=1, usage_patience=1))
    # 40 assignments cannot contain 10 % of 16,384 codes; they contain 40.
    for step in range(1, 11):
        assert task.advise({"step": step, "codebook_usage": step * 4 / 16_384}) is None


# The whole program, killed and stopped.


@pytest.fixture(scope="module")
def gigatok():
    """Starts `gigatok train` on the tiny run in another process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def start(workdir):
        config = pathlib.Path(train_config.__file__)
        command = [sys.executable, "-m", "gigatok_jax", "train", f"--config={config}"]
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def finish(process, code=0):
    """Waits; returns what is on stderr."""
    _, errors = process.communicate(timeout=600)
    assert process.returncode == code, errors
    return errors


def wait_for(path, process):
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def uninterrupted(gigatok, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(gigatok(workdir))
    return workdir


def test_run_leaves_metrics_events_pictures_and_a_bundle(uninterrupted):
    found = read_metrics(uninterrupted / "metrics.jsonl")
    assert [row["step"] for row in found] == [5, 10, 15, 20, 23, 23]
    always = {"total", "l2", "codebook", "commitment", "codebook_usage", "gradient_norm"}
    for row in found[:-1]:
        assert always | CLOCKS <= row.keys()
        assert row["images_per_second"] > 0
        assert 0 <= row["input_wait"] <= 1
        assert ("discriminator" in row) == (row["step"] > 11)
    assert {"held_out/psnr", "held_out/ssim"} <= found[-1].keys()
    assert list((uninterrupted / "tensorboard").glob("events.out.tfevents.*"))
    (picture,) = (uninterrupted / "pictures").glob("*.png")
    # Two rows of eight images of 8 pixels, enlarged to 96, 4 pixels between and around.
    assert Image.open(picture).size == (8 * 100 + 4, 2 * 100 + 4)
    assert saved_steps(uninterrupted) == [21, 23]
    assert bundles.load(uninterrupted / "bundle", "tokenizer").made_by["step"] == 23


def test_kill_then_sigterm_and_going_on_equals_an_uninterrupted_run(
    gigatok, uninterrupted, tmp_path
):
    process = gigatok(tmp_path)
    wait_for(tmp_path / "checkpoints" / "7", process)
    time.sleep(random.uniform(0, 1))
    process.kill()
    process.communicate()
    assert not (tmp_path / "bundle").exists()

    process = gigatok(tmp_path)
    wait_for(tmp_path / "checkpoints" / "14", process)
    process.send_signal(signal.SIGTERM)
    errors = finish(process, code=1)
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if "gigatok: error:" in line]
    assert line.startswith("gigatok: error: stopped by SIGTERM after step ")
    step = int(line.split("after step ")[1].split()[0])
    assert saved_steps(tmp_path)[-1] == step

    finish(gigatok(tmp_path))
    assert rows(tmp_path) == rows(uninterrupted)
    runs = [bundles.load(w / "bundle", "tokenizer").weights for w in (tmp_path, uninterrupted)]
    jax.tree.map(np.testing.assert_array_equal, *runs)


@pytest.mark.parametrize(
    "path, value",
    [
        ("model.codebook_size", 128),
        ("objective.discriminator_channels", (4, 4)),
        ("average_decay", 0.0),
        ("optimizer.algorithm", "lars"),
        ("optimizer.clip", 0.0),
    ],
)
def test_run_of_another_architecture_is_refused_by_field(uninterrupted, path, value):
    before = (uninterrupted / "config.json").read_text()
    fields = to_config_dict(train_config.get_config())
    fields.update_from_flattened_dict({path: value})
    run = from_mapping(TokenizerRun, fields.to_dict())
    with pytest.raises(UserError, match=rf"^config\.{re.escape(path)}: ") as caught:
        loop.train(run, uninterrupted)
    assert caught.value.exit_code == 2
    assert (uninterrupted / "config.json").read_text() == before
