"""Small folders of images for the tests of the data package."""

from pathlib import Path

import numpy as np
from PIL import Image


def save(path: Path, seed: int, size: tuple[int, int] = (40, 34)):
    """Writes an image of coloured blocks that no other seed gives, losslessly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)
    with path.open("wb") as file:
        image.save(file, "PNG")


def make(root: Path, counts: dict[str, int]) -> list[str]:
    """Class folders with so many images each; returns the keys, sorted."""
    keys = [f"{name}/{name}_{i:03d}.png" for name in sorted(counts) for i in range(counts[name])]
    for seed, key in enumerate(keys):
        save(root / key, seed)
    return keys


def spoil(path: Path):
    """Truncates an image."""
    path.write_bytes(path.read_bytes()[:200])
