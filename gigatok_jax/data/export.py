"""Stored codes as one file per split, for other programs."""

from collections.abc import Iterator
import itertools
import pathlib
from typing import Any
import zipfile

import numpy as np

from gigatok_jax import files
from gigatok_jax.data.codes import STORE, CodesSource
from gigatok_jax.data.parquet import import_pyarrow

ROWS = 1024  # images in memory at a time


def export(folder: files.Path, format: str) -> None:
    """Writes `train` and `validation` files beside the shards of codes, unless they are there.

    Args:
      folder: output of `gigatok encode`.
      format: "parquet": a row per crop with `codes`, list<int32>; `label`, int64; `key`, string;
        and `crop`, int32, its number. "npz": the arrays `codes`, int [images, crops, N], of the
        type that is stored; `labels`, int64 [images]; and `keys`, str [images].
    """
    for split in STORE.find_info(str(folder)).images:
        path = folder / f"{split}.{format}"
        if not path.exists():
            with files.replacing(path) as aside:
                FORMATS[format](aside, CodesSource(str(folder), split))


def _batches(source: CodesSource) -> Iterator[list[dict[str, Any]]]:
    examples = (source[i] for i in range(len(source)))
    while batch := list(itertools.islice(examples, ROWS)):
        yield batch


def _write_parquet(path: pathlib.Path, source: CodesSource) -> None:
    parquet = import_pyarrow()
    import pyarrow

    columns = {"codes": pyarrow.list_(pyarrow.int32()), "label": pyarrow.int64()}
    columns |= {"key": pyarrow.string(), "crop": pyarrow.int32()}
    schema = pyarrow.schema(columns)
    with parquet.ParquetWriter(path, schema) as writer:
        for batch in _batches(source):
            codes = np.concatenate([example["codes"] for example in batch])  # [crops, N]
            crops = [len(example["codes"]) for example in batch]
            ends = pyarrow.array(np.arange(len(codes) + 1, dtype=np.int32) * source.codes)
            arrays = [
                pyarrow.ListArray.from_arrays(ends, pyarrow.array(codes.ravel())),
                pyarrow.array(np.repeat([example["label"] for example in batch], crops)),
                pyarrow.array(np.repeat([example["key"] for example in batch], crops)),
                pyarrow.array(np.concatenate([np.arange(n, dtype=np.int32) for n in crops])),
            ]
            writer.write_table(pyarrow.table(arrays, schema=schema))


def _write_npz(path: pathlib.Path, source: CodesSource) -> None:
    """The codes of all images may exceed the memory, so they are written in parts."""
    first = source[0]["codes"]
    dtype = np.dtype(np.uint16 if source.info.codebook_size <= 2**16 else np.int32)
    shape = (len(source), *first.shape)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    labels, keys = [], []
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open(zipfile.ZipInfo("codes.npy"), "w", force_zip64=True) as file:
            np.lib.format.write_array_header_2_0(file, header)
            for batch in _batches(source):
                file.write(np.stack([each["codes"] for each in batch]).astype(dtype).tobytes())
                labels += [each["label"] for each in batch]
                keys += [each["key"] for each in batch]
        for name, array in (("labels", np.array(labels, np.int64)), ("keys", np.array(keys))):
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


FORMATS = {"parquet": _write_parquet, "npz": _write_npz}
