"""Images in Parquet files, as the Hugging Face Hub has them, for `gigatok pack`."""

from collections.abc import Iterable, Iterator
import itertools
import json
from typing import Any

import numpy as np

from gigatok_jax import files
from gigatok_jax.data import crops
from gigatok_jax.data.encoded import EncodedSource, choose_split, part, split_files
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import Path

SUFFIXES = (".parquet",)


def import_pyarrow():
    """Imports PyArrow's module for Parquet, or raises UserError."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet needs PyArrow: pip install 'gigatok_jax[parquet]'") from error
    return pyarrow.parquet


class ParquetSource(EncodedSource):
    """The labelled rows of Parquet files.

    A file has the columns `image`, struct<bytes, path>, and `label`, an integer. The metadata that
    the Hub's `datasets` writes name the classes; without them, numbers do. Rows whose label is
    missing or below zero do not count. Keys are the images' paths.

    Args:
      root: folder of the files.
      names: of the files, relative to it.
      held, holdout: see `encoded.part`.

    Raises:
      UserError: a file is damaged, or lacks a column, or has other classes than the first.
    """

    def __init__(self, root: Path, names: list[str], held: bool | None, holdout: int):
        self._root, self._names, self._held, self._holdout = root, names, held, holdout
        self._groups: list[tuple[Path, int]] = []  # row groups
        rows, keys, classes = [], [], None
        for name in names:
            file, listed = _open(root / name)
            if classes not in (None, listed):
                raise UserError(f"{root / name}: expected the classes of {names[0]}, found others")
            classes = listed
            for number in range(file.num_row_groups):
                try:
                    table = _read_group(file, root / name, number, ["image.path", "label"])
                except crops.BadImage as error:
                    raise UserError(str(error)) from error
                group, count = len(self._groups), len(table)
                labels = table["label"].fill_null(-1).to_numpy()
                rows.append(np.stack([np.full(count, group), np.arange(count), labels], 1))
                paths = enumerate(each and each["path"] for each in table["image"].to_pylist())
                keys += [path or f"{name}/{number}/{row}" for row, path in paths]
                self._groups.append((root / name, number))
        rows = np.concatenate(rows) if rows else np.zeros((0, 3), int)  # group, row in it, label
        keep = part(keys, held, holdout) & (rows[:, 2] >= 0)
        last = int(rows[:, 2].max(initial=-1))
        self.class_names = classes or tuple(map(str, range(last + 1)))
        if last >= len(self.class_names):
            raise UserError(
                f"{root}: expected labels from 0 to {len(self.class_names) - 1}, got {last}"
            )
        self._rows, self._keys = rows[keep], list(itertools.compress(keys, keep))

    def __len__(self) -> int:
        return len(self._keys)

    def encoded(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        (example,) = self.read(index, index + 1)
        if isinstance(example, crops.BadImage):
            raise example
        return example

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | crops.BadImage]:
        for group, rows in itertools.groupby(range(start, stop), lambda i: self._rows[i, 0]):
            path, number = self._groups[group]
            file, _ = _open(path)
            try:
                images = _read_group(file, path, number, ["image.bytes"])["image"]
            except crops.BadImage as error:
                yield from (crops.BadImage(f"{self._keys[index]}: {error}") for index in rows)
                continue
            for index in rows:
                _, row, label = self._rows[index].tolist()
                image = images[row].as_py()
                if image is None or image["bytes"] is None:
                    yield crops.BadImage(f"{self._keys[index]}: {path} has no bytes of it")
                else:
                    key = self._keys[index]
                    yield {"image": image["bytes"], "label": label, "key": key}

    def version(self) -> str:
        stamp = files.stamp(self._root, self._names)
        return stamp if self._held is None else f"{self._held} 1/{self._holdout} of {stamp}"


def open_parquet(patterns: Iterable[str], train: bool, holdout: int) -> ParquetSource:
    """Opens the training or evaluation images of Parquet files; see `tars.open_tars`.

    Raises:
      UserError: there are no files or images, or see `ParquetSource`.
    """
    root, names = files.find(patterns, SUFFIXES)
    splits = split_files(names)
    split, held = choose_split(splits, train, holdout)
    source = ParquetSource(root, splits.get(split, []), held, holdout)
    if not len(source):
        raise UserError(f"{root}: no labelled images of split {split!r}")
    return source


def _read_group(file: Any, path: Path, number: int, columns: list[str]) -> Any:
    """The table of a row group.

    Raises:
      BadImage: it is damaged.
      OSError: the disk or the network failed.
    """
    try:
        return file.read_row_group(number, columns=columns)
    except Exception as error:
        if not _is_damage(path, error):
            raise files.unreadable(path, error) from error
        raise crops.BadImage(
            f"{path}: row group {number} is damaged: {first_line(error)}"
        ) from error


def _is_damage(path: Path, error: Exception) -> bool:
    """Whether PyArrow understands the content of a file no more; else, it could not read it."""
    import pyarrow

    # It raises OSErrors for damaged pages too, but without a number, as buckets do for others.
    unnumbered = type(error) is OSError and error.errno is None and not files.in_bucket(path)
    return unnumbered or isinstance(error, pyarrow.ArrowException)


def _open(path: Path) -> tuple[Any, tuple[str, ...]]:
    """A Parquet file, and the names of its classes, or none."""
    parquet = import_pyarrow()
    import pyarrow

    try:
        file = parquet.ParquetFile(path.open("rb") if files.in_bucket(path) else path)
    except Exception as error:
        if not _is_damage(path, error):
            raise
        raise UserError(f"{path}: expected a Parquet file: {first_line(error)}") from None
    found = {field.name: field.type for field in file.schema_arrow}
    image, label = found.get("image", pyarrow.null()), found.get("label", pyarrow.null())
    fields = {field.name for field in image} if pyarrow.types.is_struct(image) else set()
    if not {"bytes", "path"} <= fields or not pyarrow.types.is_integer(label):
        raise UserError(
            f"{path}: expected the columns image, struct<bytes, path>, and label, an integer, "
            f"found {', '.join(f'{name}: {kind}' for name, kind in found.items()) or 'none'}"
        )
    try:
        metadata = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])
        return file, tuple(metadata["info"]["features"]["label"]["names"])
    except (ValueError, KeyError, TypeError):
        return file, ()
