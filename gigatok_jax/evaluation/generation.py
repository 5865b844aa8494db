"""Sampling images from a generator, and evaluating them (paper, appendix B).

Image n of a sequence depends only on its class, the seed and n, not on the other images. Each file
is written as soon as its images are sampled, and a restart samples only what is missing. Several
processes share the work.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import logging
import math
import re
from typing import Any
import zipfile

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from gigatok_jax import distributed, imagenet, pictures, sharding
from gigatok_jax.api import AnyTokenizer, PretrainedGenerator, load_tokenizer
from gigatok_jax.data import codes, pipeline
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import fid, protocol
from gigatok_jax.evaluation.features import Extractor
from gigatok_jax.evaluation.fid import FeatureSet, Reference
from gigatok_jax.files import (
    Path,
    damaged_member,
    local_copy,
    read_json,
    refuse_foreign,
    replacing,
    write_json,
    write_npz,
)
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training.generator import check_tokenizer, validation_loss
from gigatok_jax.training.task import held_out_means

logger = logging.getLogger(__name__)

COLUMNS = 8  # most images in a row of a grid
CLASSES = 12  # most rows of a grid of classes
SHOWN = 64  # images in the grid of an evaluation
NAME_LENGTH = 24  # letters of a class name that fit beside the grid
CHUNK = 512  # images whose features are stored in one file
GUIDANCE_STEP = 0.25
RECORD = "sampling.json"  # in a folder of pictures: that, and how, this program made them
PICTURE = re.compile(r"\d{6,}_class\d{4,}\.png")


def load_matching_tokenizer(name: str | Path, generator: PretrainedGenerator) -> AnyTokenizer:
    """Loads the tokenizer whose codes the generator models.

    Args:
      name: see `api.load_tokenizer`; "": that of a published generator.
      generator: the model of its codes.

    Raises:
      UserError: `name` is no tokenizer, or not the one that the generator was trained on; or it is
        missing, and the generator does not name its own.
    """
    name = name or generator.made_by.get("published_tokenizer")
    if not name:
        raise UserError(
            "--tokenizer: missing, expected that of the generator; only published ones name theirs"
        )
    tokenizer = load_tokenizer(name, where="--tokenizer")
    check_tokenizer(name, tokenizer, generator.config, generator.made_by.get("tokenizer"))
    return tokenizer


def sample(
    generator: PretrainedGenerator,
    tokenizer: AnyTokenizer,
    classes: np.ndarray,
    settings: SamplingConfig,
    out: Path,
    *,
    class_names: Sequence[str] = (),
    seed: int,
    batch_size: int,
) -> None:
    """Samples images into a folder; memory does not grow with their number.

    Args:
      generator, tokenizer: must match, see `load_matching_tokenizer`.
      classes: integers `[n]`, the class of each image.
      settings: how codes are sampled.
      out: gets `images/` (a PNG per image; those of an earlier call that are not in this
        one are removed), `grid.png` (a row per class) and `samples.npz` in the
        layout of ADM's evaluator: `arr_0`, uint8 `[n, H, W, 3]`, and `arr_1`, the classes.
      class_names: shown in the grid, by class number.
      seed: determines the images, together with `classes` and `settings`.
      batch_size: images per call of the networks; does not affect the images.

    Raises:
      UserError: `out` holds images made with other networks, settings or another seed, or not by
        this function.
    """
    folder = out / "images"
    distributed.in_main(lambda: _check_own(folder))
    # The classes are in the file names, so more images can be added later.
    identity = _identity(generator, tokenizer, settings, seed)
    distributed.claim(folder / RECORD, identity, "images")
    paths = [folder / f"{i:06d}_class{c:04d}.png" for i, c in enumerate(classes)]
    shape = (tokenizer.config.image_size,) * 2 + (3,)

    def whole(path):
        try:
            return pictures.read(path).shape == shape
        except Exception:  # Pillow's decoders raise almost anything on a broken file
            return False

    sampled = 0
    for path, images in _sample_missing(
        generator, tokenizer, classes, settings, paths, 1, whole, seed=seed, batch_size=batch_size
    ):
        pictures.save_png(path, images[0])
        sampled += 1
    distributed.barrier("images", working=True)
    if distributed.is_main():  # whoever measures the folder expects the images of this call alone
        for stale in set(_pictures(folder)) - set(paths):
            stale.unlink()
    sampled = int(distributed.sums({"sampled": sampled})["sampled"])
    if distributed.is_main():
        _write_npz(out / "samples.npz", paths, classes)
        _write_class_grid(out / "grid.png", paths, classes, class_names)
        print(f"{len(paths)} images ({len(paths) - sampled} already existed)")
        print(out)


def _pictures(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.png") if PICTURE.fullmatch(path.name)]


def _check_own(folder: Path) -> None:
    """Raises UserError if a folder has pictures that are not an earlier call's."""
    own = [RECORD, *(path.name for path in _pictures(folder))]
    own = own if (folder / RECORD).exists() else []
    refuse_foreign(folder, own, "the pictures of an earlier call of sample")


