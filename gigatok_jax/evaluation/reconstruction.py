"""Reconstruction metrics of a tokenizer: PSNR, SSIM, LPIPS, codebook usage, rFID (paper, 4)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import functools
import logging
import math
import os
import pathlib
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gigatok_jax import api, bundles, distributed, frozen_networks, image_metrics, pictures
from gigatok_jax.data import crops, pipeline
from gigatok_jax.data.folders import image_paths
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import print_metrics, protocol
from gigatok_jax.evaluation.features import Extractor
from gigatok_jax.evaluation.fid import Moments, check_count, frechet_distance
from gigatok_jax.files import (
    Path,
    printable,
    read_json,
    refuse_foreign,
    replacing,
    write_json,
)
from gigatok_jax.models.lpips import LPIPS

logger = logging.getLogger(__name__)

COLUMNS = 8  # of the grid
SHOWN = 32  # images in the grid, evenly spaced
RECORD = "reconstruction.json"  # in a folder of pictures: that, and how, this program made them

Batch = dict[str, Any]


def evaluate(
    tokenizer: api.AnyTokenizer,
    extractor: Extractor,
    data: DataConfig,
    out: Path,
    *,
    batch_size: int,
    ssim_range: int = 1,
) -> dict[str, float]:
    """Reconstructs the evaluation images of a data set, as center crops.

    Args:
      tokenizer: the tokenizer to evaluate.
      extractor: the network whose features the Fréchet distance compares.
      data: the data set.
      out: folder that receives `grid.png` and `code_counts.npy`, int64 `[K]`.
      batch_size: images per batch, over all processes.
      ssim_range: see `image_metrics.ssim`.

    Returns:
      "images", "psnr" (dB), "ssim", "lpips" if its weights are installed, "codebook_usage" (the
      share of all codes that these images use), and the Fréchet distance between images and
      reconstructions: "rfid", "rfd_dinov2" or "rfd_teacher"; and "protocol", see `protocol.stamp`.

    Raises:
      UserError: the data cannot be read, or have fewer than two images.
    """
    place = distributed.place()
    batches = pipeline.eval_images(data, tokenizer.config.image_size, batch_size, *place)
    check_count(batches.examples, "eval_length")
    real, fake = (Moments(extractor.widths["pool"]) for _ in range(2))

    def visit(keys, inputs, outputs, values):
        real.add(extractor(inputs)["pool"])
        fake.add(extractor(outputs)["pool"])

    with batches:
        result, measured, code_counts = _reconstruct(
            tokenizer, batches, batches.examples, batch_size, ssim_range, visit, out
        )
    if distributed.is_main():
        with replacing(out / "code_counts.npy") as aside, aside.open("wb") as file:
            np.save(file, code_counts)
    real.gather()
    fake.gather()
    origin = data.path or data.source
    distance = frechet_distance(real.gaussian(origin), fake.gaussian(origin))
    stamp = protocol.stamp(
        "reconstruction",
        data=data.described,
        crop=data.eval_resize,
        features=protocol.features(extractor),
        **measured,
    )
    return result | {f"r{extractor.distance}": distance, "protocol": stamp}


def reconstruct(
    tokenizer: api.AnyTokenizer,
    source: Path,
    out: Path,
    *,
    batch_size: int,
    ssim_range: int = 1,
) -> dict[str, Any]:
    """Reconstructs image files, and prints the metrics.

    Args:
      tokenizer: the tokenizer to use.
      source: an image file, or a folder that is searched recursively. Unreadable images are
        skipped.
      out: folder that receives `grid.png` (inputs over outputs), `images/` (one PNG per image,
        instead of those of an earlier call) and `metrics.json`.
      batch_size: images per batch.
      ssim_range: see `image_metrics.ssim`.

    Returns:
      The content of `metrics.json`: "images", "skipped", the metrics of `evaluate` without the
      distance, "protocol", and "each", one row of metrics per image.

    Raises:
      UserError: no image can be read, or `out` has an `images/` with more than an earlier call's.
    """
    paths, rows = image_paths(source), []
    root = source if source.is_dir() else source.parent
    names = output_names([str(path.relative_to(root)) for path in paths])
    with replacing(out / "images", check_replaceable) as aside:

        def visit(keys, inputs, outputs, values):
            for i, key in enumerate(keys.tolist()):
                pictures.save_png(aside / names[key], outputs[i])
                described = {"image": printable(key), "output": printable(names[key])}
                rows.append(described | {name: float(x[i]) for name, x in values.items()})

        batches = read_crops(source, paths, tokenizer.config.image_size, batch_size)
        means, measured, _ = _reconstruct(
            tokenizer, batches, len(paths), batch_size, ssim_range, visit, out
        )
        described = {"images": printable(str(source)), "tokenizer": tokenizer.fingerprint}
        write_json(aside / RECORD, described | {"outputs": [row["output"] for row in rows]})
    skipped = len(paths) - means.pop("images")
    stamp = protocol.stamp("reconstruction of files", data=source.name, crop="adm", **measured)
    result = {"images": len(rows), "skipped": skipped, **means, "protocol": stamp, "each": rows}
    write_json(out / "metrics.json", result)
    print(f"{len(rows)} images ({skipped} skipped)")
    print_metrics(means)
    return result


def check_replaceable(folder: Path, record: str = RECORD, verb: str = "reconstruct") -> None:
    """Raises UserError if a folder has pictures that are not an earlier call's."""
    own = []
    with contextlib.suppress(OSError, UserError, KeyError, TypeError):
        own = [record, *map(str, read_json(folder / record, "pictures")["outputs"])]
    refuse_foreign(folder, own, f"the pictures of an earlier call of {verb}")


