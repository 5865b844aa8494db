"""Several processes as one run, real ones on this machine, started by launch/local.sh."""

import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from gigatok_jax import distributed
from gigatok_jax.errors import UserError
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.training.telemetry import read_metrics

import tiny

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "tests" / "train_config.py"
TIMEOUT = 20  # seconds
TOKENIZER = tiny.config(image_size=16, latents=4, channel_multipliers=(1, 1))
GENERATOR = GeneratorConfig(1, 2, 16, codes=4, codebook_size=64, classes=10)
TRAIN = [
    "train",
    f"--config={CONFIG}",
    "--config.steps=12",
    "--config.objective.adversarial=0",
    "--config.loop.log_every=1",
    "--config.loop.checkpoint_every=2",
]


def command(count: int, arguments: list[str]) -> list[str]:
    if count == 1:
        return [sys.executable, "-m", "gigatok_jax", *arguments]
    flags = [f"--timeout={TIMEOUT}"]
    return ["bash", str(ROOT / "launch" / "local.sh"), str(count), *arguments, *flags]


def gigatok(count: int, arguments: list[str], tmp_path: pathlib.Path) -> subprocess.Popen:
    """Starts a command in so many processes; the logs of all but the first go to `tmp_path`."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # they run for a second
        "GIGATOK_CACHE": str(tmp_path / "cache"),
        "LOGS": str(tmp_path / "logs"),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command(count, arguments), cwd=ROOT, env=environment, **pipes)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def rows(workdir: pathlib.Path) -> list[dict]:
    timing = {"images_per_second", "input_wait"}
    return [
        {name: value for name, value in row.items() if name not in timing}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]


def test_a_lost_process_is_named_and_ends_the_others(tmp_path):
    broken = tmp_path / "broken"
    two = gigatok(2, [*TRAIN, "--config.steps=100000", f"--workdir={broken}"], tmp_path)
    line = two.stdout.readline()
    while "are " not in line:
        assert line, "local.sh ended"
        line = two.stdout.readline()
    victim = int(re.search(r"are (\d+) (\d+);", line)[2])
    while not any((broken / "checkpoints").glob("[0-9]*")):
        assert two.poll() is None, two.stdout.read()
        time.sleep(0.1)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    output, _ = two.communicate(timeout=300)
    assert time.monotonic() - killed < TIMEOUT + 15
    assert two.returncode != 0
    assert "process 1 was ended by signal 9" in output
    # In the middle of a save it is the runtime that ends the others, and names the lost one.
    ours, runtimes = r"gigatok: error: lost process 1 of 0 to 1, not at", r"heartbeats\):\s+1\s"
    assert re.search(f"{ours}|{runtimes}", output), output


def test_run_of_two_processes_goes_on_in_one(tmp_path):
    constant = [*TRAIN, "--config.optimizer.schedule=constant"]
    for counts in ((1,), (2, 1)):
        workdir = tmp_path / "-".join(map(str, counts))
        for steps, count in zip((6, 12)[-len(counts) :], counts, strict=True):
            finish(
                gigatok(
                    count, [*constant, f"--config.steps={steps}", f"--workdir={workdir}"], tmp_path
                )
            )
    expected, found = (
        [row for row in rows(tmp_path / name) if "total" in row] for name in ("1", "2-1")
    )
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_codes_and_metrics_are_those_of_one_process(tmp_path):
    networks = tiny.save_networks(tmp_path / "networks", TOKENIZER, GENERATOR)
    data = [f"--config={CONFIG}", "--config.data.eval_length=20", "--batch_size=8"]
    tokenizer, generator = (f"--{name}={networks[name]}" for name in ("tokenizer", "generator"))
    jobs = {
        "encode": ["encode", tokenizer, *data, "--crop_factors=", "--shard_images=16"],
        "reconstruction": ["evaluate", "reconstruction", tokenizer, *data, "--features=embedded"],
        "generation": [
            *("evaluate", "generation", tokenizer, generator, *data, "--features=embedded"),
            *("--count=20",),
        ],
    }
    for name, job in jobs.items():
        for count in (1, 2):
            finish(gigatok(count, [*job, f"--out={tmp_path / name / str(count)}"], tmp_path))
        if name == "encode":
            digests = [
                {
                    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                    for path in (tmp_path / name / str(count)).iterdir()
                }
                for count in (1, 2)
            ]
            assert digests[0] == digests[1] and len(digests[0]) >= 5
        else:
            one, two = (
                json.loads((tmp_path / name / str(count) / "metrics.json").read_text())
                for count in (1, 2)
            )
            # Convolutions of half the batch round otherwise, and with them a few pixels.
            assert one == pytest.approx(two, rel=1e-3), name


@pytest.mark.parametrize(
    "fields, message",
    [
        (("", 2, 0), "--coordinator, --processes and --process: expected all of them or none"),
        (("host", 2, 0), "expected HOST:PORT"),
        (("host:1", 2, 2), "a number and a smaller one"),
        (("host:1", 2, 1, 3), "--timeout: expected at least 10 seconds, got 3"),
    ],
)
def test_impossible_processes_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        distributed.Processes(*fields)


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
def test_launchers_are_told_by_the_environment(environment, several):
    assert distributed._several(environment) == several
