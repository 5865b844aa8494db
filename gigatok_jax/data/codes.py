"""Stored codes of a data set: ArrayRecord shards, and `codes.json`, which describes them."""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
import msgpack
import numpy as np

from gigatok_jax.config import configclass, from_mapping
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import read_json, replacing, stamp, write_json

SPLITS = ("train", "validation")


@configclass
class CodesInfo:
    """What a folder of codes holds."""

    tokenizer: str  # fingerprint of the tokenizer's weights, see `bundles.Bundle`
    codes: int  # per crop, N
    codebook_size: int  # K
    class_names: tuple[str, ...]  # by label
    data: dict[str, Any]  # what was encoded, see `DataConfig.content`
    crop_factors: tuple[float, ...]  # see `crops.ten_crops`; empty: one centre crop per image
    shard_images: int  # images per shard; the last shard may hold fewer
    # Split to the number of records in each shard; empty until everything is encoded.
    images: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def check(self, *, codes: int, codebook_size: int, tokenizer: str | None) -> None:
        """Rejects codes of another shape or, if one is given, of another tokenizer.

        Raises:
          UserError: the codes do not fit.
        """
        for name, wanted in (("codes", codes), ("codebook_size", codebook_size)):
            if getattr(self, name) != wanted:
                raise UserError(
                    f"{name} is {wanted} in the generator's model, but {getattr(self, name)} in "
                    "the stored codes"
                )
        if tokenizer not in (None, self.tokenizer):
            raise UserError("the stored codes are those of another tokenizer than the generator's")


def read_info(folder: Path) -> CodesInfo | None:
    """The folder's `codes.json`, or None if it has none.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / "codes.json"
    if not path.exists():
        return None
    return from_mapping(CodesInfo, read_json(path, "stored codes"), str(path))


def find_info(path: str) -> CodesInfo:
    """`read_info` of a path that a user gave.

    Raises:
      UserError: the folder has no codes, or their description is damaged.
    """
    folder = Path(path).expanduser()
    info = read_info(folder)
    if info is None:
        raise UserError(f"{folder}: no codes.json, expected what `gigatok encode` writes")
    return info


def write_info(folder: Path, info: CodesInfo) -> None:
    write_json(folder / "codes.json", dataclasses.asdict(info))


def shard_path(folder: Path, split: str, shard: int, shards: int) -> Path:
    return folder / f"{split}-{shard:05d}-of-{shards:05d}.array_record"


def records(batch: Mapping[str, Any], codes: np.ndarray) -> Iterator[dict[str, Any]]:
    """The records of an evaluation batch with codes [B, crops, N], for `write_shard`."""
    for i in np.flatnonzero(batch["valid"]):
        label, key = int(batch["label"][i]), str(batch["key"][i])
        yield {"codes": codes[i], "label": label, "key": key}


def write_shard(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes a complete shard, or nothing, of {"codes": int [crops, N], "label", "key"}."""
    for stale in path.parent.glob(f".{path.name}.*.partial"):  # left by a killed process
        stale.unlink()
    with contextlib.ExitStack() as stack:
        aside = stack.enter_context(replacing(path))
        # Groups of one record, because training reads single records in random order.
        writer = ArrayRecordWriter(str(aside), "group_size:1")
        stack.callback(writer.close)
        for record in records:
            codes = record["codes"]
            packed = {"codes": codes.tobytes(), "type": codes.dtype.str, "shape": codes.shape}
            writer.write(msgpack.packb(dict(record) | packed))


def count(path: Path) -> int:
    """The number of records in a shard.

    Raises:
      UserError: the shard is missing or damaged.
    """
    try:
        with contextlib.closing(ArrayRecordReader(str(path))) as reader:
            return reader.num_records()
    except Exception as error:  # plain RuntimeErrors and ValueErrors from the C++ library
        raise UserError(
            f"{path}: missing or damaged shard of codes ({first_line(error)}); remove it, and the "
            "same `gigatok encode` writes it anew"
        ) from None


class CodesSource:
    """One split's codes; an example is {"codes": int32 [crops, N], "label", "key"}.

    Args:
      folder: what `gigatok encode` wrote.
      split: one of `SPLITS`.

    Raises:
      UserError: codes are missing or incomplete, or a shard is damaged.
    """

    def __init__(self, folder: str, split: str):
        folder = Path(folder).expanduser()
        info = find_info(folder)
        if not info.images:
            raise UserError(
                f"{folder}: encoding has not ended; the same `gigatok encode` resumes it"
            )
        if split not in info.images:
            raise UserError(f"{folder}: has no codes of split {split!r}")
        counts = info.images[split]
        self.info, self.class_names, self.codes = info, info.class_names, info.codes
        self._paths = [shard_path(folder, split, i, len(counts)) for i in range(len(counts))]
        for path, expected in zip(self._paths, counts, strict=True):
            if (found := count(path)) != expected:
                raise UserError(f"{path}: holds {found} records, expected {expected}")
        self._records = ArrayRecordDataSource(self._paths)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        try:
            record = msgpack.unpackb(self._records[index])
        except RuntimeError as error:
            folder = self._paths[0].parent
            raise UserError(f"{folder}: record {index} is damaged: {first_line(error)}") from error
        codes = np.frombuffer(record["codes"], record["type"]).reshape(record["shape"])
        return {
            "codes": codes.astype(np.int32),
            "label": record["label"],
            "key": record["key"],
        }

    def version(self) -> str:
        return stamp(self._paths[0].parent, [path.name for path in self._paths])
