"""Where labelled images come from: folders, TensorFlow Datasets, drawings, or stored codes.

A source gives random access: `source[i]` is a dict of `image` (RGB image or uint8 [H, W, 3]) or
`codes`, `label` (int) and `key` (str, names the example), and raises `BadImage` for a broken file.
Sources travel to worker processes by pickling, so they hold little and open files on first use.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import logging
import operator
import os
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict
import numpy as np

from gigatok_jax.config import from_mapping
from gigatok_jax.data import codes, embedded, images
from gigatok_jax.errors import UserError

logger = logging.getLogger(__name__)

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".ppm", ".pnm"),
)
FILE_NAME_FEATURES = ("file_name", "filename", "image/filename")

Example = dict[str, Any]


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
    max_bad_share: float = 0.05

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), field.type
            if not isinstance(value, (float, int) if kind is float else kind) or value is True:
                raise ValueError(f"{field.name} is {value!r}, expected {kind.__name__}")
        if self.source not in OPENERS:
            raise ValueError(f"source is {self.source!r}, expected one of {', '.join(OPENERS)}")
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
        fields = dataclasses.asdict(self)
        return {
            k: v for k, v in fields.items() if k not in ("workers", "prefetch", "max_bad_share")
        }


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


def _checked(index: int, length: int) -> int:
    index = operator.index(index)
    if not 0 <= index < length:
        raise IndexError(f"index {index} is outside [0, {length})")
    return index


class _First:
    """The first `length` examples of a source."""

    def __init__(self, source: Source, length: int):
        self._source, self._length = source, length
        self.class_names, self.codes = source.class_names, source.codes

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return self._source[_checked(index, self._length)]


class EmbeddedSource(embedded.EmbeddedSource):
    """The drawings, as a source with class names."""

    class_names = embedded.CLASS_NAMES
    codes = 0


def _open_embedded(config: DataConfig, train: bool, image_size: int) -> Source:
    # Training crops enlarge by up to 5/4, which would blur drawings of the final size.
    if train:
        return EmbeddedSource(config.length, image_size * 5 // 4, "train")
    return EmbeddedSource(config.eval_length, image_size, "validation")


class FolderSource:
    """Images below the class sub-folders of a folder, sorted by class, then by path.

    Names are kept as one string with offsets: a million of them cost 30 MB and pickle at once.

    Args:
        root: the folder; keys are paths relative to it.
        files: for each class, in the order of labels, paths relative to `root`.
        class_names: one a class.
    """

    codes = 0

    def __init__(self, root: Path, files: Sequence[Sequence[str]], class_names: Sequence[str]):
        self.root, self.class_names = root, tuple(class_names)
        names = [os.fsencode(name) for group in files for name in group]
        self._text = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self._class_ends = np.cumsum([len(group) for group in files], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Example:
        index = _checked(index, len(self))
        start = self._ends[index - 1] if index else 0
        key = os.fsdecode(self._text[start : self._ends[index]])
        try:
            image = images.load(self.root / key)
        except images.BadImage as error:
            raise images.BadImage(f"{key}: {error}") from error
        label = int(np.searchsorted(self._class_ends, index, side="right"))
        return {"image": image, "label": label, "key": key}


def _is_image(name: str) -> bool:
    """Tells by the extension, as opening a million files would take too long."""
    return name[0] != "." and os.path.splitext(name)[1].lower() in EXTENSIONS


def _walk(root: Path, below: str) -> Iterator[str]:
    """Paths, relative to `root`, of the images in its sub-folder `below` ("": all of it).

    What has no image's extension, or is hidden, does not count. Links are followed.
    """
    pending = [below]
    while pending:
        folder = pending.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name[0] != "." and entry.is_dir():
                    pending.append(path)
                elif _is_image(entry.name):
                    yield path


def image_paths(path: Path) -> list[Path]:
    """The image file at `path`, or the images in the folder and under it, sorted.

    Raises:
        UserError: there is nothing, or no image.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder, expected images")
    found = [path / name for name in sorted(_walk(path, ""))]
    if not found:
        raise UserError(f"{path}: no images in it")
    return found


def _classes(root: Path, split: str) -> dict[str, list[str]]:
    """Images [relative to `root`] by class, for the classes that have any."""
    folder = root / split
    names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] != ".")
    prefix = f"{split}/" if split else ""
    classes = {name: files for name in names if (files := sorted(_walk(root, prefix + name)))}
    loose = [e.name for e in os.scandir(folder) if e.is_file() and _is_image(e.name)]
    if classes and loose:
        logger.warning("%s: ignoring %d images outside class folders", folder, len(loose))
    if not classes and loose:
        # Photos without classes still train a tokenizer: they are one class.
        classes = {folder.resolve().name: sorted(prefix + name for name in loose)}
    if not classes:
        raise UserError(f"{folder}: no images in it, expected class sub-folders of images")
    return classes


def _open_folder(config: DataConfig, train: bool, image_size: int) -> Source:
    del image_size
    root = Path(config.path).expanduser()
    if not root.is_dir():
        reason = "not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {reason}, expected class sub-folders of images")
    validation = next((n for n in ("val", "validation") if (root / n).is_dir()), None)
    if (root / "train").is_dir() and validation:
        return _open_split(root, train, validation)
    if (root / "train").is_dir() and any(e.is_dir() for e in os.scandir(root / "train")):
        raise UserError(
            f"{root}: has train/ but neither val/ nor validation/; "
            f"add one, or name {root / 'train'} to hold out some of its images"
        )
    classes = _classes(root, "")
    if not config.holdout:
        return FolderSource(root, list(classes.values()), list(classes))
    files, count = [], 0
    for group in classes.values():
        held = np.arange(count, count + len(group)) % config.holdout == 0
        files.append([name for name, out in zip(group, held, strict=True) if out != train])
        count += len(group)
    if not any(files):
        raise UserError(f"{root}: one image only, which is held out for evaluation")
    return FolderSource(root, files, list(classes))


def _open_split(root: Path, train: bool, validation: str) -> Source:
    if train:
        classes = _classes(root, "train")
        return FolderSource(root, list(classes.values()), list(classes))
    classes = _classes(root, validation)
    folders = [e for e in os.scandir(root / "train") if e.is_dir() and e.name[0] != "."]
    if not folders:  # Both without classes.
        return FolderSource(root, list(classes.values()), list(classes))
    # Labels are the training images', whose classes have any; one image tells, not a million.
    names = sorted(e.name for e in folders if next(_walk(root, f"train/{e.name}"), None))
    unknown = sorted(set(classes) - set(names))
    if unknown:
        raise UserError(f"{root / validation / unknown[0]}: no such class in {root / 'train'}")
    return FolderSource(root, [classes.get(name, []) for name in names], names)


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
        # The bytes go through `images.load`, like those of any other source.
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
        index = _checked(index, len(self))
        record = self._records[index]
        named = (record[name] for name in FILE_NAME_FEATURES if record.get(name))
        key = next(named, f"{self.split}/{index}")
        key = key.decode(errors="replace") if isinstance(key, bytes) else key
        try:
            image = images.load(record[self._image_key])
        except images.BadImage as error:
            raise images.BadImage(f"{key}: {error}") from error
        return {"image": image, "label": int(record[self._label_key]), "key": key}


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
