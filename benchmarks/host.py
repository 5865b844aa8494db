"""Benchmarks of the host: input pipeline, checkpoints, start-up until the first step."""

from collections.abc import Callable
import functools
import io
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import typing

import numpy as np
from PIL import Image

from benchmarks.cases import Case, tree_bytes
from gigatok_jax import recipes, sharding
from gigatok_jax.data import crops
from gigatok_jax.errors import UserError
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training import loop
from gigatok_jax.training.checkpoints import Checkpoints
from gigatok_jax.training.generator import GeneratorRun, GeneratorTask

SIZE = 256
START_TIMEOUT = 1_800  # seconds

photos: pathlib.Path | None = None  # folder of JPEGs; None: synthetic ones


def augmentation(model: str, batch: int) -> Case:
    """Training crops of JPEGs in float32 on one core, compared with plain Pillow."""
    if model not in typing.get_args(crops.Resize):
        raise UserError(f"input:{model}: expected input:bicubic or input:linear")
    files = _photos() if photos is None else _read(photos)
    files = list(itertools.islice(itertools.cycle(files), batch))

    def ours():
        for number, data in enumerate(files):
            rng = np.random.default_rng(number)
            _float(crops.random_crop(crops.load(data), SIZE, rng, model))

    def plain():
        for number, data in enumerate(files):
            _plain(data, np.random.default_rng(number))

    # Decoding alone is the limit.
    start = time.perf_counter()
    for data in files:
        Image.open(io.BytesIO(data)).load()
    decoding = time.perf_counter() - start
    return Case(ours, len(files), limit=decoding, limited_by="decode", rival=plain)


def _float(crop: np.ndarray) -> np.ndarray:
    values = np.empty(crop.shape, np.float32)
    np.multiply(crop, np.float32(1 / 127.5), out=values)
    values -= 1
    return values


def _plain(data: bytes, rng: np.random.Generator) -> np.ndarray:
    """ADM's augmentation, as in most programs that use it."""
    image = Image.open(io.BytesIO(data))
    image.load()
    image = image.convert("RGB")
    side = int(rng.integers(SIZE, SIZE * 5 // 4 + 1))
    while min(image.size) >= 2 * side:
        image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), Image.Resampling.BICUBIC)
    array = np.array(image)
    y, x = (int(rng.integers(extent - SIZE + 1)) for extent in array.shape[:2])
    array = array[y : y + SIZE, x : x + SIZE]
    if rng.random() < 0.5:
        array = array[:, ::-1]
    return array.astype(np.float32) / 127.5 - 1


def _read(folder: pathlib.Path) -> list[bytes]:
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not folder.is_dir():
        raise UserError(f"--photos: {folder}: no such folder")
    if not paths:
        raise UserError(f"--photos: {folder} has no JPEGs")
    return [path.read_bytes() for path in paths]


def _photos() -> list[bytes]:
    """JPEGs of ImageNet's typical size, with amplitudes that fall as 1/f as in photos."""
    rng, files = np.random.default_rng(0), []
    height, width = 375, 500
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = 1
    for _ in range(64):
        noise = rng.standard_normal((3, height, width))
        planes = np.fft.irfft2(np.fft.rfft2(noise) / f, s=(height, width))
        light, *colors = (plane / plane.std() for plane in planes)
        mix = np.stack([light + 0.3 * c for c in (*colors, -sum(colors))], -1)
        pixels = np.clip(128 + 55 * mix, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    return files


def _state(model: str):
    training = GeneratorTask(GeneratorRun(model=recipes.generator_model(model)))
    abstract = loop.abstract_state(training, sharding.make_mesh(MeshConfig()))
    return abstract, loop.fresh_state(training, abstract, 0)


def _checkpoints() -> tuple[Checkpoints, Callable[[], None]]:
    """Checkpoints in a temporary folder, and a function that removes them."""
    folder = tempfile.TemporaryDirectory()
    checkpoints = Checkpoints(pathlib.Path(folder.name))

    def close():
        checkpoints.close()
        folder.cleanup()

    return checkpoints, close


def save(model: str, batch: int) -> Case:
    """Time that saving a generator's state delays a step; files are written afterwards."""
    del batch
    checkpoints, close = _checkpoints()
    steps = itertools.count(1)
    _, state = _state(model)

    def seconds():
        start = time.perf_counter()
        checkpoints.save(next(steps), state, {})
        taken = time.perf_counter() - start
        checkpoints.wait()
        return taken

    seconds()  # the first call creates folders and threads
    return Case(None, 0, seconds=seconds, close=close)


def restore(model: str, batch: int) -> Case:
    """Restoring a generator's state, from the file system's cache."""
    del batch
    checkpoints, close = _checkpoints()
    abstract, state = _state(model)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    return Case(
        lambda: checkpoints.restore(abstract).state, 0, bytes=tree_bytes(state), close=close
    )


def start_up(model: str, batch: int, *, cold: bool) -> Case:
    """Time from starting `gigatok train` to the first logged step, without a teacher."""
    folder = tempfile.TemporaryDirectory()
    root = pathlib.Path(folder.name)
    fields = [
        "data.source=embedded",
        "data.length=64",
        "data.eval_length=2",
        f"batch_size={batch}",
        "steps=2",
        "evaluation_images=1",
    ]
    fields += [f"objective.{name}=0" for name in ("perceptual", "semantic", "adversarial")]
    fields += ["loop.log_every=1", "optimizer.warmup_steps=0", "data.workers=0"]
    command = [sys.executable, "-m", "gigatok_jax", "train"]
    command += [f"--config={pathlib.Path(__file__).parent.parent}/configs/tokenizer.py:{model}"]
    command += [f"--config.{field}" for field in fields]

    def seconds():
        if cold:
            shutil.rmtree(root / "cache", ignore_errors=True)
        workdir = pathlib.Path(tempfile.mkdtemp(dir=root))
        environment = os.environ | {"GIGATOK_CACHE": str(root / "cache")}
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}"], env=environment, stderr=subprocess.DEVNULL
        )
        log = workdir / "metrics.jsonl"
        while not (log.exists() and log.read_text()):
            if process.poll() or time.perf_counter() - start > START_TIMEOUT:
                raise RuntimeError(f"{' '.join(command)} logged no step")
            time.sleep(0.02)
        taken = time.perf_counter() - start
        process.wait()
        return taken

    if not cold:
        seconds()
    return Case(None, 0, seconds=seconds, close=folder.cleanup, repeats=2)


cold, warm = (functools.partial(start_up, cold=value) for value in (True, False))
