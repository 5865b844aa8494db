"""Synthetic checkpoints and images, made from names alone, for parity with the reference.

`tests/data/parity` holds what the reference computed (float32, CPU) for them, and
`tests/data/baselines` what other tokenizers' programs did.
"""

import json
import pathlib
import zlib

import numpy as np

PARITY = pathlib.Path(__file__).parent / "data" / "parity"


def _generator(text: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(text.encode()))


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor that belongs to parameter `name`, scaled as a trained one might be."""
    x = _generator(f"0:{name}").standard_normal(shape, dtype=np.float32)
    leaf = name.split(".")[-1]
    if leaf in ("codebook_used", "num_batches_tracked"):
        return np.zeros(shape, np.float32)
    if leaf == "running_mean":
        return 0.1 * x
    if leaf == "running_var":
        return 1.0 + 0.1 * np.abs(x)
    if len(shape) > 1:
        # A position table [N, 1, W] is scaled by its width.
        fan_in = shape[2] if len(shape) == 3 and shape[1] == 1 else int(np.prod(shape[1:]))
        return x / np.float32(np.sqrt(fan_in))
    return 1.0 + 0.1 * x if leaf == "weight" else 0.02 * x


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of checkpoint `name`, in PyTorch's layout."""
    path = PARITY / "manifests" / f"{name}.json"
    return {key: tuple(shape) for key, shape in json.loads(path.read_text()).items()}


def checkpoint(name: str) -> dict[str, np.ndarray]:
    return {key: tensor(key, shape) for key, shape in manifest(name).items()}


def images(count: int, *, salt: str = "0", size: int = 256) -> np.ndarray:
    """Smooth images `[count, size, size, 3]` float32 in [-1, 1]: sums of six waves a channel."""
    rng = _generator(f"{salt}:images")
    rows, columns = np.mgrid[0:size, 0:size].astype(np.float32) / size
    out = np.zeros((count, size, size, 3), np.float32)
    for image in out:
        for channel in range(3):
            for _ in range(6):
                fx, fy = rng.uniform(0.5, 12), rng.uniform(0.5, 12)
                phase, amplitude = rng.uniform(0, 6.28), rng.uniform(0.2, 1)
                angle = 2 * np.pi * (fx * columns + fy * rows) + phase
                image[..., channel] += amplitude * np.sin(angle, dtype=np.float32)
    return np.clip(out / 2.5, -1, 1)


def expected(name: str):
    """The reference's numbers: a mapping of arrays, or the JSON file's content."""
    if name.endswith(".json"):
        return json.loads((PARITY / name).read_text())
    return np.load(PARITY / name)
