"""Several processes as one run, real ones on this machine, started by launch/local.sh."""

import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import time

import numpy as np
import pytest

from gigatok_jax import bundles, cli, commands, distributed
from gigatok_jax.data import codes, shards
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import protocol
from gigatok_jax.training.telemetry import read_metrics

import tiny

ROOT = pathlib.Path(__file__).parents[1]
PROBE = ROOT / "tests" / "probe_config.py"
MORE_SAMPLES = ["--config.samples=600", "--config.sample_batch_size=64"]  # two chunks of them
TIMEOUT = 20  # seconds
TOKENIZER = tiny.config(image_size=16, latents=4, channel_multipliers=(1, 1))
# Of a generator, because it compiles sooner than a tokenizer.
TRAIN = [
    "train",
    f"--config={ROOT / 'configs' / 'generator.py'}:tiny",
    "--config.data.source=codes",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.model.width=16",
    "--config.model.codes=4",
    "--config.model.codebook_size=64",
    "--config.model.classes=3",
    "--config.batch_size=8",
    "--config.optimizer.warmup_steps=2",
    "--config.loop.log_every=1",
]


def two_processes(arguments: list[str], tmp_path: pathlib.Path) -> subprocess.Popen:
    """Starts a command; the second process's log goes to `tmp_path`."""
    command = ["bash", str(ROOT / "launch" / "local.sh"), "2", *arguments, f"--timeout={TIMEOUT}"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "GIGATOK_CACHE": str(tmp_path / "cache"),
        "LOGS": str(tmp_path / "logs"),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(process: subprocess.Popen) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def run_here(arguments: list[str]) -> None:
    """Runs a command in this process, which has JAX imported already."""
    name, *flags = arguments
    values = cli.parse(name, commands.VERBS[name], flags)
    for flag in ("coordinator", "processes", "process", "timeout"):
        del values[flag]
    commands.VERBS[name].run(**values)


def losses(workdir: pathlib.Path) -> list[dict]:
    """Logged rows of steps, of what does not depend on the machine's speed."""
    timing = {"images_per_second", "input_wait"}
    return [
        {name: value for name, value in row.items() if name not in timing}
        for row in read_metrics(workdir / "metrics.jsonl")
        if "total" in row
    ]


def started(process: subprocess.Popen, workdir: pathlib.Path, count: int) -> list[int]:
    """Ids of a run's processes, once it has written so many checkpoints."""
    line = process.stdout.readline()
    while "are " not in line:
        assert line, "local.sh ended"
        line = process.stdout.readline()
    while len(list((workdir / "checkpoints").glob("[0-9]*"))) < count:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    return [int(number) for number in re.search(r"are ([\d ]+);", line)[1].split()]


@pytest.fixture
def stored(tmp_path) -> pathlib.Path:
    """Codes of noise."""
    folder = tmp_path / "codes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    counts = {"train": (16,), "validation": (8,)}
    for split, (count,) in counts.items():
        records = [
            {"codes": rng.integers(64, size=(1, 4), dtype=np.uint16), "label": i % 3, "key": str(i)}
            for i in range(count)
        ]
        codes.write_shard(shards.shard_path(folder, split, 0, 1), records)
    codes.STORE.write_info(
        folder, codes.CodesInfo("0" * 16, 4, 64, ("a", "b", "c"), {}, (), 16, counts)
    )
    return folder


def test_sigterm_to_one_process_saves_all_and_a_lost_process_ends_the_others(stored, tmp_path):
    workdir = tmp_path / "run"
    endless = [*TRAIN, "--config.steps=10000000", f"--config.data.path={stored}"]
    endless.append(f"--workdir={workdir}")
    more = [*endless, "--config.loop.checkpoint_every=10000000"]  # the notice's is the only one

    two = two_processes(more, tmp_path)
    log = workdir / "metrics.jsonl"
    while not (log.exists() and log.read_text()):  # until the first step, a notice ends a process
        assert two.poll() is None, two.stdout.read()
        time.sleep(0.1)
    os.kill(started(two, workdir, 0)[1], signal.SIGTERM)
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 1, output
    step = int(re.search(r"stopped by SIGTERM after step (\d+) of 10000000", output)[1])
    assert [path.name for path in (workdir / "checkpoints").glob("[0-9]*")] == [str(step)]
    assert f"stopped by SIGTERM after step {step} of" in (tmp_path / "logs" / "1.log").read_text()

    two = two_processes([*endless, "--config.loop.checkpoint_every=20"], tmp_path)
    os.kill(started(two, workdir, 3)[1], signal.SIGKILL)
    killed = time.monotonic()
    output, _ = two.communicate(timeout=300)
    assert time.monotonic() - killed < TIMEOUT + 15
    assert two.returncode != 0
    assert f"resuming from step {step} in" in output
    assert "process 1 was ended by signal 9" in output
    # In the middle of a save it is the runtime that ends the others, and names the lost one.
    ours, runtimes = r"gigatok: error: lost process 1 of 0 to 1, not at", r"heartbeats\):\s+1\s"
    assert re.search(f"{ours}|{runtimes}", output), output


def test_run_of_two_processes_goes_on_along_another_axis_and_in_one_process(stored, tmp_path):
    command = [*TRAIN, f"--config.data.path={stored}", "--config.optimizer.schedule=constant"]
    command += ["--config.steps=12", "--config.loop.checkpoint_every=2"]
    run_here([*command, f"--workdir={tmp_path / 'single'}"])
    workdir = tmp_path / "run"
    command.append(f"--workdir={workdir}")
    for axis, steps in (("data", 4), ("tensor", 8)):
        mesh = [f"--config.mesh.{name}={2 if name == axis else 1}" for name in ("data", "tensor")]
        finish(two_processes([*command, *mesh, f"--config.steps={steps}"], tmp_path))
    run_here(command)
    expected = losses(tmp_path / "single")
    assert len(expected) == 12
    for one, other in zip(expected, losses(workdir), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_probe_of_two_processes_equals_that_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path / "cache"))
    tokenizer = tmp_path / "tokenizer"
    bundles.save(tokenizer, "tokenizer", TOKENIZER, tiny.weights(TOKENIZER), {})
    arguments = ["probe", f"--config={PROBE}", f"--tokenizer={tokenizer}", *MORE_SAMPLES]
    run_here([*arguments, f"--workdir={tmp_path / '1'}"])
    finish(two_processes([*arguments, f"--workdir={tmp_path / '2'}"], tmp_path / "other"))
    found = {}
    for count in (1, 2):
        found[count] = json.loads((tmp_path / str(count) / "results.json").read_text())
        for name in ("search", "encode_ms", "decode_ms"):
            found[count].pop(name)
    one, two = (protocol.comparable(result.pop("protocol")) for result in found.values())
    assert one == two and one["reconstruction.images"] > 0
    # Convolutions of half the batch round otherwise, and with them a few pixels.
    assert found[1] == pytest.approx(found[2], rel=1e-3)
    one, two = (files(tmp_path / str(count) / "codes") for count in (1, 2))
    assert one == two and len(one) >= 5
    one, two = (np.load(tmp_path / str(count) / "samples" / "samples.npz") for count in (1, 2))
    assert len(one["arr_0"]) == 80
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"]).max() <= 1


def files(directory: pathlib.Path) -> dict[str, str]:
    """Digests of a folder's files, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


@pytest.mark.parametrize(
    "fields, message",
    [
        (("", 2, 0), "--coordinator, --processes and --process: expected all of them or none"),
        (("host", 2, 0), "as HOST:PORT"),
        (("host:1", 2, 2), "a count and an index below it"),
        (("host:1", 2, 1, 3), "--timeout: expected at least 10 seconds, got 3"),
    ],
)
def test_impossible_processes_are_rejected(fields, message):
    with pytest.raises(UserError, match=message):
        distributed.start(*fields)


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False),  # the batch script around srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ],
)
def test_launchers_are_found_in_the_environment(environment, several):
    assert distributed._launched_with_others(environment) == several
