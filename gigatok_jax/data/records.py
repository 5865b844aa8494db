"""Image files in ArrayRecord shards, as `gigatok pack` writes them."""

import dataclasses
from typing import Any, Literal

import msgpack

from gigatok_jax.config import configclass
from gigatok_jax.data import crops, shards
from gigatok_jax.data.encoded import EncodedSource
from gigatok_jax.errors import UserError
from gigatok_jax.files import as_path


@configclass
class RecordsInfo:
    """Description of a folder of packed images."""

    format: Literal["records", "tfds"]
    class_names: tuple[str, ...]  # by label
    shard_images: int  # images per shard; the last shard may hold fewer
    # For each split, the number of records in each shard; empty until packing is complete.
    images: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    # For each split, which images were to be packed: `Source.version`, and their number.
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    examples: dict[str, int] = dataclasses.field(default_factory=dict)


STORE = shards.Store(RecordsInfo, "info.json", "images", "pack", "packed")


def record(example: dict[str, Any]) -> bytes:
    """A record of {"image": content of the file, "label", "key"}."""
    return msgpack.packb(example)


class RecordsSource(shards.ShardsSource, EncodedSource):
    """Packed images. Without a validation split, the training images serve for evaluation too.

    Args:
      folder: output of `gigatok pack`.
      train: True for the training images, False for those for evaluation.

    Raises:
      UserError: images are missing, or packed as a TFDS data set, or a shard is damaged.
    """

    def __init__(self, folder: str, train: bool):
        path = as_path(folder)
        info = STORE.find_info(path)
        if info.format != "records":
            raise UserError(f"{path}: expected packed records, found a TFDS data set")
        held = "train" if set(info.images) == {"train"} else "validation"
        super().__init__(STORE, path, "train" if train else held)

    def encoded(self, index: int) -> dict[str, Any]:
        try:
            return self._record(range(len(self))[index])
        except UserError as error:
            raise crops.BadImage(str(error)) from error
