"""Packs a data set's image files into ArrayRecord shards, which are read fast in any order."""

from collections.abc import Callable, Sequence
import dataclasses
import logging
import math
import re
from typing import Any

import numpy as np
from tqdm import tqdm

from gigatok_jax import distributed, files
from gigatok_jax.data import parquet, shards, tars
from gigatok_jax.data import records as stored
from gigatok_jax.data.crops import BadImage
from gigatok_jax.data.encoded import EncodedSource
from gigatok_jax.data.folders import READABLE, open_folder, suffix_of
from gigatok_jax.errors import UserError
from gigatok_jax.files import Path, as_path

logger = logging.getLogger(__name__)


def pack(sources: Sequence[str], out: Path, *, to: str, holdout: int, shard_images: int) -> None:
    """Packs the training and validation images of a data set.

    Existing shards in `out` are kept; each process writes its share of the others.

    Args:
      sources: a folder of images, or files or patterns of files: tar or Parquet.
      out: directory for the shards and `info.json`, which describes them.
      to: "records", for `RecordsSource`, or "tfds", for TensorFlow Datasets; `out` is then
        `DATA_DIR/NAME/VERSION`.
      holdout: of a data set without validation images, hold out one image in so many; 0: none.
      shard_images: images per shard.

    Raises:
      UserError: an option is invalid, images are missing, or `out` holds others.
    """
    layout = FORMATS[to](out)
    splits = {
        split: open_files(sources, train=split == "train", holdout=holdout)
        for split in shards.SPLITS
    }
    versions = {split: source.version() for split, source in splits.items()}
    if len(set(versions.values())) == 1:  # the training images again, because none are held out
        del splits["validation"], versions["validation"]
    info = stored.RecordsInfo(
        format=to,
        class_names=splits["train"].class_names,
        shard_images=shard_images,
        versions=versions,
        examples={split: len(source) for split, source in splits.items()},
    )
    distributed.in_main(lambda: stored.STORE.claim(out, info))
    counts = {}
    for split, source in splits.items():
        number = math.ceil(len(source) / shard_images)
        paths = [layout.path(split, shard, number) for shard in range(number)]
        _write_missing(paths, source, shard_images, layout.record)
        distributed.barrier(f"images of {split}", working=True)
        counts[split] = tuple(stored.STORE.count(path) for path in paths)
        images = sum(counts[split])
        skipped = len(source) - images
        if distributed.is_main():
            print(f"{split}: {images} images ({skipped} could not be read) in {number} shards")
    if distributed.is_main():
        layout.finish(info.class_names, counts)
        stored.STORE.write_info(out, dataclasses.replace(info, images=counts))
        print(out)
    distributed.barrier("packed")


def open_files(sources: Sequence[str], *, train: bool, holdout: int) -> EncodedSource:
    """Opens the training or validation images of a folder, of tar files or of Parquet files."""
    if all(_has(source, tars.SUFFIXES) for source in sources):
        return tars.open_tars(sources, train, holdout)
    if all(_has(source, parquet.SUFFIXES) for source in sources):
        return parquet.open_parquet(sources, train, holdout)
    if len(sources) > 1:
        raise UserError(
            f"--from: expected one folder of images, or tar or Parquet files only, got {sources}"
        )
    return open_folder(as_path(sources[0]), train, holdout)


