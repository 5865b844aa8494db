"""Where labelled images come from: files of several kinds, drawings, or stored codes.

A source gives random access: `source[i]` is a dict of `image` (a Pillow image in mode RGB, or uint8
[H, W, 3]) or `codes` (int32 [crops, N]), `label` (int) and `key` (str, the example's name). Sources
are pickled for worker processes, so pickles must be small: file names, or the arguments with which
`__reduce__` opens the files again.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import os
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import pydantic
from pydantic import NonNegativeInt, PositiveInt

from gigatok_jax.config import configclass
from gigatok_jax.data import codes, crops
from gigatok_jax.data.drawings import VERSION, EmbeddedSource
from gigatok_jax.data.folders import open_folder
from gigatok_jax.data.records import RecordsSource
from gigatok_jax.data.tars import open_tars
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import as_path, real_path, scan, stamp

MOST_LABELS = 100_000  # examples to look at for `missing_classes`
FILE_NAME_FEATURES = ("file_name", "filename", "image/filename")

# Changing any field but these makes stored codes and results of probes stale.
NOT_CONTENT = ("workers", "prefetch", "max_bad_share", "resize")

Example = dict[str, Any]


@configclass
class DataConfig:
    """Which images to read, and how."""

    # "tar": webdataset shards, or ImageNet's own tar files. "records": output of `gigatok pack`.
    # "embedded": drawings, generated on the fly. "codes": output of `gigatok encode`.
    source: Literal["tfds", "folder", "tar", "records", "embedded", "codes"] = "tfds"

    # The folder; tar: the folder, or a pattern such as "/data/photos-{train,val}-*.tar"; tfds:
    # `data_dir`, where "" is TFDS's default.
    path: str = ""
    name: str = "imagenet2012"  # tfds: `builder[/config][:version]`
    split: str = "train"  # tfds: training split or a slice of it, such as "train[:90%]"
    eval_split: str = "validation"  # tfds: likewise, for evaluation

    # A folder without train/ and val/, or tar files without these words in their names: hold out
    # one image in n for evaluation. A hash of its name decides, so that adding images holds out
    # none that was trained on. 0: the training images.
    holdout: NonNegativeInt = 20

    # Use only n examples, chosen at random, always the same; 0 means all. Embedded: the number of
    # drawings, at least 1.
    length: NonNegativeInt = 0
    eval_length: NonNegativeInt = 0  # likewise, for evaluation

    # Worker processes that read and crop; each keeps about one core busy. 0 uses threads of this
    # process, one per core, which is best up to about eight cores.
    workers: NonNegativeInt = 0
    prefetch: PositiveInt = 2  # batches kept ready, per worker process if any

    # How training crops are resized, after halving: "bicubic", as in the reference, or "linear",
    # with OpenCV, which reads 1.3 times as many photos per second. It does not antialias, so photos
    # of up to twice the crop's size show harsher detail.
    resize: crops.Resize = "bicubic"

    # How images for evaluation are resized, before the center crop: as by ADM (GigaTok, LlamaGen),
    # "bicubic" (TiTok) or "linear" (Open-MAGVIT2, IBQ). It is part of a protocol: published numbers
    # of a tokenizer hold for the resizing of its authors.
    eval_resize: crops.CenterResize = "adm"

    # A run fails if a larger share of its images cannot be read.
    max_bad_share: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.05

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.holdout == 1:
            raise ValueError("holdout: expected 0 or at least 2, got 1")
        required = {
            "tfds": ("name", "split", "eval_split"),
            "folder": ("path",),
            "tar": ("path",),
            "records": ("path",),
            "embedded": ("length", "eval_length"),
            "codes": ("path",),
        }
        for name in required.get(self.source, ()):
            value = getattr(self, name)
            if not value:
                expected = "at least 1" if value == 0 else "a value"
                raise ValueError(
                    f"{name}: expected {expected} with source={self.source!r}, got {value!r}"
                )
        return self

    def content(self) -> dict[str, Any]:
        """The fields that determine the examples, without those of how to read them."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in NOT_CONTENT}
        if self.eval_resize == "adm":  # older records do not have the field
            del fields["eval_resize"]
        return fields

    @property
    def described(self) -> str:
        """The name of the data set, for readers."""
        if self.source == "embedded":
            return f"drawings, version {VERSION}"
        return self.name if self.source == "tfds" else real_path(as_path(self.path)).name


