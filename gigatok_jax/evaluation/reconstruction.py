"""How well a tokenizer reconstructs: PSNR, SSIM, LPIPS, codebook usage, rFID (paper, 4)."""

from collections.abc import Callable
import functools
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from gigatok_jax import api, distributed, frozen, metrics, pictures
from gigatok_jax.data import pipeline
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.evaluation.distribution import frechet_distance
from gigatok_jax.evaluation.features import Extractor
from gigatok_jax.evaluation.sets import FeatureSet, check_count
from gigatok_jax.files import replacing
from gigatok_jax.models.lpips import LPIPS

logger = logging.getLogger(__name__)

COLUMNS = 8  # of the grid
SHOWN = 32  # images in it, evenly spaced


def evaluate(
    tokenizer: api.PretrainedTokenizer,
    extractor: Extractor,
    data: DataConfig,
    out: pathlib.Path,
    *,
    batch_size: int,
    ssim_range: int = 1,
) -> dict[str, float]:
    """Passes the evaluation images of a data set through a tokenizer, and writes a grid.

    Args:
      tokenizer: what is judged.
      extractor: whose features are compared over all images.
      data: its evaluation images, centre crops.
      out: folder; gets `grid.png` and `code_counts.npy`, int64 `[K]`.
      batch_size: images at once.
      ssim_range: see `metrics.ssim`.

    Returns:
      "images", "psnr" (dB), "ssim", "lpips" where its weights are there, "codebook_usage" (the
      share of all codes that these images use), and the Fréchet distance between images and
      reconstructions, "r" before its name: "rfid", "rfd_teacher", ...

    Raises:
      UserError: the data cannot be read, or are fewer than two images.
    """
    config = tokenizer.config
    compare = comparison(ssim_range)
    process, processes = distributed.place()
    batches = pipeline.eval_images(data, config.image_size, batch_size, process, processes)
    check_count(batches.examples, "eval_length")
    counts = np.zeros(config.codebook_size, np.int64)
    real, fake = (FeatureSet(extractor, names=["pool"]) for _ in range(2))
    sums, shown, seen = {}, [], 0
    wanted = np.linspace(0, batches.examples - 1, min(SHOWN, batches.examples)).astype(int)
    # Process 0 shows of each batch what it has itself.
    wanted = set(wanted - wanted % batch_size + wanted % (batch_size // processes))
    steps = -(-batches.examples // batch_size)
    with batches:
        for batch in tqdm(batches, total=steps, unit="batch", disable=None):
            keep = batch["valid"]
            codes = tokenizer.encode(batch["image"])
            floats = tokenizer.decode(codes)
            values = jax.device_get(compare(batch["image"], floats))
            outputs = np.asarray(pictures.to_uint8(floats))
            if keep.any():
                real.add(batch["image"][keep])
                fake.add(outputs[keep])
            counts += np.bincount(np.asarray(codes)[keep].ravel(), minlength=len(counts))
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value[keep].astype(np.float64).sum())
            seen += int(keep.sum())
            shown += [
                (batch["image"][i], outputs[i])
                for i, index in enumerate(batch["index"])
                if keep[i] and index in wanted
            ]
    real.gather()
    fake.gather()
    distance = frechet_distance(real.gaussians()["pool"], fake.gaussians()["pool"])
    totals = distributed.sums({"images": seen, "counts": counts, **sums})
    counts, seen = totals.pop("counts"), int(totals.pop("images"))
    if distributed.is_main():
        write_grid(out / "grid.png", shown)
        with replacing(out / "code_counts.npy") as aside, aside.open("wb") as file:
            np.save(file, counts)
    return {
        "images": seen,
        **{name: float(total) / seen for name, total in totals.items()},
        "codebook_usage": float(np.mean(counts > 0)),
        f"r{extractor.distance}": distance,
    }


def comparison(ssim_range: int) -> Callable[[np.ndarray, jax.Array], dict[str, jax.Array]]:
    """Function of uint8 inputs and float outputs to metrics, `[B]` each."""
    # All processes measure the same, or their sums could not be added.
    lpips = frozen.load_lpips() if distributed.agree(frozen.has_lpips()) else None
    if lpips is None:
        logger.info("no LPIPS: gigatok weights fetch lpips_vgg16 brings its weights")

    @jax.jit
    def compare(inputs, floats, lpips):
        outputs = pictures.to_uint8(floats)
        values = {
            "psnr": metrics.psnr(inputs, outputs),
            "ssim": metrics.ssim(inputs, outputs, ssim_range),
        }
        if lpips is not None:
            clipped = jnp.clip(floats, -1, 1)
            with jax.default_matmul_precision("highest"):
                distance = LPIPS().apply({"params": lpips}, pictures.to_float(inputs), clipped)
            values["lpips"] = distance
        return values

    return functools.partial(compare, lpips=jax.device_put(lpips))


def write_grid(path: pathlib.Path, shown: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Pairs of rows, input over output; a last incomplete pair is filled with white."""
    columns = min(COLUMNS, len(shown))
    white = np.full_like(shown[0][0], 255)
    shown = shown + [(white, white)] * (-len(shown) % columns)
    rows = []
    for start in range(0, len(shown), columns):
        inputs, outputs = zip(*shown[start : start + columns], strict=True)
        rows += [np.stack(inputs), np.stack(outputs)]
    pictures.save_png(path, pictures.grid(rows))
