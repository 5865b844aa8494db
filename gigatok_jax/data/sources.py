"""Where labelled images come from: folders, TensorFlow Datasets, drawings, or stored codes.

A source gives random access: `source[i]` is a dict of `image` (RGB image or uint8 [H, W, 3]) or
`codes`, `label` (int) and `key` (str, names the example), and raises `BadImage` for a broken file.
Sources travel to worker processes by pickling, so they hold little and open files on first use.
"""

from collections.abc import Callable
import dataclasses
import os
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from gigatok_jax.config import from_mapping
from gigatok_jax.data import codes, crops, drawings, folders
from gigatok_jax.data.indexing import checked
from gigatok_jax.errors import UserError
from gigatok_jax.files import stamp

FILE_NAME_FEATURES = ("file_name", "filename", "image/filename")

Example = dict[str, Any]


# Fields of `DataConfig` that are about the reading, or about training crops.
NOT_CONTENT = ("workers", "prefetch", "max_bad_share", "resize")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are read.

    Attributes:
        source: "tfds", "folder", "embedded" or "codes".
        path: folder: its root; codes: what `gigatok encode` wrote; tfds: the `data_dir`, "" means
            TFDS's default.
        name: tfds: `builder[/config][:version]`.
        split: tfds: training split, slices such as "train[:90%]" included.
        eval_split: tfds: evaluation split.
        holdout: folder without `train/` and `val/`: one image in so many, in sorted order, is
            kept for evaluation and left out of training; 0 evaluates on the training images.
        length: use only the first so many training examples, 0 means all; embedded: how many
            are drawn, at least 1.
        eval_length: the same for evaluation.
        workers: processes that read and crop; 0 means threads of this process, one a core, which
            is right up to about eight cores. Each worker keeps about one core busy.
        prefetch: batches that are kept ready, in each worker process if there are any.
        resize: of training crops, after halving: "bicubic", as the reference has it; or "linear",
            by OpenCV, with which a core reads 1.3 times as many photos. It does not antialias:
            photos of up to twice the crop's size show fine detail more harshly.
        max_bad_share: share of unreadable images, in [0, 1], above which the run ends.
    """

    source: str = "tfds"
    path: str = ""
    name: str = "imagenet2012"
    split: str = "train"
    eval_split: str = "validation"
    holdout: int = 20
    length: int = 0
    eval_length: int = 0
    workers: int = 0
    prefetch: int = 2
    resize: str = "bicubic"
    max_bad_share: float = 0.05

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if not isinstance(value, (float, int) if kind is float else kind) or value is True:
                raise ValueError(f"{field.name} is {value!r}, expected {kind.__name__}")
        if self.source not in OPENERS:
            raise ValueError(f"source is {self.source!r}, expected one of {', '.join(OPENERS)}")
        if self.resize not in crops.RESIZES:
            raise ValueError(
                f"resize is {self.resize!r}, expected one of {', '.join(crops.RESIZES)}"
            )
        least = {"length": 0, "eval_length": 0, "workers": 0, "prefetch": 1}
        if self.source == "embedded":
            least |= {"length": 1, "eval_length": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {bound}")
        if self.holdout < 0 or self.holdout == 1:
            raise ValueError(f"holdout is {self.holdout}, expected 0 or at least 2")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}, expected a share in [0, 1]")
        required = {
            "folder": ("path",),
            "codes": ("path",),
            "tfds": ("name", "split", "eval_split"),
        }
        for name in required.get(self.source, ()):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, but source is {self.source!r}")

    def content(self) -> dict[str, Any]:
        """The fields that decide what is read, not those that decide how."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in NOT_CONTENT}


def data_config(config: ConfigDict) -> DataConfig:
    """The `data` of any run's configuration.

    Raises:
        UserError: it has none, or a wrong one.
    """
    if "data" not in config:
        raise UserError("config.data: missing, expected what a training run's configuration has")
    return from_mapping(DataConfig, config.to_dict()["data"], "config.data")


class Source(Protocol):
    """Random access to labelled images, or their codes; `class_names[label]` names a class.

    `codes` is the number of codes an image; 0: an example has an image.
    """

    class_names: tuple[str, ...]
    codes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def version(self) -> str:
        """Text that differs where the examples do, or their files; nothing is decoded for it."""


