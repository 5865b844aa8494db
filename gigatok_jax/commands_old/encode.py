"""gigatok encode --tokenizer=DIR --config=FILE --out=DIR [--config.data.FIELD=VALUE ...]

Stores the codes of a data set, that of the config, for training generators: ten crops of each
training image, the centre crop of each validation image. A start after a kill goes on. Train on
them by --config.data.source=codes --config.data.path=DIR.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
import logging
import pathlib

from absl import flags
from einops import rearrange
from ml_collections import config_flags
import numpy as np
from tqdm import tqdm

from gigatok_jax import api, bundles, distributed
from gigatok_jax.data import codes as stored
from gigatok_jax.data import pipeline
from gigatok_jax.data.sources import DataConfig, data_config
from gigatok_jax.errors import UserError
from gigatok_jax.files import refuse_other
from gigatok_jax.models.tokenizer import TokenizerConfig

logger = logging.getLogger(__name__)

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "its `data` is encoded", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", None, "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the codes", flag_values=FLAGS)
flags.DEFINE_list(
    "crop_factors",
    ["1.1"],
    "ten crops for each, of a centre crop of so many times the image size: 1.1, or 1.1,1.05 for "
    "the reference's second set; empty: one centre crop",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "batch_size", 32, "images read, and crops encoded, at once", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer("shard_images", 4096, "images a shard", lower_bound=1, flag_values=FLAGS)
flags.mark_flags_as_required(["config", "tokenizer", "out"], flag_values=FLAGS)


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    try:
        crop_factors = tuple(float(factor) for factor in FLAGS.crop_factors)
    except ValueError:
        raise UserError(f"--crop_factors: expected numbers, got {FLAGS.crop_factors}") from None
    data = data_config(FLAGS.config)
    encode(
        bundles.load(FLAGS.tokenizer, "tokenizer", TokenizerConfig),
        data,
        pathlib.Path(FLAGS.out),
        crop_factors=crop_factors,
        batch_size=FLAGS.batch_size,
        shard_images=FLAGS.shard_images,
    )


def encode(
    bundle: bundles.Bundle,
    data: DataConfig,
    out: pathlib.Path,
    *,
    crop_factors: tuple[float, ...],
    batch_size: int,
    shard_images: int,
) -> None:
    """Writes the shards that `out` lacks, this process its share of them, then `codes.json`.

    Raises:
      UserError: the data cannot be read, or `out` holds codes of something else.
    """
    if any(not 1 <= factor <= 2 for factor in crop_factors):
        raise UserError(f"--crop_factors: expected numbers in [1, 2], got {crop_factors}")
    size = bundle.config.image_size
    if shard_images % batch_size:
        raise UserError(
            f"--shard_images: expected a multiple of --batch_size={batch_size}, got {shard_images}"
        )
    splits = {
        split: pipeline.eval_images(
            data,
            image_size=size,
            batch_size=batch_size,
            train=split == "train",
            crop_factors=crop_factors if split == "train" else (),
        )
        for split in stored.SPLITS
    }
    info = stored.CodesInfo(
        tokenizer=bundle.fingerprint,
        codes=bundle.config.latents,
        codebook_size=bundle.config.codebook_size,
        class_names=splits["train"].class_names,
        data=data.content(),
        crop_factors=crop_factors,
        shard_images=shard_images,
    )
    _settle(out, info)
    encode_batch = _encoder(api.PretrainedTokenizer(bundle.config, bundle.weights), batch_size)
    process, processes = distributed.place()
    counts = {}
    for split, batches in splits.items():
        shards = -(-batches.examples // shard_images)
        paths = [stored.shard_path(out, split, shard, shards) for shard in range(shards)]
        mine = np.array_split(range(shards), processes)[process]
        images = [min(shard_images, batches.examples - s * shard_images) for s in mine]
        bar = tqdm(total=sum(images), unit="image", desc=split, disable=None)
        with batches, bar:
            for shard, count in zip(mine, images, strict=True):
                if not paths[shard].exists():
                    first = {"next_batch": shard * shard_images // batch_size}
                    if batches.get_state() != first:  # which would start new workers
                        batches.set_state(first)
                    steps = -(-count // batch_size)
                    stored.write_shard(paths[shard], _records(batches, steps, encode_batch))
                bar.update(count)
                if bar.disable:
                    logger.info("%s: shard %d of %d", split, shard + 1, shards)
        distributed.barrier(f"codes of {split}", working=True)
        counts[split] = tuple(map(stored.count, paths))
        skipped = batches.examples - sum(counts[split])
        print(f"{split}: {sum(counts[split])} images ({skipped} skipped) in {shards} shards")
    if distributed.is_main():
        stored.write_info(out, dataclasses.replace(info, images=counts))
    distributed.barrier("codes")
    print(out)


def _records(batches: pipeline.Batches, steps: int, encode_batch) -> Iterator[dict]:
    for _ in range(steps):
        batch = next(batches)
        yield from stored.records(batch, encode_batch(batch["image"]))


def _encoder(
    tokenizer: api.PretrainedTokenizer, batch_size: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Function of uint8 crops `[B, (crops,) S, S, 3]` to codes `[B, crops, N]`.

    So many crops are encoded at once; codes are of the smallest type that holds them.
    """
    dtype = np.uint16 if tokenizer.config.codebook_size <= 2**16 else np.int32

    def encode_batch(images):
        flat = images.reshape(-1, *images.shape[-3:])
        parts = (flat[i : i + batch_size] for i in range(0, len(flat), batch_size))
        codes = np.concatenate([np.asarray(tokenizer.encode(part), dtype) for part in parts])
        return rearrange(codes, "(b c) n -> b c n", b=len(images))

    return encode_batch


def _settle(out: pathlib.Path, info: stored.CodesInfo) -> None:
    """Writes what will be there, or refuses a folder where something else is."""
    old = stored.read_info(out)
    if old is not None:
        before, new = (json.loads(json.dumps(dataclasses.asdict(i))) for i in (old, info))
        del new["images"]  # which come last
        refuse_other(out, before, new, "codes")
    elif distributed.is_main():
        stored.write_info(out, info)