def output_names(keys: Sequence[str]) -> dict[str, str]:
    """A PNG's name for each image: a.png stays, a.jpg becomes a.jpg.png, and none comes twice."""
    names = {key: key for key in keys if key.endswith(".png")}
    # A folder may have the name that a picture beside it would get: a.jpg.png/ beside a.jpg.
    taken = {*names, *(str(folder) for key in keys for folder in pathlib.PurePath(key).parents)}
    for key in keys:
        folder, base = os.path.split(key)
        number = 0
        while key not in names:
            suffix = f".{number}.png" if number else ".png"
            # A file's name has at most 255 bytes.
            short = os.fsdecode(os.fsencode(base)[: 255 - len(suffix)])
            name, number = os.path.join(folder, short + suffix), number + 1
            if name not in taken:
                names[key] = name
                taken.add(name)
    return names


def read_crops(source: Path, paths: Sequence[Path], size: int, batch_size: int) -> Iterator[Batch]:
    """Yields image files as batches like those of `pipeline.eval_images`."""
    root, found, turned = source if source.is_dir() else source.parent, False, False
    for start in range(0, len(paths), batch_size):
        images = np.zeros((batch_size, size, size, 3), np.uint8)
        valid, keys = np.zeros(batch_size, bool), [""] * batch_size
        for i, path in enumerate(paths[start : start + batch_size]):
            try:
                image = crops.load(path)
                images[i] = crops.center_crop(image, size)
                if crops.is_turned(image) and not turned:
                    turned = True
                    logger.warning(pipeline.TURNED)
                valid[i], keys[i], found = True, str(path.relative_to(root)), True
            except crops.BadImage as error:
                logger.warning("skipped %s: %s", path, error)
        index = np.arange(start, start + batch_size)
        yield {"image": images, "valid": valid, "key": np.array(keys), "index": index}
    if not found:
        raise UserError(f"{source}: none of its {len(paths)} images can be read")


