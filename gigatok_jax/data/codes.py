"""Stored codes of a data set: ArrayRecord shards, and `codes.json`, which says what they are."""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from array_record.python import array_record_module
import msgpack
import numpy as np

from gigatok_jax.data.indexing import checked
from gigatok_jax.errors import UserError
from gigatok_jax.files import replacing, stamp, write_json

FORMAT = 1
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class CodesInfo:
    """What a folder of codes holds.

    Attributes:
      tokenizer: fingerprint of the tokenizer's weights, see `bundles.Bundle`.
      codes: codes of one crop, N.
      codebook_size: K.
      class_names: by label.
      data: what was encoded, a `DataConfig` as a mapping.
      crop_factors: ten crops of S pixels for each: corners and centre, and their flips, of a
        centre crop of so many times S. Empty: one centre crop, as validation images always have.
      shard_images: images a shard, but for the last.
      images: split to the number of records of each shard; empty until all is encoded.
    """

    tokenizer: str
    codes: int
    codebook_size: int
    class_names: tuple[str, ...]
    data: Mapping[str, Any]
    crop_factors: tuple[float, ...]
    shard_images: int
    images: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def check(self, *, codes: int, codebook_size: int, tokenizer: str | None) -> None:
        """Refuses codes of another shape or, where one is given, of another tokenizer.

        Raises:
          UserError: they do not fit.
        """
        for name, wanted in (("codes", codes), ("codebook_size", codebook_size)):
            if getattr(self, name) != wanted:
                raise UserError(
                    f"{name} is {wanted} in the generator's model, but {getattr(self, name)} in "
                    "the stored codes"
                )
        if tokenizer not in (None, self.tokenizer):
            raise UserError("the stored codes are those of another tokenizer than the generator's")


def shard_path(folder: Path, split: str, shard: int, shards: int) -> Path:
    return folder / f"{split}-{shard:05d}-of-{shards:05d}.array_record"


def read_info(folder: Path) -> CodesInfo | None:
    """The folder's `codes.json`, or None where there is none.

    Raises:
      UserError: it is not what `write_info` writes.
    """
    path = folder / "codes.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        if record.pop("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        record["images"] = {split: tuple(n) for split, n in record["images"].items()}
        for name in ("class_names", "crop_factors"):
            record[name] = tuple(record[name])
        return CodesInfo(**record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a description of codes ({error})") from None


def find_info(path: str) -> CodesInfo:
    """`read_info` of a path that a user gave.

    Raises:
      UserError: there are no codes.
    """
    folder = Path(path).expanduser()
    info = read_info(folder)
    if info is None:
        raise UserError(f"{folder}: no codes.json, expected what `gigatok encode` writes")
    return info


def write_info(folder: Path, info: CodesInfo) -> None:
    write_json(folder / "codes.json", {"format": FORMAT} | dataclasses.asdict(info))


def write_shard(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes {"codes": integers [crops, N], "label": int, "key": str} each, or nothing at all."""
    for stale in path.parent.glob(f".{path.name}.*.partial"):  # of a process that was killed
        stale.unlink()
    with replacing(path) as aside:
        # Groups of one record: each is read by itself, in random order.
        writer = array_record_module.ArrayRecordWriter(str(aside), "group_size:1")
        with contextlib.closing(writer):
            for record in records:
                codes = record["codes"]
                packed = {"codes": codes.tobytes(), "type": codes.dtype.str, "shape": codes.shape}
                writer.write(msgpack.packb(dict(record) | packed))


def _damaged(path: Path, error: Exception) -> UserError:
    reason = (str(error).splitlines() or ["unreadable"])[0]
    return UserError(
        f"{path}: missing or damaged shard of codes ({reason}); remove it, and the same "
        "`gigatok encode` writes it anew"
    )


def count(path: Path) -> int:
    """Number of a shard's records.

    Raises:
      UserError: it is missing or damaged.
    """
    try:
        with contextlib.closing(array_record_module.ArrayRecordReader(str(path))) as reader:
            return reader.num_records()
    except Exception as error:  # plain RuntimeErrors and ValueErrors of the C++ library
        raise _damaged(path, error) from None


class CodesSource:
    """One split's codes; an example is {"codes": int32 [crops, N], "label", "key"}.

    Args:
      folder: path of what `gigatok encode` wrote.
      split: one of `SPLITS`.

    Raises:
      UserError: there are no codes, not all of them, or a shard is damaged.
    """

    def __init__(self, folder: str, split: str):
        folder = Path(folder).expanduser()
        info = find_info(folder)
        if not info.images:
            raise UserError(f"{folder}: encoding has not ended; the same `gigatok encode` goes on")
        if split not in info.images:
            raise UserError(f"{folder}: has no codes of split {split!r}")
        counts = info.images[split]
        self.info, self.class_names, self.codes = info, info.class_names, info.codes
        self._ends = np.cumsum(counts)
        self._paths = [shard_path(folder, split, i, len(counts)) for i in range(len(counts))]
        for path, expected in zip(self._paths, counts, strict=True):
            if (found := count(path)) != expected:
                raise UserError(f"{path}: holds {found} records, expected {expected}")
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = checked(index, len(self))
        shard = int(np.searchsorted(self._ends, index, side="right"))
        place = index - (self._ends[shard - 1] if shard else 0)
        if shard not in self._readers:
            path = os.fspath(self._paths[shard])
            self._readers[shard] = array_record_module.ArrayRecordReader(path)
        try:
            (record,) = self._readers[shard].read([int(place)])
        except RuntimeError as error:
            raise _damaged(self._paths[shard], error) from error
        record = msgpack.unpackb(record)
        codes = np.frombuffer(record["codes"], record["type"]).reshape(record["shape"])
        example = {name: record[name] for name in ("label", "key")}
        return example | {"codes": codes.astype(np.int32)}

    def version(self) -> str:
        return stamp(self._paths[0].parent, [path.name for path in self._paths])


def records(batch: Mapping[str, Any], codes: np.ndarray) -> Iterator[dict[str, Any]]:
    """What `write_shard` takes, of an evaluation batch and its codes `[B, crops, N]`."""
    for i in np.flatnonzero(batch["valid"]):
        label, key = int(batch["label"][i]), str(batch["key"][i])
        yield {"codes": codes[i], "label": label, "key": key}