class Source(Protocol):
    """Random access to labelled images or their codes.

    The training and evaluation sources of a configuration have the same `class_names`, and every
    label is in [0, len(class_names)). Threads and worker processes read a source concurrently.
    """

    class_names: tuple[str, ...]  # by label
    codes: int  # number of codes per image; 0: examples have images

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Raises IndexError beyond the end, and BadImage for an unreadable image."""

    def label(self, index: int) -> int:
        """The label of an example, without decoding its image."""

    def version(self) -> str:
        """Key for cached results: changes with the examples or their files; decodes nothing."""


class Shuffled:
    """Some or all examples of a source, in a random order that is always the same.

    Sources are sorted by class, so their first examples would be those of a few classes.
    """

    def __init__(self, source: Source, length: int = 0):
        self._source, self._length = source, length or len(source)
        self.class_names, self.codes = source.class_names, source.codes
        self._order = np.random.default_rng(0).permutation(len(source))[: self._length]

    def __reduce__(self):
        return Shuffled, (self._source, self._length)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._order[range(self._length)[index]])]

    def label(self, index: int) -> int:
        return self._source.label(int(self._order[index]))

    def version(self) -> str:
        return f"{self._source.version()} shuffled {self._length}"


class TfdsSource:
    """One split of a data set that TFDS prepared as ArrayRecord; does not import TensorFlow.

    Args:
      folder: the prepared version, which holds `dataset_info.json`.
      split: name or slice.
    """

    codes = 0

    def __init__(self, folder: str, split: str):
        import tensorflow_datasets as tfds

        self.folder, self.split = folder, split
        builder = tfds.builder_from_directory(folder)
        keys = builder.info.supervised_keys or ("image", "label")
        self._image_key, self._label_key = keys[0], keys[-1]
        features = dict(builder.info.features.items())
        image, label = features.get(self._image_key), features.get(self._label_key)
        if not isinstance(image, tfds.features.Image):
            raise UserError(
                f"{folder}: expected a data set for image classification, found no images"
            )
        if not isinstance(label, tfds.features.ClassLabel):
            raise UserError(
                f"{folder}: expected a data set for image classification, found no classes"
            )
        self.class_names = tuple(label.names or map(str, range(label.num_classes)))
        # TFDS must not decode images: `crops.load` decodes those of all sources alike.
        self._records = builder.as_data_source(
            split, decoders={self._image_key: tfds.decode.SkipDecoding()}
        )

    def __reduce__(self):
        return TfdsSource, (self.folder, self.split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        record = self._records[index]
        named = (record[name] for name in FILE_NAME_FEATURES if record.get(name))
        key = next(named, f"{self.split}/{index}")
        key = key.decode(errors="replace") if isinstance(key, bytes) else key
        try:
            image = crops.load(record[self._image_key])
        except crops.BadImage as error:
            raise crops.BadImage(f"{key}: {error}") from error
        return {"image": image, "label": int(record[self._label_key]), "key": key}

    def label(self, index: int) -> int:
        return int(self._records[index][self._label_key])

    def version(self) -> str:
        folder = as_path(self.folder)
        names = sorted(name for name, is_folder in scan(folder) if not is_folder)
        return f"{self.split} of {stamp(folder, names)}"


def _open_tfds(config: DataConfig, train: bool, image_size: int) -> Source:
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(config.path) or None
    try:
        builder = tfds.builder(config.name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        raise UserError(
            f"config.data.name: expected a TFDS data set, got {config.name!r}: {first_line(error)}"
        ) from error
    quoted = f'"{data_dir}"' if data_dir else "None"
    how = (
        "prepare it with: python -c 'import tensorflow_datasets as tfds; "
        f'tfds.builder("{config.name}", data_dir={quoted}, '
        'file_format="array_record").download_and_prepare()\''
    )
    if builder.name == "imagenet2012":
        how = "see docs/data.md"
    if not builder.is_prepared():
        raise UserError(f"{config.name} is not prepared in {builder.data_dir}; {how}")
    split = config.split if train else config.eval_split
    try:
        return TfdsSource(str(builder.data_dir), split)
    except NotImplementedError as error:
        raise UserError(
            f"{config.name} in {builder.data_dir} is prepared as {builder.info.file_format.value}, "
            f"expected array_record; in another folder, {how}"
        ) from error
    except ValueError as error:
        splits = ", ".join(builder.info.splits)
        raise UserError(f"{config.name} has no split {split!r}, expected {splits}") from error


def _open_embedded(config: DataConfig, train: bool, image_size: int) -> Source:
    # Training crops enlarge images by up to 5/4, which would blur drawings of the final size.
    if train:
        return EmbeddedSource(config.length, image_size * 5 // 4, "train")
    return EmbeddedSource(config.eval_length, image_size, "validation")


OPENERS: dict[str, Callable[[DataConfig, bool, int], Source]] = {
    "tfds": _open_tfds,
    "folder": lambda config, train, image_size: open_folder(
        as_path(config.path), train, config.holdout
    ),
    "tar": lambda config, train, image_size: open_tars([config.path], train, config.holdout),
    "records": lambda config, train, image_size: RecordsSource(config.path, train),
    "embedded": _open_embedded,
    "codes": lambda config, train, image_size: codes.CodesSource(
        config.path, "train" if train else "validation"
    ),
}


def open_source(config: DataConfig, *, train: bool, image_size: int) -> Source:
    """Opens the training or the evaluation examples that a configuration names.

    Args:
      config: what to open.
      train: True for the training examples, False for those for evaluation.
      image_size: side of the crops in pixels; only drawings depend on it.

    Returns:
      The source, with at least one example.

    Raises:
      UserError: the source is missing, empty, not prepared, or shorter than configured.
    """
    source = OPENERS[config.source](config, train, image_size)
    length = config.length if train else config.eval_length
    if length > len(source):
        field = "length" if train else "eval_length"
        raise UserError(
            f"config.data.{field}: expected at most the {len(source)} examples, got {length}; "
            "0 takes all of them"
        )
    return Shuffled(source, length) if 0 < length < len(source) else source


def missing_classes(source: Source) -> tuple[int, ...]:
    """The labels of which a source has no example.

    Reads examples until it has seen all labels. Of a source of which `MOST_LABELS` examples do not
    show them all, none counts as missing: to read the others would take too long.
    """
    missing = set(range(len(source.class_names)))
    order = np.random.default_rng(0).permutation(len(source))[:MOST_LABELS]
    with ThreadPoolExecutor(16) as threads:
        for start in range(0, len(order), 1024):
            if not missing:
                break
            some = order[start : start + 1024].tolist()
            missing.difference_update(threads.map(source.label, some))
    return tuple(sorted(missing)) if len(order) == len(source) else ()