def _reconstruct(
    tokenizer: api.AnyTokenizer,
    batches: Iterable[Batch],
    examples: int,
    batch_size: int,
    ssim_range: int,
    visit: Callable[..., None],
    out: Path,
) -> tuple[dict[str, float], dict[str, Any], np.ndarray]:
    """Passes this process's part of `batches` through a tokenizer, and writes `grid.png`.

    `visit` receives the keys, inputs, outputs and metrics of each batch's readable images. Returns
    the means of the metrics, what `protocol.stamp` says of these, and the count of each code, over
    all processes.
    """
    compare, lpips = comparison(ssim_range)
    # Process 0 saves the grid, so only images that it reads are shown: the first of each batch.
    index = np.arange(examples)
    own = index[index % batch_size < batch_size // distributed.place()[1]]
    wanted = own[np.linspace(0, len(own) - 1, min(SHOWN, len(own))).astype(int)]
    code_counts = np.zeros(tokenizer.config.codebook_size, np.int64)
    images, sums, shown, digest = 0, {}, [], pictures.PixelDigest()
    for batch in tqdm(batches, total=math.ceil(examples / batch_size), unit="batch", disable=None):
        valid = batch["valid"]
        codes = tokenizer.encode(batch["image"])
        floats = tokenizer.decode(codes)
        values = jax.device_get(compare(batch["image"], floats))
        values = {name: value[valid].astype(np.float64) for name, value in values.items()}
        outputs = pictures.finite_uint8(floats, "the reconstructions")[valid]
        inputs = batch["image"][valid]
        if valid.any():
            visit(batch["key"][valid], inputs, outputs, values)
        digest.add(inputs)
        images += len(inputs)
        code_counts += np.bincount(np.asarray(codes)[valid].ravel(), minlength=len(code_counts))
        sums = {name: sums.get(name, 0.0) + value.sum() for name, value in values.items()}
        in_grid = np.isin(batch["index"][valid], wanted)
        shown += zip(inputs[in_grid], outputs[in_grid], strict=True)
    if distributed.is_main() and shown:
        _save_grid(out / "grid.png", shown)
    counts = {"images": images, "code_counts": code_counts, "digest": digest.total}
    sums = distributed.sums(counts | sums)
    images, code_counts, pixels = (sums.pop(name) for name in counts)
    measured = {
        "images": int(images),
        "image_size": tokenizer.config.image_size,
        "pixels": pictures.PixelDigest(pixels).text(),
        "ssim_range": ssim_range,
        "lpips": lpips,
    }
    means = {name: float(total / images) for name, total in sums.items()}
    usage = float(np.mean(code_counts > 0))
    return {"images": int(images), **means, "codebook_usage": usage}, measured, code_counts


def comparison(
    ssim_range: int,
) -> tuple[Callable[[np.ndarray, jax.Array], dict[str, jax.Array]], str | None]:
    """A function that maps uint8 inputs and float outputs to metrics, `[B]` each; LPIPS' digest."""
    # Process 0 decides about LPIPS, because all processes must add up the same metrics.
    lpips = frozen_networks.load_lpips() if distributed.agree(frozen_networks.has_lpips()) else None
    if lpips is None:
        logger.info("LPIPS is left out; to get its weights: gigatok weights fetch lpips_vgg16")

    digest = None if lpips is None else bundles.fingerprint(lpips)
    options = {"lpips": jax.device_put(lpips), "ssim_range": ssim_range}
    return functools.partial(_compare, **options), digest


@functools.partial(jax.jit, static_argnames="ssim_range")
def _compare(inputs, floats, lpips, ssim_range):
    outputs = pictures.to_uint8(floats)
    values = {
        "psnr": image_metrics.psnr(inputs, outputs),
        "ssim": image_metrics.ssim(inputs, outputs, ssim_range),
    }
    if lpips is not None:
        clipped = jnp.clip(floats, -1, 1)
        with jax.default_matmul_precision("highest"):
            distance = LPIPS().apply({"params": lpips}, pictures.to_float(inputs), clipped)
        values["lpips"] = distance
    return values


def _save_grid(path: Path, shown: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Saves rows of inputs, each over its row of outputs; white fills the last pair of rows."""
    pairs, columns = np.array(shown), min(COLUMNS, len(shown))  # [n, 2, H, W, 3]
    missing = -len(pairs) % columns
    pairs = np.concatenate([pairs, np.full_like(pairs[:1], 255).repeat(missing, axis=0)])
    rows = einops.rearrange(pairs, "(row n) pair h w c -> (row pair) n h w c", n=columns)
    pictures.save_png(path, pictures.grid(rows))
