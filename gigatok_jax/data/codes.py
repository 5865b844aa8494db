"""Stored codes of a data set: ArrayRecord shards, and `codes.json`, which describes them."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
from typing import Any

import msgpack
import numpy as np

from gigatok_jax.config import configclass
from gigatok_jax.data import shards
from gigatok_jax.files import Path, as_path


@configclass
class CodesInfo:
    """Description of a folder of codes."""

    tokenizer: str  # fingerprint of the tokenizer's weights, see `bundles.Bundle`
    codes: int  # per crop, N
    codebook_size: int  # K
    class_names: tuple[str, ...]  # by label
    data: dict[str, Any]  # the encoded data set, see `DataConfig.content`
    crop_factors: tuple[float, ...]  # see `crops.ten_crops`; empty: one center crop per image
    shard_images: int  # images per shard; the last shard may hold fewer
    # For each split, the number of records in each shard; empty until encoding is complete.
    images: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    # For each split, which images were to be encoded: `Source.version`, and their number.
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    examples: dict[str, int] = dataclasses.field(default_factory=dict)


ANEW = ", or anew with --overwrite"
STORE = shards.Store(CodesInfo, "codes.json", "codes", "encode", "encoded", ANEW)


def records(batch: Mapping[str, Any], codes: np.ndarray) -> Iterator[dict[str, Any]]:
    """Records for `write_shard` from an evaluation batch and its codes [B, crops, N]."""
    for i in np.flatnonzero(batch["valid"]):
        label, key = int(batch["label"][i]), str(batch["key"][i])  # valid UTF-8, as msgpack wants
        yield {"codes": codes[i], "label": label, "key": key}


def write_shard(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Atomically writes a shard of records {"codes": int [crops, N], "label", "key"}."""

    def packed(record: Mapping[str, Any]) -> bytes:
        codes = record["codes"]
        bits = {"codes": codes.tobytes(), "type": codes.dtype.str, "shape": codes.shape}
        return msgpack.packb(dict(record) | bits)

    shards.write_shard(path, map(packed, records))


class CodesSource(shards.ShardsSource):
    """One split's codes; an example is {"codes": int32 [crops, N], "label", "key"}.

    Args:
      folder: output of `gigatok encode`.
      split: one of `shards.SPLITS`.

    Raises:
      UserError: codes are missing or incomplete, or a shard is damaged.
    """

    def __init__(self, folder: str, split: str):
        super().__init__(STORE, as_path(folder), split)
        self.codes = self.info.codes

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._record(range(len(self))[index])
        codes = np.frombuffer(record["codes"], record["type"]).reshape(record["shape"])
        return {
            "codes": codes.astype(np.int32),
            "label": record["label"],
            "key": record["key"],
        }
