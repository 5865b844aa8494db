"""Images in folders, with one sub-folder per class."""

import collections
from collections.abc import Iterator
import errno
import logging
import os
import re
from typing import Any

import numpy as np

from gigatok_jax.data import crops
from gigatok_jax.data.encoded import EncodedSource, held_out
from gigatok_jax.errors import UserError
from gigatok_jax.files import NO_FILE, Path, printable, real_path, reason, scan, stamp, unreadable

logger = logging.getLogger(__name__)

# Files are selected by name, because opening a million would take too long. Excludes hidden files.
SUFFIX = re.compile(r"[^.].*\.(\w+)", re.DOTALL)
READABLE = {
    *("jpg", "jpeg", "jpe", "jfif", "mpo", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx"),
    *("png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "pbm", "pgm", "ppm", "pnm"),
    *("tga", "ico", "icns", "pcx", "dds", "qoi", "sgi"),
    *crops.optional_formats(),
}
# Pictures that people have, but that cannot be read here, or not faithfully (psd).
UNREADABLE = {
    *("avif", "avifs", "heic", "heics", "heif", "heifs", "hif", "jxl", "jxr", "wdp", "hdp"),
    *("svg", "eps", "psd", "xcf", "exr", "hdr", "pfm"),
    *("raw", "cr2", "cr3", "crw", "nef", "nrw", "arw", "srf", "dng", "raf", "orf", "rw2", "pef"),
    *("srw", "x3f", "3fr", "iiq"),  # these lines: of cameras
}
UNREADABLE -= READABLE

# Folders of these names, in any case, are hardly classes.
SPLITS = {"train", "training", "val", "valid", "validation", "eval", "dev", "test", "testing"}


class FolderSource(EncodedSource):
    """Images of a folder, sorted by class, then by path.

    Args:
      root: the folder; keys are paths relative to it.
      classes: class names, in the order of labels, to paths relative to `root`.
    """

    def __init__(self, root: Path, classes: dict[str, list[str]]):
        self.root, self.class_names = root, tuple(map(printable, classes))
        # Arrays, because a million strings would take long to pickle for each worker.
        self._names = np.array([os.fsencode(name) for group in classes.values() for name in group])
        self._version: str | None = None
        self._labels = np.repeat(np.arange(len(classes)), [len(g) for g in classes.values()])

    def __len__(self) -> int:
        return len(self._names)

    def encoded(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        key = self._key(index)
        path = self.root / os.fsdecode(self._names[index])
        try:
            image = path.read_bytes()
        except Exception as error:
            if isinstance(error, NO_FILE) or getattr(error, "errno", None) == errno.ELOOP:
                raise crops.BadImage(f"{key}: {reason(error)}") from error
            raise unreadable(path, error) from error
        return {"image": image, "label": int(self._labels[index]), "key": key}

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def _key(self, index: int) -> str:
        return printable(os.fsdecode(self._names[index]))

    def version(self) -> str:
        if self._version is None:  # asking for a million files takes seconds
            self._version = stamp(self.root, map(os.fsdecode, self._names))
        return self._version


def open_folder(root: Path, train: bool, holdout: int) -> FolderSource:
    """Opens the training or evaluation images of a folder; arguments as in `DataConfig`.

    Raises:
      UserError: the folder, or the requested part of it, has no images.
    """
    if not root.is_dir():
        reason = "not a folder" if root.exists() else "no such folder"
        raise UserError(f"{root}: {reason}, expected a folder of images")
    folders = _folders(root)
    validation = [name for name in ("val", "validation") if name in folders]
    if "train" in folders and len(validation) == 1:
        return FolderSource(root, _split(root, train, validation[0]))
    # A class may be called `train`, but it is not the only one, and holds no folders.
    splits = [name for name in folders if name.lower() in SPLITS]
    alone = splits == folders or len(splits) > 1
    if splits and (alone or any(_folders(root / name) for name in splits)):
        one = root / max(splits, key=lambda name: name.lower().startswith("train"))
        raise UserError(
            f"{root}: has {'/, '.join(splits)}/, expected train/ and val/ or validation/ (in lower "
            f"case), or classes; config.data.path={one} would hold out some of its own images"
        )
    classes = _classes(root, "")
    if holdout:
        held = held_out([name for group in classes.values() for name in group], holdout)
        untrained = [label for label, group in classes.items() if held.issuperset(group)]
        if len(untrained) == len(classes):
            raise UserError(f"{root}: all its images are held out for evaluation")
        for label in untrained:
            logger.warning("%s: ignored, because all its images are held out", root / label)
        classes = {
            label: [name for name in group if (name in held) != train]
            for label, group in classes.items()
            if label not in untrained
        }
        if not any(classes.values()):
            raise UserError(f"{root}: too few images to hold any out; set holdout to 0")
    return FolderSource(root, classes)


def _split(root: Path, train: bool, validation: str) -> dict[str, list[str]]:
    """`_classes` of one split, with the labels of the training split."""
    trained, held = _folders(root / "train"), _folders(root / validation)
    if bool(trained) != bool(held):
        flat, other = (validation, "train") if trained else ("train", validation)
        hint = "; docs/data.md shows how to sort ImageNet's validation images" if trained else ""
        raise UserError(
            f"{root / flat}: holds no class folders, expected those of {root / other}, such as "
            f"{(trained or held)[0]}/{hint}"
        )
    classes = _classes(root, "train" if train else validation)
    if train or not trained:  # without sub-folders, all images are one class
        return classes
    # A class needs a training image. Looking for one only is fast, even among a million.
    labels = [
        name for name in trained if next(_walk(root, f"train/{name}", collections.Counter()), None)
    ]
    if unknown := sorted(set(classes) - set(labels)):
        raise UserError(f"{root / validation / unknown[0]}: no such class in {root / 'train'}")
    return {name: classes.get(name, []) for name in labels}


def _classes(root: Path, split: str) -> dict[str, list[str]]:
    """Maps each class that has images to their paths, relative to `root`."""
    folder = root / split
    prefix = f"{split}/" if split else ""
    files = [name for name, is_folder in scan(folder) if not is_folder]
    unread = collections.Counter(s for s in map(suffix_of, files) if s in UNREADABLE)
    found = {name: sorted(_walk(root, prefix + name, unread)) for name in _folders(folder)}
    report_unread(folder, unread)
    classes = {name: images for name, images in found.items() if images}
    loose = sorted(name for name in files if suffix_of(name) in READABLE)
    if classes and loose:
        logger.warning("%s: ignoring %d images outside class folders", folder, len(loose))
    if not classes and loose:
        # Photos without classes can still train a tokenizer, as a single class.
        classes = {real_path(root).name: [prefix + name for name in loose]}
    if not classes:
        raise UserError(f"{folder}: no images, expected class sub-folders of images")
    return classes


def _folders(folder: Path) -> list[str]:
    return sorted(name for name, is_folder in scan(folder) if is_folder and name[0] != ".")


def suffix_of(name: str) -> str:
    """The suffix of a file that is not hidden, in lower case."""
    found = SUFFIX.fullmatch(name)
    return found[1].lower() if found else ""


def report_unread(folder: Path, unread: collections.Counter) -> None:
    """Warns of pictures of a folder that cannot be read, whose suffixes were counted."""
    if unread:
        counts = ", ".join(f"{count} .{suffix}" for suffix, count in sorted(unread.items()))
        hint = "; pip install 'gigatok_jax[heif]' reads .heic" if unread["heic"] else ""
        logger.warning("%s: ignoring pictures that cannot be read: %s%s", folder, counts, hint)


def _walk(
    root: Path,
    below: str,
    unread: collections.Counter,
    above: tuple[Path, ...] = (),
    visited: set[Path] | None = None,
) -> Iterator[str]:
    """Yields paths, relative to `root`, of all images below its sub-folder `below`.

    Skips hidden files and folders. Follows links, except to a folder above (`above`). Counts the
    pictures that cannot be read, by suffix, and adds the real paths of folders to `visited`.
    """
    real = real_path(root / below)
    if real in above:
        return
    if visited is not None:
        visited.add(real)
    for name, is_folder in scan(real):
        path = f"{below}/{name}" if below else name
        if is_folder:
            if name[0] != ".":
                yield from _walk(root, path, unread, (*above, real), visited)
        elif (suffix := suffix_of(name)) in READABLE:
            yield path
        elif suffix in UNREADABLE:
            unread[suffix] += 1


def places(path: Path) -> set[Path]:
    """The real paths of all folders that hold the images below `path`, or of an image file."""
    if not path.is_dir():
        return {real_path(path)}
    visited: set[Path] = set()
    collections.deque(_walk(path, "", collections.Counter(), (), visited), maxlen=0)
    return visited


def image_paths(path: Path) -> list[Path]:
    """The image file `path`, or all images below the folder `path`, sorted.

    Raises:
      UserError: `path` does not exist, or has no images.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder, expected images")
    unread = collections.Counter()
    found = [path / name for name in sorted(_walk(path, "", unread))]
    report_unread(path, unread)
    if not found:
        raise UserError(f"{path}: no images")
    return found
