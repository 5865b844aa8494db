"""ADM's `.npz` files: statistics of images, or the images themselves, or both."""

from collections.abc import Iterator, Mapping
import contextlib
import hashlib
import math
import pathlib
import zipfile
import zlib

import numpy as np

from gigatok_jax.errors import UserError
from gigatok_jax.evaluation.distribution import Gaussian
from gigatok_jax.files import write_npz

SUFFIXES = {"pool": "", "spatial": "_s"}
ROUNDING = 1e-4  # of a covariance's largest entry, as float32 statistics may be off


def write_statistics(
    path: pathlib.Path, gaussians: Mapping[str, Gaussian], others: Mapping[str, np.ndarray]
) -> None:
    """`mu`, `sigma` of "pool", `mu_s`, `sigma_s` of "spatial"; and other arrays."""
    arrays = dict(others)
    for name, gaussian in gaussians.items():
        arrays[f"mu{SUFFIXES[name]}"] = gaussian.mean
        arrays[f"sigma{SUFFIXES[name]}"] = gaussian.covariance
    write_npz(path, arrays)


class Archive:
    """An `.npz` of ADM's, read a part at a time.

    Attributes:
      name: of the file, and sixteen hex digits of its content.
      image_shape: `(n, H, W, 3)`; n is 0 where it has no images.
      images: n.

    Raises (its methods too):
      UserError: it cannot be read, holds neither statistics nor images, or not such ones.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        with self._reading(), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            with zipfile.ZipFile(path) as archive:
                self._members = {
                    name.removesuffix(".npy")
                    for name in archive.namelist()
                    if name.endswith(".npy")
                }
        self.name = f"{path.name} {digest[:16]}"
        if "arr_0" not in self._members and not {"mu", "sigma"} <= self._members:
            raise UserError(
                f"{path}: expected images as arr_0, or statistics as mu and sigma, found "
                f"{', '.join(sorted(self._members)) or 'nothing'}"
            )
        self.image_shape = self._image_shape() if "arr_0" in self._members else (0, 0, 0, 3)
        self.images = self.image_shape[0]

    def gaussians(self) -> dict[str, Gaussian]:
        """Those stored: "pool" and "spatial", or less."""
        found = {}
        for name, suffix in SUFFIXES.items():
            if not {f"mu{suffix}", f"sigma{suffix}"} <= self._members:
                continue
            with self._reading(), np.load(self._path) as file:
                mean, covariance = (file[f"{part}{suffix}"] for part in ("mu", "sigma"))
            if not {mean.dtype.kind, covariance.dtype.kind} <= set("fiu"):
                raise UserError(f"{self._path}: mu{suffix} or sigma{suffix} is not of real numbers")
            mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
            if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
                raise UserError(
                    f"{self._path}: expected mu{suffix} [D] and sigma{suffix} [D, D], got "
                    f"{list(mean.shape)} and {list(covariance.shape)}"
                )
            if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
                raise UserError(f"{self._path}: mu{suffix} or sigma{suffix} is not finite")
            scale = np.abs(covariance).max(initial=0)
            asymmetric = np.abs(covariance - covariance.T).max(initial=0) > ROUNDING * scale
            if asymmetric or np.linalg.eigvalsh(covariance).min() < -ROUNDING * scale:
                raise UserError(
                    f"{self._path}: expected sigma{suffix} to be a covariance, symmetric and "
                    "without negative eigenvalues"
                )
            found[name] = Gaussian(mean, covariance)
        return found

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Images, uint8 `[b, H, W, 3]`; no more than a batch is held at once."""
        count, *shape = self.image_shape
        with self._reading(), self._open_images() as file:
            _header(file)
            for start in range(0, count, batch_size):
                chosen = [min(batch_size, count - start), *shape]
                content = file.read(math.prod(chosen))
                if len(content) < math.prod(chosen):
                    raise EOFError("arr_0 ends too early")
                yield np.frombuffer(content, np.uint8).reshape(chosen)

    def _image_shape(self) -> tuple[int, ...]:
        with self._reading(), self._open_images() as file:
            shape, fortran_order, dtype = _header(file)
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape or fortran_order:
            raise UserError(
                f"{self._path}: expected arr_0 to be uint8 [n, H, W, 3], got {dtype} {list(shape)}"
            )
        return shape

    def _open_images(self):
        # Closing the member closes the file, which nothing else holds.
        return zipfile.ZipFile(self._path).open("arr_0.npy")

    @contextlib.contextmanager
    def _reading(self):
        """Turns what reading a damaged file raises into one line."""
        try:
            yield
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"{self._path}: not an .npz file, or a damaged one ({error})"
            ) from error


def _header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and type of an `.npy` file."""
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise ValueError(f"arr_0 is of .npy format {version}")
    return read[version](file)
