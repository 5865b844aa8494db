"""gigatok sample --generator=DIR --tokenizer=DIR --classes=0,1,207 --out=DIR

Draws images by class. OUT gets grid.png (a class a row), images/ (one PNG each) and samples.npz
(`arr_0`, uint8 [n, H, W, 3], and `arr_1`, the classes: the layout of ADM's evaluator). A start
after a kill goes on; image n is the same whatever was drawn before it.
"""

from collections.abc import Sequence
import dataclasses
import pathlib
import zipfile

from absl import flags
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from gigatok_jax import api, bundles, distributed, pictures
from gigatok_jax.commands import sampling_flags
from gigatok_jax.errors import UserError
from gigatok_jax.files import replacing
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.sampling import SamplingConfig

FLAGS = flags.FlagValues()
flags.DEFINE_string("generator", None, "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", None, "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the images", flag_values=FLAGS)
flags.DEFINE_list(
    "classes", ["all"], "numbers or ranges such as 0,7,10-19; all: each of them", flag_values=FLAGS
)
flags.DEFINE_integer(
    "count", 0, "images, the classes in turn; 0: 8 a class", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_boolean(
    "random_classes", False, "classes drawn uniformly, not in turn", flag_values=FLAGS
)
flags.DEFINE_integer("batch_size", 32, "images at once", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of codes and classes", lower_bound=0, flag_values=FLAGS)
sampling_flags.define(FLAGS)
flags.mark_flags_as_required(["generator", "tokenizer", "out"], flag_values=FLAGS)

ROWS, COLUMNS = 12, 8  # of the grid, at most: classes, and samples of each
LABEL = 24  # letters of a class's name that the grid has room for


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    settings = sampling_flags.settings(FLAGS)
    generator = api.load_generator(FLAGS.generator)
    classes = _classes(FLAGS.classes, generator.config.classes)
    count = FLAGS.count or COLUMNS * len(classes)
    if FLAGS.random_classes:
        order = np.random.default_rng(FLAGS.seed).choice(classes, count)
    else:
        order = np.resize(classes, count)
    sample(
        generator,
        load_matching_tokenizer(FLAGS.tokenizer, generator),
        order,
        settings,
        pathlib.Path(FLAGS.out),
        seed=FLAGS.seed,
        batch_size=FLAGS.batch_size,
    )


def load_matching_tokenizer(
    directory: str | pathlib.Path, generator: api.PretrainedGenerator
) -> api.PretrainedTokenizer:
    """Loads the tokenizer whose codes a generator models.

    Raises:
      UserError: there is none, or it is another one.
    """
    bundle = bundles.load(directory, "tokenizer", TokenizerConfig)
    config = bundle.config
    ours = (generator.config.codes, generator.config.codebook_size)
    if ours != (config.latents, config.codebook_size):
        raise UserError(
            f"{directory}: a tokenizer of {config.latents} codes out of {config.codebook_size}, "
            f"but the generator draws {ours[0]} out of {ours[1]}"
        )
    if generator.made_by.get("tokenizer") not in (None, bundle.fingerprint):
        raise UserError(f"{directory}: not the tokenizer that the generator was trained on")
    return api.PretrainedTokenizer(config, bundle.weights)


def sample(
    generator: api.PretrainedGenerator,
    tokenizer: api.PretrainedTokenizer,
    classes: np.ndarray,
    settings: SamplingConfig,
    out: pathlib.Path,
    *,
    class_names: Sequence[str] = (),
    seed: int,
    batch_size: int,
) -> None:
    """Writes the files that the module's docstring names; memory does not grow with their number.

    Args:
      generator, tokenizer: belong together.
      classes: `[n]`, of each image.
      settings: how to draw.
      out: folder; images that it has of the same settings are kept.
      class_names: by class, for the grid; none: it has numbers alone.
      seed: image n's key is folded from it.
      batch_size: images at once.
    """
    record = {
        "sampling": dataclasses.asdict(settings),
        "seed": seed,
        "generator": generator.fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }
    paths = [out / "images" / f"{i:06d}_class{c:04d}.png" for i, c in enumerate(classes)]
    if distributed.is_main() and not (out / "images").exists():
        (out / "sampling.json").unlink(missing_ok=True)
    there = sum(path.exists() for path in paths)
    distributed.barrier("what was there before")
    distributed.claim(out / "sampling.json", record, "images")  # their classes are in their names
    process, processes = distributed.place()
    mine = np.array_split(range(len(paths)), processes)[process]
    missing = np.array([i for i in mine if not paths[i].exists()], int)
    place = {"seed": seed, "batch_size": batch_size}
    with tqdm(total=len(missing), unit="image", disable=None) as bar:
        for numbers, images in api.draw(generator, tokenizer, classes, missing, settings, **place):
            for number, image in zip(numbers, images, strict=True):
                pictures.save_png(paths[number], image)
            bar.update(len(numbers))
    distributed.barrier("images", working=True)
    if not distributed.is_main():
        return
    _write_npz(out / "samples.npz", paths, classes)
    _write_grid(out / "grid.png", paths, classes, class_names)
    print(f"{len(paths)} images ({there} were there)")
    print(out)


def _classes(items: list[str], count: int) -> np.ndarray:
    """Class numbers of "all", or of numbers and ranges."""
    if items == ["all"]:
        return np.arange(count)
    classes = []
    for item in items:
        first, dash, last = item.partition("-")
        last = last if dash else first
        digits = first.isdecimal() and last.isdecimal()
        if not digits or int(last) < int(first):
            raise UserError(f"--classes: expected numbers and ranges such as 0,10-19, got {item!r}")
        classes += range(int(first), int(last) + 1)
    bad = [c for c in classes if c >= count]
    if bad or not classes:
        raise UserError(f"--classes: expected numbers in 0..{count - 1}, got {bad or items}")
    return np.array(classes)


def _write_npz(path: pathlib.Path, paths: list[pathlib.Path], classes: np.ndarray) -> None:
    """ADM's layout, streamed: one image in memory at a time."""
    first = np.asarray(Image.open(paths[0]))
    with replacing(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as array:
            shape = (len(paths), *first.shape)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            for image in paths:
                array.write(np.asarray(Image.open(image)).tobytes())
        with file.open("arr_1.npy", "w") as array:
            np.lib.format.write_array(array, np.asarray(classes, np.int64))


def _write_grid(
    path: pathlib.Path,
    paths: list[pathlib.Path],
    classes: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """A class a row, named before it; classes are evenly spaced where there are many."""
    known = np.unique(classes)
    shown = known[np.arange(min(ROWS, len(known))) * len(known) // min(ROWS, len(known))]
    columns = min(COLUMNS, *(np.sum(classes == c) for c in shown))
    rows = []
    for c in shown:
        chosen = np.flatnonzero(classes == c)[:columns]
        rows.append(np.stack([np.asarray(Image.open(paths[i])) for i in chosen]))
    grid = pictures.grid(rows)
    labels = [_label(c, class_names) for c in shown]
    font = ImageFont.load_default(14)
    margin = max(40, *(int(font.getlength(label)) + 12 for label in labels))
    labelled = Image.new("RGB", (grid.shape[1] + margin, grid.shape[0]), "white")
    labelled.paste(Image.fromarray(grid), (margin, 0))
    draw, height = ImageDraw.Draw(labelled), grid.shape[0] / len(rows)
    for row, label in enumerate(labels):
        draw.text((6, (row + 0.5) * height), label, fill="black", anchor="lm", font=font)
    pictures.save_png(path, np.asarray(labelled))


def _label(number: int, class_names: Sequence[str]) -> str:
    """A class's number and, where it has another name, that."""
    name = class_names[number] if number < len(class_names) else str(number)
    return str(number) if name == str(number) else f"{number}: {name[:LABEL]}"