def _is_whole(file: Path) -> bool:
    return damaged_member(file) is None


def evaluate(
    generator: PretrainedGenerator,
    tokenizer: AnyTokenizer,
    extractor: Extractor,
    reference: Reference | None,
    settings: SamplingConfig,
    out: Path,
    *,
    count: int,
    seed: int,
    batch_size: int,
) -> dict[str, Any]:
    """Compares samples of random classes with real images.

    Args:
      generator, tokenizer, settings, batch_size: as for `sample`.
      extractor: network whose features are compared.
      reference: the result of `fid.load_reference` in this process.
      out: gets `grid.png` and `metrics.json`; holds features until these are complete.
      count: number of samples.
      seed: of the samples and their classes.

    Returns:
      The metrics of `fid.compare`, "images", "guidance" and "protocol" (see `protocol.stamp`), read
      from `metrics.json` if it exists.

    Raises:
      UserError: `out` holds the results of another evaluation.
    """
    identity = _identity(generator, tokenizer, settings, seed)
    identity |= {"measure": "generation", "count": count, "features": extractor.fingerprint}
    if reference is not None:
        identity["reference"] = reference.name
    distributed.claim(out / "evaluation.json", identity, "results")
    path = out / "metrics.json"
    if path.exists():
        return read_json(path, "the metrics")

    drawn = np.random.default_rng(seed).integers(len(generator.trained), size=count)
    classes = generator.trained[drawn]
    files = [out / "features" / f"{start:06d}.npz" for start in range(0, count, CHUNK)]
    options = {"seed": seed, "batch_size": batch_size}
    for file, images in _sample_missing(
        generator, tokenizer, classes, settings, files, CHUNK, _is_whole, **options
    ):
        if file == files[0]:
            rows = min(len(images), SHOWN) // COLUMNS
            if rows:
                picture = pictures.grid(np.split(images[: rows * COLUMNS], rows))
                pictures.save_png(out / "grid.png", picture)
        starts = range(0, len(images), batch_size)
        parts = [extractor(images[start : start + batch_size]) for start in starts]
        write_npz(file, {name: np.concatenate([p[name] for p in parts]) for name in parts[0]})
    distributed.barrier("samples", working=True)
    if distributed.is_main():
        samples = FeatureSet(extractor, members=reference.members is not None)
        for file in files:
            with np.load(local_copy(file)) as features:
                samples.add_features(dict(features))
        metrics = fid.compare(samples, reference, extractor.distance)
        stamp = protocol.stamp(
            "generation",
            reference=reference.described,
            images=count,
            image_size=tokenizer.config.image_size,
            classes="uniform",
            features=protocol.features(extractor),
            sampling=dataclasses.asdict(settings),
            seed=seed,
        )
        made = {"images": count, "guidance": settings.guidance}
        write_json(path, made | metrics | {"protocol": stamp})
        for file in files:
            file.unlink()
        with contextlib.suppress(OSError):
            (out / "features").rmdir()
    distributed.barrier("metrics", working=True)
    return read_json(path, "the metrics")