def _has(source: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a path or pattern is of files with these suffixes, or is a folder of them.

    Raises:
      UserError: it is a folder of such files, and of images or folders, too.
    """
    path = as_path(source)
    if not path.is_dir():
        return source.endswith(suffixes)
    archives, others = [], []
    for name, is_folder in files.scan(path):
        if name.endswith(suffixes) and not is_folder:
            archives.append(name)
        elif (is_folder and not name.startswith(".")) or suffix_of(name) in READABLE:
            others.append(f"{name}/" if is_folder else name)
    if archives and others:
        raise UserError(
            f"--from: expected a folder of images, or of {suffixes[0]} files, but {path} has "
            f"{min(archives)} and {min(others)}; move one kind, or give a pattern such as "
            f"{path}/*{suffixes[0]}"
        )
    return bool(archives)


def _write_missing(
    paths: list[Path],
    source: EncodedSource,
    shard_images: int,
    record: Callable[[dict[str, Any]], bytes],
) -> None:
    """Writes this process's share of the shards, except those that exist."""

    def records(start: int, stop: int):
        for example in source.read(start, stop):
            if isinstance(example, BadImage):
                logger.warning("skipped unreadable image: %s", example)
            else:
                yield record(example)

    process, processes = distributed.place()
    mine = np.array_split(range(len(paths)), processes)[process].tolist()
    ends = [min((shard + 1) * shard_images, len(source)) for shard in mine]
    with tqdm(
        total=sum(end - shard * shard_images for shard, end in zip(mine, ends, strict=True)),
        unit="image",
        desc="pack",
        disable=None,
    ) as bar:
        for shard, end in zip(mine, ends, strict=True):
            start = shard * shard_images
            if not paths[shard].exists():
                shards.write_shard(paths[shard], records(start, end))
            bar.update(end - start)
            if bar.disable:
                logger.info("%s", paths[shard].name)


class _Records:
    """The layout that `RecordsSource` reads."""

    def __init__(self, out: Path):
        self._out = out

    def path(self, split: str, shard: int, number: int) -> Path:
        return shards.shard_path(self._out, split, shard, number)

    record = staticmethod(stored.record)

    def finish(self, class_names: tuple[str, ...], counts: dict[str, tuple[int, ...]]) -> None:
        pass


class _Tfds:
    """The layout of TensorFlow Datasets, whose own program needs TensorFlow to write it."""

    def __init__(self, out: Path):
        path = files.real_path(out)
        self._out, self._name, self._version = out, path.parent.name, path.name
        named = re.fullmatch(r"[a-z][a-z0-9_]*", self._name)
        if not named or not re.fullmatch(r"\d+\.\d+\.\d+", self._version):
            raise UserError(
                "--out: expected DATA_DIR/NAME/VERSION with --to=tfds, such as "
                f"/data/tfds/photos/1.0.0, got {out}"
            )

    def path(self, split: str, shard: int, number: int) -> Path:
        name = f"{self._name}-{split}.array_record-{shard:05d}-of-{number:05d}"
        return self._out / name

    def record(self, example: dict[str, Any]) -> bytes:
        from tensorflow_datasets.proto import tf_example_pb2

        packed = tf_example_pb2.Example()
        features = packed.features.feature
        features["image"].bytes_list.value.append(example["image"])
        features["label"].int64_list.value.append(example["label"])
        features["file_name"].bytes_list.value.append(example["key"].encode())
        return packed.SerializeToString(deterministic=True)

    def finish(self, class_names: tuple[str, ...], counts: dict[str, tuple[int, ...]]) -> None:
        """Writes the metadata; `dataset_info.json` last, because it makes the data set complete."""
        import tensorflow_datasets as tfds

        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=class_names),
                "file_name": tfds.features.Text(),
            }
        )
        identity = tfds.core.dataset_info.DatasetIdentity(
            self._name, tfds.core.Version(self._version), str(self._out), module_name=""
        )
        info = tfds.core.DatasetInfo(
            builder=identity,
            features=features,
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )
        info.set_file_format("array_record")
        info.set_splits(tfds.core.SplitDict([self._split(*item) for item in counts.items()]))
        features.save_config(str(self._out))
        with files.replacing(self._out / "dataset_info.json") as aside:
            aside.write_text(info.as_json)

    def _split(self, split: str, counts: tuple[int, ...]) -> Any:
        import tensorflow_datasets as tfds

        paths = [self.path(split, shard, len(counts)) for shard in range(len(counts))]
        template = tfds.core.ShardedFileTemplate(
            self._out, dataset_name=self._name, split=split, filetype_suffix="array_record"
        )
        size = sum(files.size_of(path) for path in paths)
        return tfds.core.SplitInfo(split, list(counts), size, template)


FORMATS = {"records": _Records, "tfds": _Tfds}
