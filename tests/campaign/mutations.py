"""Damaged files: bytes flipped, cut, swapped and added. What is read is right, or refused.

A picture may decode to other pixels, and a `.safetensors` file of somebody else's has no checksum:
these may be "read", as may JSON files that only describe. Weights, checkpoints and codes that this
program writes have one, so they are refused, or equal.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import random
import shutil
import signal
import time

import jax
import numpy as np
from PIL import Image

from gigatok_jax import api, bundles, config, encoding, sharding
from gigatok_jax.data import codes, crops
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import features, fid
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.training import loop
from gigatok_jax.training.checkpoints import Checkpoints
from gigatok_jax.training.telemetry import read_metrics
from gigatok_jax.weights import convert, torch_files
from tests.campaign import verbs

PICTURES = ("png", "jpg", "webp", "gif", "bmp", "tif", "jp2", "ppm", "avif", "jfif")
SECONDS, BYTES = 20, 2**30  # that one file may take


def cases(root: pathlib.Path, count: int) -> Iterator:
    kinds = _kinds(root)
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        yield f"{kind} {number}", functools.partial(one, root, kind, kinds[kind], number)


def one(root: pathlib.Path, kind: str, rule: tuple, number: int) -> verbs.Outcome:
    original, target, read, checked = rule
    rng = random.Random(number)
    copy = root / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    if original.is_dir():
        shutil.copytree(original, copy)
        inside = sorted(path for path in copy.rglob(target) if path.is_file())
        where, path = copy, rng.choice(inside)
    else:
        copy.mkdir(parents=True)
        where = path = copy / original.name
        shutil.copy(original, path)
    how, content = _mutate(path.read_bytes(), rng)
    how = f"{path.relative_to(copy)}: {how}"
    whole = read(where)
    path.write_bytes(content)
    start = time.monotonic()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _peak()
    try:
        with _limit(SECONDS):
            found = read(where)
    except (UserError, crops.BadImage, ValueError) as error:
        outcome, detail = "refused", f"{how}: {error}"
        if "\n" in str(error):
            return "failed", f"{how}: several lines: {error}", {}
    except Exception as error:
        return "failed", f"{how}: {type(error).__name__}: {error}", {}
    else:
        outcome, detail = ("equal" if found == whole else "read"), how
        if found != whole and checked:
            return "failed", f"{how}: another result, and no error", {}
    grown = _peak() - before
    if time.monotonic() - start > SECONDS or grown > BYTES:
        return "failed", f"{how}: {time.monotonic() - start:.0f} s, {grown >> 20} MiB", {}
    return outcome, detail, {}


def _peak() -> int:
    """The largest memory of this process since `clear_refs`, in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    """Interrupts what takes longer."""

    def interrupt(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _mutate(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One to three changes; most of them where the structure is: at the beginning or the end."""
    data, done = bytearray(content), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        size = max(len(data), 1)
        edge = rng.random()
        at = rng.randrange(size)
        if edge < 0.3:
            at = rng.randrange(min(size, 256))
        elif edge < 0.5:
            at = size - 1 - rng.randrange(min(size, 256))
        how = rng.choice(("flip", "cut", "drop", "swap", "grow", "zero"))
        length = rng.choice((1, 2, 8, 64, 1024))
        if how == "flip" and data:
            data[at % len(data)] ^= rng.randrange(1, 256)
        elif how == "cut":
            del data[at:]
        elif how == "drop":
            del data[at : at + length]
        elif how == "swap":
            other = rng.randrange(size)
            one, two = bytes(data[at : at + length]), bytes(data[other : other + length])
            if abs(at - other) > length and len(one) == len(two):
                data[at : at + length], data[other : other + length] = two, one
        elif how == "grow":
            data[at:at] = rng.randbytes(length)
        else:
            data[at : at + length] = bytes(len(data[at : at + length]))
        done.append(f"{how} {length} at {at} of {size}")
    return ", ".join(done), bytes(data)


def _kinds(root: pathlib.Path) -> dict[str, tuple[pathlib.Path, str, Callable, bool]]:
    """By kind: the original, the pattern of what is damaged in it, how it is read, and checked."""
    made = root / "originals"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    networks = verbs.networks(root)
    y, x = np.mgrid[:40, :56]
    pixels = np.stack([4 * x, 6 * y, 2 * (x + y)], -1).astype(np.uint8)
    kinds = {}
    for suffix in PICTURES:
        path = made / f"picture.{suffix}"
        Image.fromarray(pixels).save(path)
        kinds[suffix] = (path, "", _picture, False)

    bundle = pathlib.Path(networks["tokenizer"])
    for name in ("config.json", "model.safetensors"):
        kinds[f"bundle/{name}"] = (bundle, name, _bundle, True)
    for suffix, checked in (("safetensors", False), ("pt", True)):
        path = made / f"weights.{suffix}"
        convert.to_file("tokenizer", bundle, path)
        kinds[f"weights.{suffix}"] = (path, "", functools.partial(_weights, bundle), checked)

    folder = made / "codes"
    data = DataConfig(source="embedded", length=24, eval_length=8)
    loaded = api.load_tokenizer(bundle)
    encoding.encode(loaded, data, folder, crop_factors=(), batch_size=8, shard_images=24)
    for name in ("train-00000-of-00001.array_record", "codes.json"):
        kinds[f"codes/{name}"] = (folder, name, _codes, name != "codes.json")

    extractor = features.load("embedded")
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    np.savez(made / "images.npz", images)
    np.savez(made / "statistics.npz", mu=np.zeros(96), sigma=np.eye(96))
    for name in ("images.npz", "statistics.npz"):
        kinds[name] = (made / name, "", functools.partial(_reference, extractor), True)

    # A workdir, with its checkpoints.
    run = config.load(str(verbs.TESTS / "train_config.py"))
    run = dataclasses.replace(run, steps=5)
    workdir = made / "workdir"
    loop.train(run, workdir)
    mesh = sharding.make_mesh(run.mesh)
    abstract = loop.abstract_state(run.open_task(), mesh)
    kinds["checkpoint"] = (
        workdir / "checkpoints",
        "*",
        functools.partial(_checkpoint, abstract),
        True,
    )
    # A value that differs from that of the command is named, or ends the command.
    kinds["run/config.json"] = (
        workdir,
        "config.json",
        functools.partial(loop._check_workdir, run=run),
        False,
    )

    rows = [json.dumps({"step": n, "total": 1 / (n + 1)}) for n in range(50)]
    (made / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    kinds["metrics.jsonl"] = (made / "metrics.jsonl", "", _metrics, False)
    return kinds


def _picture(path: pathlib.Path) -> bytes:
    return crops.center_crop(crops.load(path), 32).tobytes()


def _bundle(path: pathlib.Path) -> tuple:
    found = bundles.load(path, "tokenizer", TokenizerConfig)
    return found.config, found.fingerprint  # provenance is free text


def _weights(bundle: pathlib.Path, path: pathlib.Path) -> str:
    config = bundles.load_config(bundle, "tokenizer", TokenizerConfig)
    weights = convert.from_torch("tokenizer", torch_files.read(path), config)
    return bundles.fingerprint(weights)


def _codes(path: pathlib.Path) -> str:
    source = codes.CodesSource(path, "train")
    digest = hashlib.sha256()
    for index in range(len(source)):
        example = source[index]
        digest.update(example["codes"].tobytes() + f"{example['label']} {example['key']}".encode())
    return digest.hexdigest()


def _reference(extractor, path: pathlib.Path) -> bytes:
    found = fid.load_reference(path, None, extractor, count=20, batch_size=20, image_size=32)
    return found.gaussians["pool"].mean.tobytes() + found.gaussians["pool"].covariance.tobytes()


def _checkpoint(abstract, path: pathlib.Path) -> tuple:
    checkpoints = Checkpoints(path, read_only=True)
    try:
        found = checkpoints.restore(abstract)
    finally:
        checkpoints.close()
    if found is None:
        raise UserError("no checkpoint")
    return found.step, found.progress, jax.tree.map(lambda x: np.asarray(x).tobytes(), found.state)


def _metrics(path: pathlib.Path) -> str:
    return json.dumps(read_metrics(path))
