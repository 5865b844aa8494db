"""python -m benchmarks.run [NAME[:MODEL[:BATCH]] ...] --out=FILE.json

Measures this program on this machine, next to the least time that the hardware allows and, if
PyTorch is installed, the same computation in PyTorch (`benchmarks.yardstick`). --help lists names
and defaults; without names, all are measured. Other measurements already in FILE are kept, so that
several runs can fill one table.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases, host
from benchmarks.cases import Case, Rival
from benchmarks.timing import calls
from gigatok_jax.cli import take_huge_pages
from gigatok_jax.errors import UserError, lookup
from gigatok_jax.files import write_json
from gigatok_jax.models.layers import compute_dtype
from gigatok_jax.planning import chips

GUIDANCE = 2.0
# By name: function that prepares the case, and model and batch on CPUs and on accelerators.
CASES: dict[str, tuple[Callable[..., Case], tuple[str, int], tuple[str, int]]] = {
    "encode": (cases.encode, ("s_s", 4), ("b_l", 64)),
    "decode": (cases.decode, ("s_s", 4), ("b_l", 64)),
    "tokenizer_step": (cases.tokenizer_step, ("s_s", 2), ("s_s", 32)),
    "tokenizer_step_adversarial": (
        functools.partial(cases.tokenizer_step, adversarial=True),
        ("s_s", 2),
        ("s_s", 32),
    ),
    "generator_step": (cases.generator_step, ("b", 8), ("b", 64)),
    "sample": (cases.sample, ("b", 8), ("b", 64)),
    "sample_guided": (functools.partial(cases.sample, guidance=GUIDANCE), ("b", 8), ("b", 64)),
    "code_search": (cases.code_search, ("s_s", 4), ("s_s", 64)),
    "features": (cases.features, ("inception", 8), ("inception", 64)),
    "input": (host.augmentation, ("bicubic", 64), ("bicubic", 64)),
    "checkpoint_save": (host.save, ("b", 1), ("b", 1)),
    "checkpoint_restore": (host.restore, ("b", 1), ("b", 1)),
    "start_up_cold": (host.cold, ("tiny_tiny", 2), ("tiny_tiny", 8)),
    "start_up_warm": (host.warm, ("tiny_tiny", 2), ("tiny_tiny", 8)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, epilog=_defaults())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME[:MODEL[:BATCH]]")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="JSON file of the results")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each (5)")
    parser.add_argument("--photos", type=pathlib.Path, help="folder of JPEGs for `input`")
    parser.add_argument(
        "--remat", choices=("none", "dots", "full"), help="policy for training steps (the config's)"
    )
    parser.add_argument("--no-yardstick", action="store_true", help="do not run PyTorch")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {arguments.repeats}")
    host.photos, cases.remat = arguments.photos, arguments.remat
    # The yardstick's process needs some of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        wanted = [_parse(name) for name in arguments.names or CASES]
    except UserError as error:
        parser.error(str(error))
    machine = Machine.find()
    report = {"machine": dataclasses.asdict(machine), "results": {}}
    if arguments.out.exists():
        old = read(parser, arguments.out)
        if old["machine"]["device"] != machine.device:
            parser.error(f"--out: {arguments.out} is of {old['machine']['device']}")
        report["results"] = old["results"]
    print(describe_machine(report["machine"]), HEADER, sep="\n", flush=True)
    for name, model, batch in wanted:
        try:
            result = measure(CASES[name][0], model, batch, machine, arguments)
        except UserError as error:
            parser.error(str(error))
        key = f"{name}:{model}:{batch}"
        report["results"][key] = result
        write_json(arguments.out, report)  # after each, so that an interruption loses nothing
        print(row(key, result), flush=True)


def read(parser: argparse.ArgumentParser, path: pathlib.Path) -> dict[str, Any]:
    """Reads a file of results, or exits with an error in one line."""
    try:
        report = json.loads(path.read_text())
        return {"machine": report["machine"], "results": report["results"]}
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{path}: expected a file written by benchmarks.run ({error})")


def _defaults() -> str:
    lines = [
        f"  {name:<28}{':'.join(map(str, cpu)):<14}{':'.join(map(str, other))}"
        for name, (_, cpu, other) in CASES.items()
    ]
    return "\n".join([f"{'names':<30}{'on CPUs':<14}on accelerators", *lines])


def _parse(text: str) -> tuple[str, str, int]:
    name, *rest = text.split(":")
    default = lookup(name, CASES, "benchmark")[1 if jax.default_backend() == "cpu" else 2]
    model = rest[0] if rest else default[0]
    batch = rest[1] if len(rest) > 1 else str(default[1])
    if len(rest) > 2 or not batch.isdigit() or int(batch) < 1:
        raise UserError(f"{text!r}: expected NAME[:MODEL[:BATCH]], BATCH a positive number")
    return name, model, int(batch)


@dataclasses.dataclass(frozen=True)
class Machine:
    """The hardware that sets the limits.

    Attributes:
      device: kind and number of devices.
      peak: FLOPs per second, of all devices together.
      bandwidth: bytes per second to and from all main memories.
      known: True if these are the maker's figures, False if they were measured just now.
      dtype: of the computation.
      versions: of the libraries.
    """

    device: str
    peak: float
    bandwidth: float
    known: bool
    dtype: str
    versions: dict[str, str]

    @classmethod
    def find(cls) -> "Machine":
        devices, dtype = jax.devices(), compute_dtype("auto")
        kind = devices[0].device_kind
        chip = chips.find(devices[0])
        if chip:
            peak, bandwidth = chip.flops * len(devices), chip.bandwidth * len(devices)
        else:
            peak, bandwidth = _product_rate(dtype), _copy_rate()
        if kind == "cpu":
            kind = f"{_processor()}, {os.cpu_count()} cores"
        versions = {name: importlib.metadata.version(name) for name in ("jax", "flax")}
        name = f"{len(devices)}x {kind}" if len(devices) > 1 else kind
        return cls(name, peak, bandwidth, chip is not None, jnp.dtype(dtype).name, versions)


def _processor() -> str:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "CPU"


def _product_rate(dtype: Any, size: int = 4096) -> float:
    """FLOPs per second of a large matrix product, the best of five."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    seconds = min(seconds_of(lambda: product(x, x)) for _ in range(5))
    return 2 * size**3 / seconds


