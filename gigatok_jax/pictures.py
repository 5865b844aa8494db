"""Conversion of images between float and uint8, grids of images, and PNG files."""

from collections.abc import Sequence
import hashlib

from einops import rearrange, repeat
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from gigatok_jax.errors import UserError
from gigatok_jax.files import Path, replacing

VISIBLE = 96  # pixels; smaller images in a grid are enlarged to at most this height


def to_float(images: jax.Array) -> jax.Array:
    """Maps uint8 images to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: jax.Array) -> jax.Array:
    """Maps float images in [-1, 1] to uint8 as in the reference: clip(127.5 x + 128), truncated."""
    return jnp.clip(127.5 * images + 128, 0, 255).astype(jnp.uint8)


def finite_uint8(images: jax.Array, what: str) -> np.ndarray:
    """`to_uint8`, in host memory.

    Raises:
      UserError: a value is NaN or infinite; `what` names the images.
    """
    # The sum of a picture's values cannot overflow, and NaN and infinity survive it.
    if not np.isfinite(images.sum(dtype=np.float32)):
        raise UserError(f"{what}: expected finite values, got NaN or infinity")
    return np.asarray(to_uint8(images))


def save_png(path: Path, picture: np.ndarray) -> None:
    """Writes a uint8 picture `[H, W, 3]`."""
    with replacing(path) as aside:
        Image.fromarray(picture).save(aside, format="png")


def read(path: Path) -> np.ndarray:
    """Reads what `save_png` wrote."""
    with path.open("rb") as file:
        return np.asarray(Image.open(file))


def grid(rows: Sequence[np.ndarray], *, gap: int = 4) -> np.ndarray:
    """Arranges rows of images in one picture.

    Args:
      rows: uint8 arrays `[n, H, W, 3]` of equal shape; small images are enlarged.
      gap: white pixels between images.

    Returns:
      uint8 `[h, w, 3]`.
    """
    images = np.stack(rows)  # [R, n, H, W, 3]
    scale = max(1, VISIBLE // images.shape[2])
    images = repeat(images, "r n h w c -> r n (h i) (w j) c", i=scale, j=scale)
    images = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255)
    picture = rearrange(images, "r n h w c -> (r h) (n w) c")
    return np.pad(picture, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)


class PixelDigest:
    """A digest of a set of images, in any order, split over any number of processes.

    Attributes:
      total: sum of the images' own digests, which wraps around. The digest of several sets
        together is the sum of their totals.
    """

    def __init__(self, total: int | np.uint64 = 0):
        self.total = np.uint64(total)

    def add(self, images: np.ndarray) -> None:
        """Adds uint8 images `[n, H, W, 3]`."""
        for image in images:
            digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=8).digest()
            with np.errstate(over="ignore"):
                self.total += np.frombuffer(digest, np.uint64)[0]

    def text(self) -> str:
        """Sixteen hex digits."""
        return f"{int(self.total):016x}"
