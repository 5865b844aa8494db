"""What the pages of the app show, as arrays: nothing here knows of the browser.

Images are uint8 `[S, S, 3]`, codes int32 `[N]`.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import logging
import math
from typing import NamedTuple

import jax
import numpy as np

from gigatok_jax import api, imagenet, pictures
from gigatok_jax.data import crops
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import reconstruction
from gigatok_jax.files import Path, in_bucket, real_path, scan
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training.generator import check_tokenizer

logger = logging.getLogger(__name__)

DEFAULT = ("drawings", "drawings_gpt")  # included models
BRIGHTER = 4  # differences are shown so many times brighter
OTHERS = 8  # codes that are tried in place of one, to see which pixels depend on it
BATCH = 4  # images that are sampled at a time: after each, the page shows them
MAX_REPORTS, MAX_DEPTH = 200, 4  # reports that are listed, and folders on the way to one


class Models(NamedTuple):
    """The networks of the app, by the names that they were given on the command line."""

    tokenizers: dict[str, api.AnyTokenizer]
    generators: dict[str, tuple[api.PretrainedGenerator, str]]  # with its tokenizer's name


def load(tokenizers: Sequence[str], generators: Sequence[str]) -> Models:
    """Loads networks by name; without any, those of drawings that the package includes.

    A generator's tokenizer is one of `tokenizers`, or that which the generator names.

    Raises:
      UserError: a network cannot be loaded, or no tokenizer fits a generator.
    """
    if not tokenizers and not generators:
        tokenizers, generators = DEFAULT[:1], DEFAULT[1:]
    logger.info("loading %s", ", ".join([*tokenizers, *generators]))
    loaded = {name: api.load_tokenizer(name, where="--tokenizer") for name in tokenizers}
    pairs = {}
    for name in generators:
        generator = api.load_generator(name, where="--generator")
        own = generator.made_by.get("tokenizer")
        fitting = [key for key, each in loaded.items() if own in (each.codes_of, each.fingerprint)]
        if not fitting and (published := generator.made_by.get("published_tokenizer")):
            loaded[published] = loaded.get(published) or api.load_tokenizer(published)
            fitting = [published]
        if not fitting:
            raise UserError(f"--generator: {name}: expected its tokenizer as --tokenizer too")
        check_tokenizer(fitting[0], loaded[fitting[0]], generator.config, own)
        pairs[name] = generator, fitting[0]
    return Models(loaded, pairs)


def read(path: str, size: int) -> np.ndarray:
    """The center crop of an image file.

    Raises:
      crops.BadImage: it is not an image, or damaged.
    """
    return crops.center_crop(crops.load(path), size)


class Reconstruction(NamedTuple):
    """A reconstruction, how it differs from the image, and the metrics by name."""

    image: np.ndarray
    difference: np.ndarray  # absolute, `BRIGHTER` times
    metrics: dict[str, float]


def reconstruct(
    tokenizer: api.AnyTokenizer, image: np.ndarray, codes: np.ndarray
) -> Reconstruction:
    """Decodes the codes of an image, and compares the two."""
    floats = tokenizer.decode(codes[None])
    values = _metrics()(image[None], floats)
    output = pictures.finite_uint8(floats, "the reconstruction")[0]
    difference = np.minimum(BRIGHTER * np.abs(output.astype(int) - image), 255)
    metrics = {name: float(value[0]) for name, value in values.items()}
    return Reconstruction(output, difference.astype(np.uint8), metrics)


@functools.cache
def _metrics():
    return reconstruction.comparison(ssim_range=1)[0]


def decode(tokenizer: api.AnyTokenizer, codes: np.ndarray) -> np.ndarray:
    """The image of some codes."""
    return pictures.finite_uint8(tokenizer.decode(codes[None]), "the decoded image")[0]


class CodePicture:
    """Codes as colored squares that can be pointed at.

    Those of a 2D tokenizer lie as in the image; those of a 1D tokenizer follow each other in lines.

    Args:
      tokenizer: makes the codes.
      cell: side of a square in pixels; default: such that the picture is about 384 wide.
    """

    def __init__(self, tokenizer: api.AnyTokenizer, cell: int | None = None):
        self.codes = tokenizer.config.latents
        side = math.isqrt(self.codes)
        self.columns = side if is_2d(tokenizer) else min(self.codes, 32)
        self.rows = math.ceil(self.codes / self.columns)
        self.cell = cell or max(8, 384 // self.columns)

    def draw(self, codes: np.ndarray, marked: int | None = None) -> np.ndarray:
        """uint8 `[h, w, 3]`; equal codes have equal colors, and a black frame marks one."""
        colors = np.full((self.rows * self.columns, 3), 255, np.uint8)
        colors[: self.codes] = _colors(codes)
        colors = colors.reshape(self.rows, self.columns, 3)
        picture = colors.repeat(self.cell, 0).repeat(self.cell, 1)
        picture[:: self.cell] = picture[:, :: self.cell] = 255
        if marked is not None:
            row, column = (self.cell * i for i in divmod(marked, self.columns))
            frame = picture[row : row + self.cell + 1, column : column + self.cell + 1]
            frame[:3] = frame[-3:] = frame[:, :3] = frame[:, -3:] = 0
        return picture

    def at(self, x: int, y: int) -> int | None:
        """The position of the code at a pixel; None beside the codes."""
        row, column = y // self.cell, x // self.cell
        position = row * self.columns + column
        inside = 0 <= column < self.columns and 0 <= position < self.codes
        return position if inside else None


def is_2d(tokenizer: api.AnyTokenizer) -> bool:
    """Whether each code belongs to a place of the image; of the user's own, nobody knows."""
    if isinstance(tokenizer, api.OwnTokenizer) or tokenizer.family == "titok":
        return False
    return getattr(tokenizer.config, "layout", "2d") == "2d"


