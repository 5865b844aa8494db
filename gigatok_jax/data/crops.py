"""Decoding image files to RGB, and the crops of ADM (guided-diffusion)."""

import functools
import io
import math
import os
from typing import Literal
import warnings

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError, features

from gigatok_jax.errors import UserError
from gigatok_jax.files import Path, as_path

Resize = Literal["bicubic", "linear"]
CenterResize = Literal["adm", "bicubic", "linear"]
BOX, BICUBIC = Image.Resampling.BOX, Image.Resampling.BICUBIC


warnings.filterwarnings("ignore", "Corrupt EXIF data")  # the picture itself is read
# Pillow's limit of 1 MB, against compressed text that exhausts the memory, also drops valid photos.
PngImagePlugin.MAX_TEXT_CHUNK = 32 * 2**20
PILLOW = tuple(map(int, Image.__version__.split(".")[:2]))
ELONGATED = 8  # ratio of sides from which only the crop is resized


@functools.cache
def optional_formats() -> set[str]:
    """Suffixes of formats that Pillow reads here, but not everywhere."""
    formats = {"avif", "avifs"} if features.check("avif") else set()
    try:
        import pillow_heif
    except ImportError:
        return formats
    pillow_heif.register_heif_opener()
    return formats | {"heic", "heics", "heif", "heifs", "hif"}


class BadImage(ValueError):
    """An unreadable image; the message says why."""


def load(data: bytes | str | Path) -> Image.Image:
    """Decodes an image file, given as its path or content, to RGB.

    Opaque 8-bit images of any mode, including CMYK JPEGs, are converted by Pillow's
    `convert("RGB")`. Transparent pixels become white (the reference shows the arbitrary color
    stored under them), and 16-bit gray keeps its upper 8 bits. EXIF orientation is ignored, as in
    the reference.

    Raises:
      BadImage: the file is missing, truncated or not an image, or the range of its pixel values
          is undefined.
    """
    try:
        content = data if isinstance(data, bytes) else as_path(data, "image").read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            return _rgb(image)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage("not an image, or in a format unknown to Pillow") from error
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else str(error)
        raise BadImage(reason or type(error).__name__) from error


def is_turned(image: Image.Image | np.ndarray) -> bool:
    """Whether an image has an EXIF orientation other than upright, which `load` ignores."""
    if isinstance(image, np.ndarray) or "exif" not in image.info:
        return False
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # damaged EXIF data
        return False


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("gray values exceed 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise BadImage("floating-point gray values, whose range is undefined")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _halve(image: Image.Image, short_side: int) -> tuple[Image.Image, tuple[int, int]]:
    """Halves an image while possible; also returns the final size, with the given short side.

    Rounding follows ADM: halving rounds down, and the final size rounds half to even.
    """
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), BOX)
    scale = short_side / min(image.size)
    return image, (round(image.width * scale), round(image.height * scale))


def _pillow(image: Image.Image | np.ndarray) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def _rows_first(width: int, height: int, new_width: int, new_height: int) -> bool:
    """Whether `resize` of the installed Pillow, which rounds in between, does rows first."""
    if PILLOW < (12, 2):
        return False
    if PILLOW < (13, 0):
        return height > 100 * width and height > new_height
    return height - new_height > max(0, 2 * (width - new_width))


