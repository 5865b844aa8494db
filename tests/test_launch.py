"""Launchers, against stand-ins for the programs that they call."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
LAUNCHERS = [ROOT / "launch" / name for name in ("slurm.sbatch", "tpu_pod.sh", "gke.sh")]
TRAIN = ["train", "--config=configs/tokenizer.py:s_s", "--workdir=/shared/my runs/s_s"]


class Machine:
    """A copy of `launch/` in which programs are stand-ins that write down their arguments."""

    def __init__(self, path: pathlib.Path):
        self.path, self.calls_file = path, path / "calls"
        self.calls_file.touch()
        shutil.copytree(ROOT / "launch", path / "launch")
        (path / "launch" / "environment.sh").write_text("")
        (path / "bin").mkdir()
        self.environment = {
            "PATH": f"{path / 'bin'}:{os.environ['PATH']}",
            "HOME": str(path),
            "CALLS": str(self.calls_file),
        }

    def add(self, name: str, body: str = "") -> None:
        program = self.path / "bin" / name
        program.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$CALLS"\n{body}\n')
        program.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str):
        return subprocess.run(
            ["bash", f"launch/{script}", *arguments],
            cwd=self.path,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, *words: str) -> list[str]:
        """Calls that have all of these words in them."""
        lines = self.calls_file.read_text().splitlines()
        return [line for line in lines if all(word in line for word in words)]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_passes_shellcheck(script):
    subprocess.run(["bash", "-n", script], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert not checked.returncode, checked.stdout


@pytest.mark.parametrize("script", LAUNCHERS, ids=lambda path: path.name)
def test_header_shows_a_tokenizer_a_generator_and_a_probe(script):
    header = script.read_text().partition("\nset -euo")[0]
    for command in (
        "train --config=configs/tokenizer.py:s_s",
        "train --config=configs/generator.py:b",
    ):
        assert command in header
    assert "probe --config=configs/probe.py" in header


@pytest.mark.parametrize("kind", ["cuda", "tpu"])
def test_accelerator_settings_are_known_to_jax(kind):
    program = (
        "import os, json, jax; jax.numpy.zeros(1);"
        "print(json.dumps({name: os.environ.get(name) for name in"
        " ('JAX_PLATFORMS', 'XLA_FLAGS', 'GIGATOK_CACHE')}))"
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "GIGATOK_CACHE")
    }
    # XLA ends a program that sets a flag which it does not know, on any platform.
    printed = subprocess.run(
        ["bash", ROOT / "launch" / "accelerator.sh", kind, sys.executable, "-c", program],
        env=environment | {"JAX_PLATFORMS": "cpu", "SHARED": "/shared"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = json.loads(printed)
    assert found["JAX_PLATFORMS"] == "cpu"  # what is set already stays
    assert found["GIGATOK_CACHE"] == "/shared/cache"
    assert bool(found["XLA_FLAGS"]) == (kind == "cuda")


SRUN = """
[ "${SRUN_CODE:-0}" = 0 ] || exit "$SRUN_CODE"
while [[ "$1" == -* ]]; do shift; done
exec "$@"
"""


def submit(machine, minutes_left=600, **environment):
    machine.add("srun", SRUN)
    machine.add("gigatok")
    machine.add("squeue", f"date --date='{minutes_left} minutes' +%FT%T")
    machine.add("scontrol")
    slurm = {"SLURM_SUBMIT_DIR": str(machine.path), "SLURM_JOB_ID": "7"}
    return machine.run("slurm.sbatch", *TRAIN, SLURM_CPUS_PER_TASK="6", **slurm, **environment)


def test_slurm_starts_a_process_a_gpu_and_lets_the_lost_be_named(machine):
    assert submit(machine).returncode == 0
    (srun,) = machine.calls("srun ")
    assert "--cpus-per-task=6" in srun and "--kill-on-bad-exit=0" in srun and "--wait=0" in srun
    assert "accelerator.sh cuda gigatok train" in srun
    assert machine.calls("gigatok " + " ".join(TRAIN))
    assert not machine.calls("scontrol")
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    options = dict(line[10:].partition("=")[::2] for line in lines if line.startswith("#SBATCH --"))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@300"  # without B:, which would signal the script alone
    assert "requeue" in options


@pytest.mark.parametrize(
    ("minutes_left", "code", "again"), [(4, 1, True), (60, 1, False), (4, 2, False)]
)
def test_slurm_queues_again_what_the_time_limit_stopped(machine, minutes_left, code, again):
    assert submit(machine, minutes_left, SRUN_CODE=str(code)).returncode == code
    assert bool(machine.calls("scontrol requeue 7")) == again


GCLOUD = """
case "$*" in
  *describe*)
    state="$(head -n 1 "$HOME/states")"
    if [ "$(wc -l <"$HOME/states")" -gt 1 ]; then sed -i 1d "$HOME/states"; fi
    [ "$state" != absent ] || exit 1
    echo "$state"
    ;;