def _colors(codes: np.ndarray) -> np.ndarray:
    """A color for each code, uint8 `[N, 3]`: bits of a product that scatters neighbors."""
    scattered = (np.asarray(codes, np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
    channels = (scattered[:, None] >> np.array([40, 48, 56], np.uint64)) & np.uint64(0xFF)
    return (64 + channels * 3 // 4).astype(np.uint8)  # never so dark as a frame


class Effect(NamedTuple):
    """What one code does to an image."""

    picture: np.ndarray  # the image, dark where nothing changes
    change: float  # mean absolute change of a value, of 255
    area: float  # smallest share of the pixels with 90 % of the change


def effect(tokenizer: api.AnyTokenizer, codes: np.ndarray, position: int) -> Effect:
    """Which pixels change when other codes, chosen at random, take the place of one."""
    rng = np.random.default_rng(position)
    # All but the code itself; the same for each call.
    others = rng.integers(tokenizer.config.codebook_size - 1, size=OTHERS)
    changed = np.tile(codes, (1 + OTHERS, 1))
    changed[1:, position] = others + (others >= codes[position])
    images = pictures.finite_uint8(tokenizer.decode(changed), "the decoded images").astype(int)
    moved = np.abs(images[1:] - images[0]).mean(axis=(0, 3))  # [S, S]
    ordered = np.sort(moved, axis=None)[::-1]
    total = ordered.sum()
    needed = 1 + np.searchsorted(np.cumsum(ordered), 0.9 * total) if total else 0
    strength = (moved / max(moved.max(), 1e-6))[..., None]
    orange = np.array([255, 120, 0])
    shown = 0.4 * images[0] * (1 - strength) + strength * (0.5 * images[0] + 0.5 * orange)
    return Effect(shown.astype(np.uint8), float(moved.mean()), float(needed / moved.size))


def swap(codes: np.ndarray, others: np.ndarray, first: int, last: int) -> np.ndarray:
    """`codes`, with those of `others` from position `first` to `last`, which is included.

    Raises:
      UserError: the positions are not in this order.
    """
    if first > last:
        raise UserError(f"the first code, {first}, comes after the last, {last}")
    swapped = codes.copy()
    swapped[first : last + 1] = others[first : last + 1]
    return swapped


def keep_first(
    tokenizer: api.AnyTokenizer,
    codes: np.ndarray,
    keep: int,
    generator: api.PretrainedGenerator | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The image of the first `keep` codes.

    The others are the mean of the codebook, or a generator draws them, without a class.

    Raises:
      UserError: the tokenizer is the user's own, whose codebook is not known.
    """
    if generator is None:
        if isinstance(tokenizer, api.OwnTokenizer):
            raise UserError("a tokenizer of your own decodes whole images only: use a generator")
        floats = tokenizer.decode_first(codes[None], keep)
        return pictures.finite_uint8(floats, "the decoded image")[0]
    null = np.array([generator.config.null_class])
    drawn = generator.sample(null, jax.random.key(seed), prefix=codes[None], keep=keep)
    return decode(tokenizer, np.asarray(drawn)[0])


def sample(
    generator: api.PretrainedGenerator,
    tokenizer: api.AnyTokenizer,
    label: int,
    settings: SamplingConfig,
    *,
    count: int,
    seed: int,
    codes: np.ndarray | None = None,
    keep: int = 0,
) -> Iterator[list[np.ndarray]]:
    """Samples images of a class, or completes one; yields those so far, as they come.

    Args:
      generator, tokenizer: must match.
      label: the class, or `generator.config.null_class`.
      settings: how codes are sampled.
      count: number of images.
      seed: determines the images; each is the same, however many there are.
      codes: of the image to complete, of which the first `keep` are taken; None: all are drawn.
    """
    keys, images = jax.random.split(jax.random.key(seed), 1_000)[:count], []
    batch = min(BATCH, count)
    for start in range(0, count, batch):
        # The last batch is filled up, so that nothing compiles again.
        chosen = np.minimum(np.arange(start, start + batch), count - 1)
        given = {} if codes is None else {"prefix": np.tile(codes, (batch, 1)), "keep": keep}
        drawn = generator.sample(
            np.full(batch, label), keys[chosen], **given, **dataclasses.asdict(settings)
        )
        decoded = pictures.finite_uint8(tokenizer.decode(drawn), "the decoded samples")
        images += list(decoded[: count - start])
        yield images


def published_settings(generator: api.PretrainedGenerator) -> SamplingConfig:
    """The settings that a generator was published with, or the defaults."""
    return SamplingConfig(**generator.made_by.get("sampling", {}))


def class_names(generator: api.PretrainedGenerator) -> dict[str, int]:
    """The trained classes, by a name that no two share."""
    words = imagenet.words(generator.class_names)
    names = {}
    for number in map(int, generator.trained):
        name = words[number] if words else f"class {number}"
        names[f"{name} ({number})" if words.count(name) > 1 else name] = number
    return names


def find_reports(folder: Path) -> list[str]:
    """Reports below a folder, newest first, as paths relative to it.

    Links to folders or to files outside, and what is hidden, are passed over.
    """
    found, folders = [], [(folder, 0)]
    root = real_path(folder)
    while folders and len(found) < MAX_REPORTS:
        current, depth = folders.pop(0)
        for name, is_folder in sorted(scan(current)):
            path = current / name
            if name.startswith("."):
                continue
            if is_folder:
                if depth < MAX_DEPTH and (in_bucket(path) or not path.is_symlink()):
                    folders.append((path, depth + 1))
            elif name.endswith(".html") and "report" in name:
                found += [path] if real_path(path).is_relative_to(root) else []
    found.sort(key=_changed, reverse=True)
    return [path.relative_to(folder).as_posix() for path in found]


def _changed(path: Path) -> float:
    """When a file was last written to."""
    return path.stat().mtime if in_bucket(path) else path.stat().st_mtime


def read_report(folder: Path, name: str) -> str:
    """The HTML of a report that `find_reports` has found.

    Raises:
      UserError: it is not, or no longer, one of them.
    """
    if name not in find_reports(folder):
        raise UserError(f"{name}: no report of the folder that was named")
    return (folder / name).read_text()