def guidance_folder(out: Path, settings: SamplingConfig) -> Path:
    """Where the evaluation of a guidance scale lives, so that a later search finds it."""
    return out / f"guidance_{settings.guidance:.2f}"


def evaluate_best(
    generator: PretrainedGenerator,
    tokenizer: AnyTokenizer,
    extractor: Extractor,
    reference: Reference | None,
    settings: SamplingConfig,
    out: Path,
    **options: int,
) -> dict[str, Any]:
    """`evaluate` at the guidance with the lowest distance, found by `search_guidance`.

    Takes the arguments of `evaluate`; the search starts at `settings.guidance`. Each scale has its
    own folder in `out`, so that a restart samples none twice. "search" in the result lists the
    metrics at all scales tried, in ascending order.
    """
    results = {}

    def distance(scale: float) -> float:
        guided = dataclasses.replace(settings, guidance=scale)
        folder = guidance_folder(out, guided)
        results[scale] = evaluate(
            generator, tokenizer, extractor, reference, guided, folder, **options
        )
        return results[scale][f"g{extractor.distance}"]

    found = search_guidance(distance, settings.guidance)
    best = min(found, key=found.get)
    return results[best] | {"search": [results[scale] for scale in sorted(results)]}


def search_guidance(distance: Callable[[float], float], start: float) -> dict[float, float]:
    """Walks in steps of 0.25 while the distance falls, first up, then down to 1 (paper, B).

    Args:
      distance: maps a guidance scale to the distance of its samples; called once per scale.
      start: first scale, at least 1.

    Returns:
      The distance at each scale that was tried.
    """
    found = {start: distance(start)}
    for step in (GUIDANCE_STEP, -GUIDANCE_STEP):
        scale = start
        while (following := round(scale + step, 6)) >= 1:
            found[following] = distance(following)
            if not found[following] < found[scale]:
                break
            scale = following
    return found


def evaluate_loss(
    generator: PretrainedGenerator,
    tokenizer: AnyTokenizer | None,
    data: DataConfig,
    batch_size: int,
) -> dict[str, float]:
    """Mean cross entropy of the codes of held-out images, given their classes.

    Args:
      generator: the model.
      tokenizer: encodes the images; None if `data` holds codes.
      data: its evaluation images or codes are used.
      batch_size: images per step, over all processes.

    Returns:
      "images", the number of images that could be read, "loss", in nats per code, and "protocol",
      see `protocol.stamp`.

    Raises:
      UserError: the data cannot be read, have too many classes, or are another tokenizer's codes.
    """
    config = generator.config
    size = tokenizer.config.image_size if tokenizer else 0
    batches = pipeline.eval_batches(data, size, batch_size, *distributed.place())
    if len(batches.class_names) > generator.class_count:
        raise UserError(
            f"config.data: expected at most {generator.class_count} classes, as in the generator, "
            f"got {len(batches.class_names)}"
        )
    names = () if "published" in generator.made_by else generator.class_names
    pairs = zip(names, batches.class_names, strict=False)
    for label, (trained, found) in enumerate(pairs):
        if trained != found:
            raise UserError(
                f"config.data: expected class {label} to be {trained!r}, as in the generator's "
                f"training, got {found!r}"
            )
    if data.source == "codes":
        info = codes.STORE.find_info(data.path)
        check_tokenizer(data.path, info, config, generator.made_by.get("tokenizer"))
    params, dtype = generator.variables["params"], generator.module.dtype
    losses = functools.partial(_losses, config, dtype=dtype, mesh=sharding.mesh_in_use())

    def measure(batch):
        encoded = batch["codes"] if "codes" in batch else tokenizer.encode(batch["image"])
        return {"loss": losses(params, encoded, batch["label"])}

    with batches:
        progress = tqdm(batches, total=math.ceil(batches.examples / batch_size), disable=None)
        means = held_out_means(measure, progress, batches.examples)
    bad = distributed.sums({"bad": batches.bad_count})["bad"]
    images = batches.examples - int(bad)
    crop = {"crop": data.eval_resize} if tokenizer else {}  # codes have been cropped before
    stamp = protocol.stamp("loss", data=data.described, images=images, **crop)
    return {"images": images, **means, "protocol": stamp}


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def _losses(config, params, encoded, labels, dtype, mesh):
    del mesh  # the layers look it up
    return validation_loss(config, params, encoded, labels, dtype)


