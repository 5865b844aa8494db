"""Encodes a data set once, so that training a generator reads codes instead of images."""

import dataclasses
import logging
import math

from einops import rearrange
import numpy as np
from tqdm import tqdm

from gigatok_jax import api, distributed, files
from gigatok_jax.data import codes as stored
from gigatok_jax.data import export, pipeline, shards
from gigatok_jax.data.parquet import import_pyarrow
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError

logger = logging.getLogger(__name__)


def encode(
    tokenizer: api.AnyTokenizer,
    data: DataConfig,
    out: files.Path,
    *,
    crop_factors: tuple[float, ...],
    batch_size: int,
    shard_images: int,
    format: str = "records",
    overwrite: bool = False,
) -> None:
    """Encodes the training and evaluation images of a data set into ArrayRecord shards.

    Existing shards in `out` are kept; each process writes its share of the others.

    Args:
      tokenizer: encodes the images.
      data: a data set of images.
      out: directory for the shards and `codes.json`, which describes them.
      crop_factors: store ten crops of each training image per factor (see `crops.ten_crops`). If
        empty, store the centre crop only, as for evaluation images.
      batch_size: number of images to read, and of crops to encode, at a time.
      shard_images: images per shard, a multiple of `batch_size`.
      format: "parquet" or "npz" also writes the codes like this; see `export.export`.
      overwrite: remove the codes that `out` holds if they are others.

    Raises:
      UserError: an option is invalid, the data cannot be read, or `out` holds other codes, of other
        images too.
    """
    if format == "parquet":
        import_pyarrow()  # if it is not installed, fail now
    if any(not 1 <= factor <= 2 for factor in crop_factors):
        raise UserError(f"--crop_factors: expected numbers in [1, 2], got {crop_factors}")
    if shard_images % batch_size:
        raise UserError(
            f"--shard_images: expected a multiple of --batch_size={batch_size}, got {shard_images}"
        )
    splits = {
        split: pipeline.eval_images(
            data,
            image_size=tokenizer.config.image_size,
            batch_size=batch_size,
            train=split == "train",
            crop_factors=crop_factors if split == "train" else (),
        )
        for split in shards.SPLITS
    }
    info = stored.CodesInfo(
        tokenizer=tokenizer.codes_of,
        codes=tokenizer.config.latents,
        codebook_size=tokenizer.config.codebook_size,
        class_names=splits["train"].class_names,
        data=data.content(),
        crop_factors=crop_factors,
        shard_images=shard_images,
        versions={split: batches.version() for split, batches in splits.items()},
        examples={split: batches.examples for split, batches in splits.items()},
    )

    def claim():
        if overwrite and _differs(out, info):  # not after a kill of this same command
            remove(out)
        stored.STORE.claim(out, info)

    distributed.in_main(claim)

    counts = {}
    for split, batches in splits.items():
        number = math.ceil(batches.examples / shard_images)
        paths = [shards.shard_path(out, split, shard, number) for shard in range(number)]
        _write_missing(paths, tokenizer, batches, batch_size, shard_images)
        distributed.barrier(f"codes of {split}", working=True)
        counts[split] = tuple(stored.STORE.count(path) for path in paths)
        images = sum(counts[split])
        skipped = batches.examples - images
        if distributed.is_main():
            print(f"{split}: {images} images ({skipped} could not be read) in {number} shards")
    if distributed.is_main():
        stored.STORE.write_info(out, dataclasses.replace(info, images=counts))
        if format != "records":
            export.export(out, format)
        print(out)
    distributed.barrier("codes", working=True)


def _differs(folder: files.Path, new: stored.CodesInfo) -> bool:
    """Whether a folder's codes are others than those that `new` describes, or damaged."""
    try:
        old = stored.STORE.read_info(folder)
    except UserError:
        return True
    return old is not None and dataclasses.replace(old, images={}) != new


def remove(folder: files.Path) -> None:
    """Removes the stored codes of a folder, and nothing else."""
    (folder / stored.STORE.file).unlink(missing_ok=True)
    for split in shards.SPLITS:
        for path in folder.glob(f"{split}-?????-of-?????.array_record"):
            path.unlink()
        for suffix in export.FORMATS:
            (folder / f"{split}.{suffix}").unlink(missing_ok=True)


def _write_missing(
    paths: list[files.Path],
    tokenizer: api.AnyTokenizer,
    batches: pipeline.Batches,
    batch_size: int,
    shard_images: int,
) -> None:
    """Writes this process's share of the shards, except those that exist."""
    dtype = np.uint16 if tokenizer.config.codebook_size <= 2**16 else np.int32

    def encoded(images: np.ndarray) -> np.ndarray:
        """Codes `[B, crops, N]` of uint8 images `[B, S, S, 3]` or crops `[B, crops, S, S, 3]`."""
        flat = images.reshape(-1, *images.shape[-3:])
        parts = [flat[start : start + batch_size] for start in range(0, len(flat), batch_size)]
        codes = np.concatenate([np.asarray(tokenizer.encode(part), dtype) for part in parts])
        return rearrange(codes, "(b crops) n -> b crops n", b=len(images))

    def records(count: int):
        for _ in range(math.ceil(count / batch_size)):
            batch = next(batches)
            yield from stored.records(batch, encoded(batch["image"]))

    process, processes = distributed.place()
    mine = np.array_split(range(len(paths)), processes)[process].tolist()
    starts = [shard * shard_images for shard in mine]
    counts = [min(shard_images, batches.examples - start) for start in starts]
    bar = tqdm(total=sum(counts), unit="image", desc="encode", disable=None)
    with batches, bar:
        for shard, start, count in zip(mine, starts, counts, strict=True):
            if not paths[shard].exists():
                first = {"next_batch": start // batch_size}
                if batches.get_state() != first:  # because set_state restarts the workers
                    batches.set_state(first)
                stored.write_shard(paths[shard], records(count))
            bar.update(count)
            if bar.disable:
                logger.info("%s", paths[shard].name)
