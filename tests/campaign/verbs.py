"""The verbs that the campaign runs, on networks and data of seconds."""

from collections.abc import Mapping
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from gigatok_jax import bundles
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.training.telemetry import read_metrics
from gigatok_jax.weights import convert

import tiny

TESTS = pathlib.Path(__file__).parents[1]
TOKENIZER = tiny.config(image_size=16, latents=4, channel_multipliers=(1, 1))
GENERATOR = GeneratorConfig(1, 2, 16, codes=4, codebook_size=64, classes=10)
CLOCKS = {"images_per_second", "input_wait"}
TIMEOUT = 600  # seconds
Outcome = tuple[str, str, dict[str, int]]  # in a word, in detail, and what was counted


def networks(root: pathlib.Path) -> dict[str, str]:
    """Bundles of a tokenizer and a generator, made once; name to folder."""
    folder = root.parent / "networks"
    if not folder.exists():
        tiny.save_networks(folder, TOKENIZER, GENERATOR)
    return {name: str(folder / name) for name in ("tokenizer", "generator")}


def released(root: pathlib.Path) -> pathlib.Path:
    """A tokenizer in the form of the published ones, made once."""
    path = root.parent / "released.pt"
    if not path.exists():
        convert.to_file("tokenizer", networks(root)["tokenizer"], path)
    return path


def pictures(root: pathlib.Path) -> pathlib.Path:
    """A folder of twelve small PNGs of noise, made once."""
    folder = root.parent / "pictures"
    if not folder.exists():
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def commands(root: pathlib.Path) -> dict[str, list[str]]:
    """Arguments of each verb, without the folder for results, which comes last."""
    flags = {name: f"--{name}={path}" for name, path in networks(root).items()}
    train = f"--config={TESTS / 'train_config.py'}"
    probe = f"--config={TESTS / 'probe_config.py'}"
    often = ["--config.loop.checkpoint_every=2", "--config.loop.log_every=2"]
    generator = [
        f"--config={TESTS / 'probe_config.py'}:generator",
        f"--config.tokenizer={networks(root)['tokenizer']}",
    ]
    linear = [
        f"--config={TESTS / 'probe_config.py'}:linear_probe",
        f"--config.tokenizer={networks(root)['tokenizer']}",
        "--config.features=encoder",
    ]
    data = ["--config.data.length=48", "--config.data.eval_length=16"]
    return {
        "tokenizer": ["train", train, *often, "--workdir"],
        "generator": ["train", *generator, *often, "--workdir"],
        "linear": ["train", *linear, *often, "--workdir"],
        "encode": [
            *("encode", flags["tokenizer"], train, *data),
            *("--batch_size=4", "--shard_images=4", "--out"),
        ],
        "sample": [
            *("sample", *flags.values(), "--classes=0-4", "--count=40", "--batch_size=4", "--out")
        ],
        "probe": ["probe", flags["tokenizer"], probe, "--workdir"],
        "reconstruct": [
            *("reconstruct", flags["tokenizer"], f"--images={pictures(root)}", "--batch_size=4"),
            "--out",
        ],
        "evaluate": [
            *("evaluate", "generation", *flags.values(), train, *data),
            *("--features=embedded", "--count=24", "--batch_size=8", "--out"),
        ],
        "convert": [
            *("convert", "tokenizer", f"--from={released(root)}"),
            *(f"--model={networks(root)['tokenizer']}", "--out"),
        ],
    }


def start(arguments: list[str], folder: pathlib.Path) -> subprocess.Popen:
    """Starts a verb, whose last argument is the flag of the folder for results."""
    *rest, flag = arguments
    command = [sys.executable, "-m", "gigatok_jax", *rest, f"{flag}={folder}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=TESTS.parent, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Waits; returns the exit code and what was printed."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return process.returncode, output


def reference(root: pathlib.Path, verb: str) -> tuple[Mapping[str, str], float]:
    """Results of an unbroken run, and the seconds that one takes with compiled programs."""
    folder, clock = root / f"{verb}_reference", root / f"{verb}_seconds"
    if not clock.exists():
        for _ in range(2):  # the first one compiles
            shutil.rmtree(folder, ignore_errors=True)
            start_time = time.monotonic()
            code, output = finish(start(commands(root)[verb], folder))
            if code:
                raise RuntimeError(output[-500:])
        clock.write_text(str(time.monotonic() - start_time))
    return result(folder), float(clock.read_text())


def differences(expected: Mapping[str, str], folder: pathlib.Path) -> list[str]:
    """Names of results that are not as expected."""
    found = result(folder)
    return [name for name in expected | found if expected.get(name) != found.get(name)]


def pages(folder: pathlib.Path) -> int:
    """Memory pages that the files of a folder take."""
    return sum(-(-path.lstat().st_size // 4096) for path in folder.rglob("*"))


def result(folder: pathlib.Path) -> Mapping[str, str]:
    """Digests of all results in a folder, by path, but for clocks and what holds them."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or any(part in name for part in ("tensorboard/", "checkpoints/")):
            continue
        if path.name == "metrics.jsonl":
            rows = [{k: v for k, v in r.items() if k not in CLOCKS} for r in read_metrics(path)]
            content = json.dumps(rows).encode()
        elif path.name == "samples.npz":  # a zip, which has the time in it
            with np.load(path) as arrays:
                content = b"".join(arrays[name].tobytes() for name in arrays)
        elif path.name == "config.json" and "bundle" in path.parts[-2]:
            content = bundles.load(path.parent, json.loads(path.read_text())["kind"]).fingerprint
            content = content.encode()
        elif path.suffix in (".html", ".json", ".npy") or path.name == "generator":
            if path.suffix == ".html" or "folder" in path.name:
                continue
            content = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        else:
            content = path.read_bytes()
        found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def error_line(output: str) -> str:
    """The one line of an error; "" if there is another number of them, or a traceback."""
    lines = [line for line in output.splitlines() if "gigatok: error:" in line]
    return lines[0] if len(lines) == 1 and "Traceback" not in output else ""