def evenly_spaced(items: np.ndarray, count: int) -> np.ndarray:
    """At most `count` evenly spaced items, including the first."""
    count = min(count, len(items))
    return items[np.arange(count) * len(items) // count]


def _identity(generator, tokenizer, settings: SamplingConfig, seed: int) -> dict[str, Any]:
    """Everything that images of given classes depend on."""
    return {
        "sampling": dataclasses.asdict(settings),
        "seed": seed,
        "generator": generator.fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }


def _sample_missing(
    generator: PretrainedGenerator,
    tokenizer: AnyTokenizer,
    classes: np.ndarray,
    settings: SamplingConfig,
    paths: Sequence[Path],
    per_file: int,
    whole: Callable[[Path], bool],
    *,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yields the missing files of this process's share and their images, uint8 `[n, H, W, 3]`.

    File i holds `per_file` images, starting with number i * per_file. A batch may span files. A
    file that is not `whole` counts as missing.
    """
    process, processes = distributed.place()
    todo = {}
    for i in range(process, len(paths), processes):
        if paths[i].exists():
            if whole(paths[i]):
                continue
            logger.warning("%s: damaged, or of other images; it is made again", paths[i])
        todo[paths[i]] = range(i * per_file, min((i + 1) * per_file, len(classes)))
    numbers = np.array([n for group in todo.values() for n in group], int)
    size = min(batch_size, len(numbers))
    key = jax.random.key(seed)

    def images():
        for start in range(0, len(numbers), batch_size):
            chosen = numbers[start : start + batch_size]
            filled = np.resize(chosen, size)  # a shorter last batch would recompile
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, filled)
            sampled = generator.sample(classes[filled], keys, **dataclasses.asdict(settings))
            batch = pictures.finite_uint8(tokenizer.decode(sampled), "the decoded samples")
            yield from batch[: len(chosen)]

    label = f"guidance {settings.guidance:g}"
    with tqdm(images(), total=len(numbers), unit="image", desc=label, disable=None) as progress:
        stream = iter(progress)
        for path, group in todo.items():
            yield path, np.stack([next(stream) for _ in group])


def _write_npz(path: Path, images: Sequence[Path], classes: np.ndarray) -> None:
    """Writes ADM's layout image by image: 50,000 images of 256 pixels take 10 GB."""
    shape = (len(images), *pictures.read(images[0]).shape)
    with replacing(path) as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as array:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(array, header)
            for image in images:
                array.write(pictures.read(image).tobytes())
        with file.open("arr_1.npy", "w") as array:
            np.lib.format.write_array(array, np.asarray(classes, np.int64))


def _write_class_grid(
    path: Path, images: Sequence[Path], classes: np.ndarray, class_names: Sequence[str]
) -> None:
    """Writes a labeled row of samples per class, for evenly spaced classes if they are many."""
    shown = evenly_spaced(np.unique(classes), CLASSES)
    columns = min(COLUMNS, *(np.sum(classes == c) for c in shown))
    rows, labels, names = [], [], imagenet.words(class_names)
    for c in shown:
        chosen = np.flatnonzero(classes == c)[:columns]
        rows.append(np.stack([pictures.read(images[i]) for i in chosen]))
        named = c < len(names) and names[c] != str(c)
        labels.append(f"{c}: {names[c][:NAME_LENGTH]}" if named else str(c))
    grid = Image.fromarray(pictures.grid(rows))
    font = ImageFont.load_default(14)
    margin = max(40, *(int(font.getlength(label)) + 12 for label in labels))
    labeled = Image.new("RGB", (grid.width + margin, grid.height), "white")
    labeled.paste(grid, (margin, 0))
    canvas = ImageDraw.Draw(labeled)
    for row, label in enumerate(labels):
        place = (6, (row + 0.5) * grid.height / len(rows))
        canvas.text(place, label, fill="black", anchor="lm", font=font)
    pictures.save_png(path, np.asarray(labeled))
