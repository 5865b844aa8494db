"""Stored codes of a data set: ArrayRecord shards, and `codes.json`, which describes them."""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import dataclasses
import errno
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
import msgpack
import numpy as np

from gigatok_jax.config import configclass, from_mapping
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import (
    Path,
    as_path,
    in_bucket,
    read_json,
    reason,
    replacing,
    stamp,
    write_json,
)

SPLITS = ("train", "validation")


@configclass
class CodesInfo:
    """Description of a folder of codes."""

    tokenizer: str  # fingerprint of the tokenizer, see `bundles.Bundle.codes_of`
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


def check_unchanged(folder: Path, old: CodesInfo, new: CodesInfo) -> None:
    """Raises UserError if the encoded images are no longer those of `old`."""
    for split, version in new.versions.items():
        if old.versions.get(split) != version:
            before, now = old.examples.get(split, 0), new.examples[split]
            found = f"{now} images, were {before}" if now != before else "other files, as many"
            raise UserError(
                f"{folder}: the {split} images have changed since they were encoded ({found}); "
                "encode them into another folder, or anew with --overwrite"
            )


def differs(folder: Path, new: CodesInfo) -> bool:
    """Whether a folder's codes are others than those that `new` describes, or damaged."""
    try:
        old = read_info(folder)
    except UserError:
        return True
    return old is not None and dataclasses.replace(old, images={}) != new


def remove(folder: Path) -> None:
    """Removes the stored codes of a folder, and nothing else."""
    (folder / "codes.json").unlink(missing_ok=True)
    for split in SPLITS:
        for path in folder.glob(f"{split}-?????-of-?????.array_record"):
            path.unlink()


def read_info(folder: Path) -> CodesInfo | None:
    """Reads the folder's `codes.json`; returns None if it does not exist.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / "codes.json"
    if not path.exists():
        return None
    return from_mapping(CodesInfo, read_json(path, "stored codes"), f"{path}: info")


def find_info(path: str) -> CodesInfo:
    """`read_info` of a folder that must hold codes.

    Raises:
      UserError: `codes.json` is missing or damaged.
    """
    folder = as_path(path)
    info = read_info(folder)
    if info is None:
        raise UserError(f"{folder}: no codes.json, expected the output of `gigatok encode`")
    return info


def write_info(folder: Path, info: CodesInfo) -> None:
    write_json(folder / "codes.json", dataclasses.asdict(info))


def shard_path(folder: Path, split: str, shard: int, shards: int) -> Path:
    return folder / f"{split}-{shard:05d}-of-{shards:05d}.array_record"


def records(batch: Mapping[str, Any], codes: np.ndarray) -> Iterator[dict[str, Any]]:
    """Records for `write_shard` from an evaluation batch and its codes [B, crops, N]."""
    for i in np.flatnonzero(batch["valid"]):
        label, key = int(batch["label"][i]), str(batch["key"][i])  # valid UTF-8, as msgpack wants
        yield {"codes": codes[i], "label": label, "key": key}


def write_shard(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Atomically writes a shard of records {"codes": int [crops, N], "label", "key"}."""
    if not in_bucket(path):
        for stale in path.parent.glob(f".{path.name}.*.partial"):  # left by a killed process
            stale.unlink()
    with replacing(path) as aside:
        try:
            # One record per group, because training reads records in random order.
            with contextlib.closing(ArrayRecordWriter(str(aside), "group_size:1")) as writer:
                for record in records:
                    codes = record["codes"]
                    packed = {"codes": codes.tobytes(), "type": codes.dtype.str}
                    packed["shape"] = codes.shape
                    writer.write(msgpack.packb(dict(record) | packed))
        except RuntimeError as error:  # of the C++ library
            raise OSError(errno.EIO, reason(error), str(path)) from error


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
            f"{path}: missing or damaged shard of codes ({first_line(error)}); remove it and run "
            "the same `gigatok encode` again"
        ) from None


class CodesSource:
    """One split's codes; an example is {"codes": int32 [crops, N], "label", "key"}.

    Args:
      folder: output of `gigatok encode`.
      split: one of `SPLITS`.

    Raises:
      UserError: codes are missing or incomplete, or a shard is damaged.
    """

    def __init__(self, folder: str, split: str):
        folder = as_path(folder)
        info = find_info(folder)
        if not info.images:
            raise UserError(
                f"{folder}: encoding is incomplete; the same `gigatok encode` resumes it"
            )
        if split not in info.images:
            raise UserError(f"{folder}: no codes of split {split!r}")
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
        record = self._record(range(len(self))[index])
        codes = np.frombuffer(record["codes"], record["type"]).reshape(record["shape"])
        return {
            "codes": codes.astype(np.int32),
            "label": record["label"],
            "key": record["key"],
        }

    def label(self, index: int) -> int:
        return self._record(index)["label"]

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return msgpack.unpackb(self._records[index])
        except RuntimeError as error:
            folder = self._paths[0].parent
            raise UserError(f"{folder}: record {index} is damaged: {first_line(error)}") from error

    def version(self) -> str:
        return stamp(self._paths[0].parent, [path.name for path in self._paths])