def _copy_rate(size: int = 2**28) -> float:
    """Bytes per second that an addition reads and writes, the best of five."""
    x = jnp.ones(size, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    add(x).block_until_ready()
    return 8 * size / min(seconds_of(lambda: add(x)) for _ in range(5))


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def steady_seconds(call: Callable[[], Any]) -> float:
    """Seconds per call in a loop.

    A first call, with cold memory and caches, is left out. On accelerators, short calls are queued
    like the steps of a training run.
    """
    count = calls(seconds_of(call), jax.default_backend())

    def queue():
        for _ in range(count - 1):
            call()
        return call()

    return seconds_of(queue) / count


def measure(
    prepare: Callable[..., Case], model: str, batch: int, machine: Machine, arguments: Any
) -> dict[str, Any]:
    """Times a case, and its rival right before and after each call."""
    case = prepare(model, batch)
    yardstick, ours, theirs, ratios = _yardstick(case, arguments), [], [], []
    if yardstick:
        before = yardstick.seconds()
        theirs.append(before)
    for _ in range(min(arguments.repeats, case.repeats or arguments.repeats)):
        ours.append(case.seconds() if case.seconds else steady_seconds(case.call))
        if yardstick:
            after = yardstick.seconds()
            ratios.append((before + after) / 2 / ours[-1])
            theirs.append(after)
            before = after
    seconds = statistics.median(ours)
    limit = max(case.flops / machine.peak, case.bytes / machine.bandwidth, case.limit)
    result = {
        "compile_seconds": case.compile_seconds,
        "seconds": seconds,
        "least": min(ours),
        "most": max(ours),
        "repeats": len(ours),
        "images_per_second": case.images / seconds if case.images else None,
        "flops": case.flops,
        "flops_per_second": case.flops / seconds,
        "share_of_peak": case.flops / seconds / machine.peak,
        "memory_bytes": case.memory,
        "limit_seconds": limit,
        "limit": case.limited_by or ("FLOPs" if case.flops / machine.peak == limit else "bytes"),
    }
    if yardstick:
        result["yardstick"] = yardstick.answer | {
            "seconds": statistics.median(theirs),
            "least": min(theirs),
            "most": max(theirs),
            "ratio": statistics.median(ratios),
        }
        yardstick.close()
    case.close()
    return result


def _yardstick(case: Case, arguments: Any) -> "Yardstick | Local | None":
    if not isinstance(case.rival, Rival):
        return case.rival and Local(case.rival)
    rival, case.rival = case.rival, None  # frees its arrays
    if arguments.no_yardstick or importlib.util.find_spec("torch") is None:
        return None
    return Yardstick(rival)


class Local:
    """A rival that runs in this process; see `Yardstick`."""

    def __init__(self, call: Callable[[], Any]):
        self._call, self.answer = call, {}

    def seconds(self) -> float:
        return steady_seconds(self._call)

    def close(self) -> None:
        pass


class Yardstick:
    """The process that runs PyTorch.

    Attributes:
      answer: its device and version.

    Raises:
      RuntimeError: its results differ from ours.
    """

    def __init__(self, rival: Rival):
        command = [sys.executable, "-m", "benchmarks.yardstick"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, **pipes)
        with tempfile.TemporaryDirectory() as folder:
            path, found = (pathlib.Path(folder) / name for name in ("arrays.npz", "found.npy"))
            arrays = {name: np.asarray(array) for name, array in rival.arrays.items()}
            for name, tree in rival.trees.items():
                for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
                    arrays["/".join([name, *(key.key for key in keys)])] = np.asarray(leaf)
            np.savez(path, **arrays)
            request = {"task": rival.task, "path": str(path), "result": str(found)}
            self.answer = self._ask(request | {"config": rival.config})
            if not rival.agrees(np.asarray(rival.expected()), np.load(found)):
                self.close()
                raise RuntimeError(f"{rival.task}: the yardstick computes something else")

    def seconds(self) -> float:
        return self._ask({})["seconds"]

    def _ask(self, request: dict) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the yardstick's process ended")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


HEADER = (
    f"{'':<34}{'compile':>9}{'median':>10}{'least':>10}{'most':>10}{'images/s':>10}"
    f"{'TFLOP/s':>9}{'peak':>7}{'memory':>10}{'limit':>10}{'':<7}{'other':>10}{'ratio':>7}"
)


def describe_machine(machine: dict[str, Any]) -> str:
    how = "from the data sheet" if machine["known"] else "measured"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['device']}, {machine['dtype']}: {machine['peak'] / 1e12:.3g} TFLOP/s and "
        f"{machine['bandwidth'] / 1e9:.3g} GB/s, {how}; {versions}"
    )


def row(name: str, result: dict[str, Any]) -> str:
    """A line of the table."""

    def number(value, form, width):
        return f"{'' if value is None else format(value, form):>{width}}"

    other = result.get("yardstick") or {}
    memory = result["memory_bytes"]
    flops = result["flops_per_second"] or None
    return (
        f"{name:<34}{number(result['compile_seconds'], '.1f', 9)}"
        + "".join(number(result[field], ".4g", 10) for field in ("seconds", "least", "most"))
        + number(result["images_per_second"], ".2f", 10)
        + number(flops and flops / 1e12, ".3f", 9)
        + number(flops and result["share_of_peak"], ".1%", 7)
        + number(memory and memory / 1e9, ".2f", 7)
        + (" GB" if memory else "   ")
        + number(result["limit_seconds"] or None, ".4g", 10)
        + f" {result['limit']:<6}"
        + number(other.get("seconds"), ".4g", 10)
        + number(other.get("ratio"), ".2f", 7)
    )


if __name__ == "__main__":
    take_huge_pages()
    main()