def open_source(config: DataConfig, *, train: bool, image_size: int) -> Source:
    """Opens the training or the evaluation examples that a configuration names.

    Args:
        config: what to open.
        train: the training examples, else those for evaluation.
        image_size: side in pixels that crops will have; only drawings depend on it.

    Returns:
        The source, of at least one example.

    Raises:
        UserError: it is missing, empty, not prepared or shorter than the configuration asks.
    """
    source = OPENERS[config.source](config, train, image_size)
    length = config.length if train else config.eval_length
    if length > len(source):
        field = "length" if train else "eval_length"
        raise UserError(f"data.{field} is {length}, but there are {len(source)} examples")
    return _First(source, length) if 0 < length < len(source) else source


class _First:
    """The first `length` examples of a source."""

    def __init__(self, source: Source, length: int):
        self._source, self._length = source, length
        self.class_names, self.codes = source.class_names, source.codes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return self._source[checked(index, self._length)]

    def version(self) -> str:
        return f"{self._source.version()} first {self._length}"


class EmbeddedSource(drawings.EmbeddedSource):
    """The drawings, as a source with class names."""

    class_names = drawings.CLASS_NAMES
    codes = 0

    def version(self) -> str:
        return f"drawings {drawings.VERSION}: {self}"


def _open_embedded(config: DataConfig, train: bool, image_size: int) -> Source:
    # Training crops enlarge by up to 5/4, which would blur drawings of the final size.
    if train:
        return EmbeddedSource(config.length, image_size * 5 // 4, "train")
    return EmbeddedSource(config.eval_length, image_size, "validation")


class TfdsSource:
    """One split of a data set that TFDS prepared as ArrayRecord; imports no TensorFlow.

    Args:
        folder: of the prepared version, holds `dataset_info.json`.
        split: name or slice.
    """

    codes = 0

    def __init__(self, folder: str, split: str):
        self.folder, self.split = folder, split
        self._open()

    def _open(self):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self.folder)
        keys = builder.info.supervised_keys or ("image", "label")
        self._image_key, self._label_key = keys[0], keys[-1]
        features = dict(builder.info.features.items())
        image, label = features.get(self._image_key), features.get(self._label_key)
        if not isinstance(image, tfds.features.Image):
            raise UserError(f"{self.folder}: no feature of images, expected image classification")
        if not isinstance(label, tfds.features.ClassLabel):
            raise UserError(f"{self.folder}: no feature of classes, expected image classification")
        names = label.names
        self.class_names = tuple(names or map(str, range(label.num_classes)))
        # The bytes go through `crops.load`, like those of any other source.
        self._records = builder.as_data_source(
            self.split, decoders={self._image_key: tfds.decode.SkipDecoding()}
        )

    def __getstate__(self) -> dict[str, str]:
        return {"folder": self.folder, "split": self.split}

    def __setstate__(self, state: dict[str, str]):
        self.__init__(**state)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        index = checked(index, len(self))
        record = self._records[index]
        named = (record[name] for name in FILE_NAME_FEATURES if record.get(name))
        key = next(named, f"{self.split}/{index}")
        key = key.decode(errors="replace") if isinstance(key, bytes) else key
        try:
            image = crops.load(record[self._image_key])
        except crops.BadImage as error:
            raise crops.BadImage(f"{key}: {error}") from error
        return {"image": image, "label": int(record[self._label_key]), "key": key}

    def version(self) -> str:
        names = sorted(entry.name for entry in os.scandir(self.folder) if entry.is_file())
        return f"{self.split} of {stamp(Path(self.folder), names)}"


def _open_tfds(config: DataConfig, train: bool, image_size: int) -> Source:
    del image_size
    import tensorflow_datasets as tfds

    data_dir = os.path.expanduser(config.path) or None
    try:
        builder = tfds.builder(config.name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data.name is {config.name!r}, unknown to TFDS: {reason}") from error
    how = (
        "prepare it by: python -c 'import tensorflow_datasets as tfds; "
        f'tfds.builder("{config.name}", data_dir={_quoted(data_dir)}, '
        'file_format="array_record").download_and_prepare()\''
    )
    if builder.name == "imagenet2012":
        how = "see ImageNet in the README"
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


def _open_folder(config: DataConfig, train: bool, image_size: int) -> Source:
    del image_size
    return folders.open_folder(Path(config.path).expanduser(), train, config.holdout)


def _open_codes(config: DataConfig, train: bool, image_size: int) -> Source:
    del image_size
    return codes.CodesSource(config.path, codes.SPLITS[0 if train else 1])


def _quoted(text: str | None) -> str:
    return "None" if text is None else f'"{text}"'


OPENERS: dict[str, Callable[[DataConfig, bool, int], Source]] = {
    "tfds": _open_tfds,
    "folder": _open_folder,
    "embedded": _open_embedded,
    "codes": _open_codes,
}