def _weights(length: int, new_length: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pillow's bicubic weights for outputs [start, start + count) of an axis.

    Returns:
      The indices of the pixels of each output, and their weights times 2^22, int [count, taps].
    """
    scale = length / new_length
    stretch = max(scale, 1.0)
    centers = (np.arange(start, start + count)[:, None] + 0.5) * scale
    low = np.maximum(centers - 2 * stretch + 0.5, 0).astype(int)
    high = np.minimum(centers + 2 * stretch + 0.5, length).astype(int)
    pixels = low + np.arange((high - low).max())
    x = np.abs((pixels + 0.5 - centers) / stretch)
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * (pixels < high)
    weights = weights / weights.sum(1, keepdims=True) * 2**22
    rounded = np.trunc(weights + np.copysign(0.5, weights)).astype(np.int32)
    return np.minimum(pixels, length - 1), rounded


def _part_of_resize(
    image: np.ndarray, new_size: tuple[int, int], left: int, top: int, size: int
) -> np.ndarray:
    """A square of Pillow's bicubic `resize`, bit for bit, without computing the rest.

    Pillow's own `box` cannot do this: its edges are float32, and it may change the order of passes.
    """
    height, width = image.shape[:2]
    rows, row_weights = _weights(height, new_size[1], top, size)
    columns, column_weights = _weights(width, new_size[0], left, size)
    y, x = rows.min(), columns.min()
    image = image[y : rows.max() + 1, x : columns.max() + 1]  # all that the square depends on
    passes = [(rows - y, row_weights), (columns - x, column_weights)]
    for axis in (0, 1) if _rows_first(width, height, *new_size) else (1, 0):
        image = np.moveaxis(image, axis, 0)
        total = 2**21  # half of one
        for pixels, weights in zip(*(array.T for array in passes[axis]), strict=True):
            total = total + weights[:, None, None] * image[pixels]
        image = np.moveaxis(np.clip(total >> 22, 0, 255).astype(np.uint8), 0, axis)
    return image


def center_crop(
    image: Image.Image | np.ndarray, size: int, resize: CenterResize = "adm"
) -> np.ndarray:
    """The evaluation crop: resizes the short side to `size` and takes the center.

    Args:
      image: RGB, or uint8 [H, W, 3].
      size: side S in pixels.
      resize: "adm", as in ADM, GigaTok and LlamaGen: halved by boxes, then bicubic; "bicubic", as
        in TiTok: at once, with antialiasing; "linear", as in Open-MAGVIT2 and IBQ: OpenCV, without
        antialiasing.

    Returns:
      uint8 [S, S, 3].
    """
    image = _pillow(image)
    if resize == "adm":
        image, (width, height) = _halve(image, size)
    else:
        short = min(image.size)
        # TorchVision rounds the long side down, albumentations half to even.
        long = size * max(image.size) // short
        long = long if resize == "bicubic" else round(max(image.size) * (size / short))
        width, height = (size if side == short else long for side in image.size)
    middle = round if resize == "bicubic" else math.floor  # TorchVision's, and that of the others
    left, top = middle((width - size) / 2), middle((height - size) / 2)
    elongated = max(width, height) > ELONGATED * size  # as a whole, a line would take gigabytes
    if resize == "linear":
        if elongated:
            columns = [x * image.width / width for x in (left, left + size)]
            rows = [y * image.height / height for y in (top, top + size)]
            return _linear(np.asarray(image), size, columns, rows)
        whole = opencv().resize(np.asarray(image), (width, height))
        return whole[top : top + size, left : left + size]
    if elongated:
        return _part_of_resize(np.asarray(image), (width, height), left, top, size)
    image = image.resize((width, height), BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def ten_crops(image: Image.Image | np.ndarray, size: int, factor: float) -> np.ndarray:
    """Crops of the corners and the center of a larger center crop, and their mirror images.

    Args:
      image: RGB, or uint8 [H, W, 3].
      size: side S in pixels.
      factor: side of the larger crop, relative to S; the product is rounded down.

    Returns:
      uint8 [10, S, S, 3]: top left, top right, bottom left, bottom right, center, then flipped.
    """
    large = center_crop(image, int(size * factor))
    end = len(large) - size
    middle = round(end / 2)
    corners = ((0, 0), (0, end), (end, 0), (end, end), (middle, middle))
    crops = np.stack([large[y : y + size, x : x + size] for y, x in corners])
    return np.concatenate([crops, crops[:, :, ::-1]])


@functools.cache
def opencv():
    """Imports OpenCV, or raises UserError."""
    try:
        import cv2
    except ImportError as error:
        raise UserError(
            "config.data: resize=linear and eval_resize=linear need OpenCV: "
            "pip install -e '.[opencv]'"
        ) from error
    cv2.setNumThreads(1)  # many readers run in parallel already
    return cv2


def _linear(image: np.ndarray, size: int, columns: list[float], rows: list[float]) -> np.ndarray:
    """Resizes a box of an image, [low, high] in columns and rows, to a square."""
    cv2 = opencv()
    matrix = np.zeros((2, 3))
    for axis, (low, high) in enumerate((columns, rows)):
        step = (high - low) / size
        matrix[axis, axis] = step
        matrix[axis, 2] = low + (step - 1) / 2  # in OpenCV, 0 is the center of the first pixel
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def random_crop(
    image: Image.Image | np.ndarray,
    size: int,
    rng: np.random.Generator,
    resize: Resize = "bicubic",
) -> np.ndarray:
    """The training crop: short side uniform in [S, 5/4 S], random position, flip with p = 0.5.

    For speed, only the crop is resized, whereas ADM resizes the whole image. Bicubic results may
    differ from ADM's by Pillow's rounding between its horizontal and vertical pass.

    Args:
      image: RGB, or uint8 [H, W, 3].
      size: side S in pixels.
      rng: source of randomness.
      resize: "linear" uses OpenCV without antialiasing, in a fifth of the time.

    Returns:
      uint8 [S, S, 3].
    """
    short_side = int(rng.integers(size, size * 5 // 4, endpoint=True))
    image, (width, height) = _halve(_pillow(image), short_side)
    left, top = rng.integers(0, (width - size, height - size), endpoint=True).tolist()
    columns = [x * image.width / width for x in (left, left + size)]
    rows = [y * image.height / height for y in (top, top + size)]
    if resize == "linear":
        crop = _linear(np.asarray(image), size, columns, rows)
    else:
        box = (columns[0], rows[0], columns[1], rows[1])
        crop = np.asarray(image.resize((size, size), BICUBIC, box=box))
    return np.ascontiguousarray(crop[:, ::-1]) if rng.random() < 0.5 else crop