esac
"""
SLICE = {"NAME": "mine", "ZONE": "europe-west4-b", "PROJECT": "ours", "TYPE": "v5p-32"}


@pytest.fixture
def cloud(machine):
    machine.add("gcloud", GCLOUD)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "launch"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], cwd=machine.path, check=True)

    def run(states, *arguments, **environment):
        (machine.path / "states").write_text("\n".join(states) + "\n")
        return machine.run("tpu_pod.sh", *arguments, POLL="0", **(SLICE | environment))

    return run


def test_tpu_run_creates_installs_starts_everywhere_and_shows_the_log(machine, cloud):
    done = cloud(["absent", "WAITING_FOR_RESOURCES", "ACTIVE"], "run", *TRAIN, NFS="1.2.3.4:/x")
    assert done.returncode == 0, done.stderr
    (created,) = machine.calls("queued-resources create mine")
    for option in ("--node-id=mine", "--accelerator-type=v5p-32", "--zone=europe-west4-b"):
        assert option in created
    assert "--runtime-version=v2-alpha-tpuv5" in created and "--project=ours" in created
    assert "--spot" not in created
    assert machine.calls("tpu-vm scp", "mine:gigatok.tar.gz", "--worker=all")
    assert machine.calls("--worker=all", "NFS=1.2.3.4:/x", "tpu_worker.sh install")
    assert machine.calls("--worker=all", "tpu_worker.sh start train", r"my\ runs/s_s")
    assert "tpu_worker.sh log" in machine.calls()[-1] and "--worker=0" in machine.calls()[-1]


def test_tpu_run_replaces_a_preempted_slice(machine, cloud):
    assert cloud(["SUSPENDED", "ACTIVE"], "run", *TRAIN, SPOT="1").returncode == 0
    calls = machine.calls("queued-resources")
    assert [call.split()[4] for call in calls] == ["describe", "delete", "create", "describe"]
    assert "--force" in calls[1] and "--spot" in calls[2]


def test_tpu_run_keeps_a_slice_that_is_there(machine, cloud):
    assert cloud(["ACTIVE"], "run", *TRAIN).returncode == 0
    assert not machine.calls("create") and not machine.calls("delete")


@pytest.mark.parametrize(
    ("missing", "arguments"), [("ZONE", ["status"]), ("TYPE", ["create"]), ("run", ["run"])]
)
def test_tpu_says_what_is_missing(machine, cloud, missing, arguments):
    done = cloud(["absent"], *arguments, **{missing: ""})
    assert done.returncode == 2
    assert done.stderr.startswith(f"tpu_pod.sh: {missing}")
    assert not machine.calls("create")


def test_tpu_type_without_a_known_image(cloud):
    assert "set VERSION" in cloud(["absent"], "create", TYPE="v9-8").stderr


def wait_for(condition):
    for _ in range(200):
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come")


def test_tpu_run_outlives_its_connection_and_stops_on_notice(machine):
    machine.add("sudo")
    machine.add("gigatok", "trap 'echo saved; exit 1' TERM\necho up\nwhile :; do sleep 0.05; done")
    shared = machine.path / "shared"
    shared.mkdir()
    settings = {"SHARED": str(shared), "NAME": "mine", "HOSTNAME": "t1v-n-1234-w-3"}
    assert machine.run("tpu_worker.sh", "start", *TRAIN, **settings).returncode == 0
    log = shared / "logs" / "mine" / "worker-3.log"
    wait_for(lambda: log.exists() and "up" in log.read_text())
    pid = int((machine.path / ".gigatok" / "pid").read_text())
    assert os.getpgid(pid) == pid  # of no terminal or connection
    assert "running" in machine.run("tpu_worker.sh", "status", **settings).stdout
    # A host that shuts down tells all of its processes.
    os.kill(pid, signal.SIGTERM)
    assert machine.run("tpu_worker.sh", "stop", **settings).returncode == 0
    wait_for(lambda: "ended with 1" in log.read_text())
    assert "saved" in log.read_text()
    assert "not running" in machine.run("tpu_worker.sh", "status", **settings).stdout


def manifests(machine, kind, **environment):
    settings = {"IMAGE": "registry/gigatok:1", "NAME": "mine", "DRY": "1"}
    done = machine.run("gke.sh", kind, *TRAIN, '--note=a "b", $c', **settings, **environment)
    assert done.returncode == 0, done.stderr
    return {part["kind"]: part["spec"] for part in yaml.safe_load_all(done.stdout)}


@pytest.mark.parametrize(
    ("topology", "hosts", "chips"), [("4x4", 4, 4), ("2x2x4", 4, 4), ("1x1", 1, 1)]
)
def test_gke_slice(machine, topology, hosts, chips):
    found = manifests(machine, "tpu", ACCELERATOR="tpu-v6e-slice", TOPOLOGY=topology)
    (replicated,) = found["JobSet"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert (replicated["replicas"], job["completions"], job["parallelism"]) == (1, hosts, hosts)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["args"] == ["tpu", "gigatok", *TRAIN, '--note=a "b", $c']
    assert pod["terminationGracePeriodSeconds"] == 300


def test_gke_nodes_with_gpus_find_the_first(machine):
    found = manifests(machine, "gpu", ACCELERATOR="nvidia-h100-80gb", NODES="2")
    job, service = found["Job"], found["Service"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"] == 2
    assert pod["subdomain"] == "mine" and service["clusterIP"] == "None"
    assert service["selector"] == {"batch.kubernetes.io/job-name": "mine"}
    assert container["args"][-3:] == [
        "--coordinator=mine-0.mine:8476",
        "--processes=2",
        "--process=$(INDEX)",
    ]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_gke_replaces_the_job_of_that_name(machine):
    machine.add("kubectl", "cat >/dev/null")
    settings = {"IMAGE": "i", "ACCELERATOR": "a", "NAME": "mine"}
    done = machine.run("gke.sh", "gpu", *TRAIN, **settings)
    assert done.returncode == 0
    assert [call.split()[1] for call in machine.calls("kubectl ")] == ["delete", "create"]


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [({"IMAGE": ""}, "IMAGE"), ({"TOPOLOGY": "16"}, "TOPOLOGY"), ({"CHIPS": "3"}, "CHIPS")],
)
def test_gke_says_what_is_wrong(machine, settings, culprit):
    right = {"IMAGE": "i", "ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "4x4"}
    done = machine.run("gke.sh", "tpu", *TRAIN, **(right | settings))
    assert done.returncode == 2 and culprit in done.stderr


@pytest.mark.parametrize(
    "visible, shares", [({}, ["0,1", "2,3"]), ({"CUDA_VISIBLE_DEVICES": "5,7"}, ["5", "7"])]
)
def test_local_processes_share_the_gpus_that_there_are(machine, visible, shares):
    machine.add("nvidia-smi", "printf 'GPU %d\\n' 0 1 2 3")
    machine.add("python", 'if [ "$1" = -c ]; then echo 1234; else env >>"$CALLS"; fi')
    done = machine.run("local.sh", "2", *TRAIN, **visible)
    assert done.returncode == 0, done.stderr
    found = [line.partition("=")[2] for line in machine.calls("CUDA_VISIBLE_DEVICES=")]
    assert sorted(found) == shares


def test_local_kills_a_stopped_process_once_another_has_failed(machine):
    roles = "-c*) echo 1234 ;; *--process=1) kill -STOP $$ ;; *) sleep 1; exit 3 ;;"
    body = f'case "$*" in {roles} esac'
    machine.add("python", body)
    done = machine.run("local.sh", "2", *TRAIN, JAX_PLATFORMS="cpu")
    assert done.returncode == 3, done.stderr
    assert "process 0 ended with 3" in done.stderr
    assert "process 1 was ended by signal 9" in done.stderr
