"""Folders of ArrayRecord shards, each described by a JSON file: stored codes, packed images."""

from collections.abc import Iterable
import contextlib
import dataclasses
import errno
import re
from typing import Any

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
import msgpack

from gigatok_jax import files
from gigatok_jax.config import from_mapping
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import Path

SPLITS = ("train", "validation")
DAMAGED = re.compile("Corrupted|Truncated")  # in ArrayRecord's messages


def shard_path(folder: Path, split: str, shard: int, shards: int) -> Path:
    return folder / f"{split}-{shard:05d}-of-{shards:05d}.array_record"


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Atomically writes a shard."""
    if not files.in_bucket(path):
        for stale in path.parent.glob(f".{path.name}.*.partial"):  # left by a killed process
            stale.unlink()
    with files.replacing(path) as aside:
        try:
            # One record per group, because training reads records in random order.
            with contextlib.closing(ArrayRecordWriter(str(aside), "group_size:1")) as writer:
                for record in records:
                    writer.write(record)
        except RuntimeError as error:  # of the C++ library
            raise OSError(errno.EIO, files.reason(error), str(path)) from error


@dataclasses.dataclass(frozen=True)
class Store:
    """What a verb of the command line stores in folders of shards, and the words for messages."""

    info: type  # dataclass of the description; has the last three fields of `CodesInfo`
    file: str  # name of the description
    content: str
    verb: str
    done: str  # participle of the verb
    anew: str = ""  # how to replace what is stored

    def read_info(self, folder: Path) -> Any | None:
        """Reads the folder's description; returns None if it does not exist.

        Raises:
          UserError: the file is damaged.
        """
        path = folder / self.file
        if not path.exists():
            return None
        mapping = files.read_json(path, f"stored {self.content}")
        return from_mapping(self.info, mapping, f"{path}: info")

    def find_info(self, path: str) -> Any:
        """`read_info` of a folder that must have a description.

        Raises:
          UserError: it is missing or damaged.
        """
        folder = files.as_path(path)
        info = self.read_info(folder)
        if info is None:
            raise UserError(
                f"{folder}: no {self.file}, expected the output of `gigatok {self.verb}`"
            )
        return info

    def write_info(self, folder: Path, info: Any) -> None:
        files.write_json(folder / self.file, dataclasses.asdict(info))

    def claim(self, folder: Path, info: Any) -> None:
        """Writes the description of an incomplete folder, or checks the one that is there.

        Raises:
          UserError: the folder holds something else, or the images have changed since.
        """
        identity = dataclasses.asdict(info)
        # These have messages of their own, or none.
        for name in ("class_names", "versions", "examples", "images"):
            del identity[name]
        files.claim(folder / self.file, identity, self.content, write=False)
        old = self.read_info(folder)
        if old is None:
            if found := sorted(folder.glob("*.array_record*")):
                raise UserError(
                    f"{folder}: expected an empty folder, or one with {self.file}, found "
                    f"{found[0].name}"
                )
            self.write_info(folder, info)
            return
        for split, version in info.versions.items():
            if old.versions.get(split) != version:
                before, now = old.examples.get(split, 0), info.examples[split]
                found = f"{now} images, were {before}" if now != before else "other files, as many"
                raise UserError(
                    f"{folder}: the {split} images have changed since they were {self.done} "
                    f"({found}); {self.verb} them into another folder{self.anew}"
                )
        if old.class_names != info.class_names:
            raise UserError(
                f"{folder}: the names of the classes have changed since the images were "
                f"{self.done}; {self.verb} them into another folder{self.anew}"
            )

    def count(self, path: Path) -> int:
        """The number of records in a shard.

        Raises:
          UserError: the shard is missing or damaged.
        """
        try:
            with contextlib.closing(ArrayRecordReader(str(path))) as reader:
                return reader.num_records()
        except Exception as error:  # plain RuntimeErrors and ValueErrors from the C++ library
            raise UserError(
                f"{path}: missing or damaged shard of {self.content} ({first_line(error)}); remove "
                f"it and run the same `gigatok {self.verb}` again"
            ) from None


class ShardsSource:
    """One split of a folder of shards of msgpack records with `label` and `key`.

    Args:
      store: what the folder holds.
      folder: the folder.
      split: one of `SPLITS`.

    Raises:
      UserError: the folder is incomplete, or a shard is damaged.
    """

    def __init__(self, store: Store, folder: Path, split: str):
        info = store.find_info(folder)
        if not info.images:
            raise UserError(
                f"{folder}: not all images have been {store.done}; the same `gigatok {store.verb}` "
                "goes on"
            )
        if split not in info.images:
            raise UserError(f"{folder}: no {store.content} of split {split!r}")
        counts = info.images[split]
        self.info, self.class_names = info, info.class_names
        self._paths = [shard_path(folder, split, i, len(counts)) for i in range(len(counts))]
        for path, expected in zip(self._paths, counts, strict=True):
            if (found := store.count(path)) != expected:
                raise UserError(f"{path}: holds {found} records, expected {expected}")
        self._records = ArrayRecordDataSource(list(map(str, self._paths)))

    def __len__(self) -> int:
        return len(self._records)

    def label(self, index: int) -> int:
        return self._record(index)["label"]

    def _record(self, index: int) -> dict[str, Any]:
        try:
            return msgpack.unpackb(self._records[index])
        except RuntimeError as error:
            folder = self._paths[0].parent
            if not DAMAGED.search(str(error)):  # of the disk or the network
                raise files.unreadable(folder, error) from error
            raise UserError(f"{folder}: record {index} is damaged: {first_line(error)}") from error

    def version(self) -> str:
        return files.stamp(self._paths[0].parent, [path.name for path in self._paths])
