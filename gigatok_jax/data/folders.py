"""Images in folders, their classes the sub-folders."""

from collections.abc import Iterator, Sequence
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from gigatok_jax.data import crops
from gigatok_jax.data.indexing import checked
from gigatok_jax.errors import UserError
from gigatok_jax.files import stamp

logger = logging.getLogger(__name__)

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".ppm", ".pnm"),
)


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

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = checked(index, len(self))
        key = self._key(index)
        try:
            image = crops.load(self.root / key)
        except crops.BadImage as error:
            raise crops.BadImage(f"{key}: {error}") from error
        label = int(np.searchsorted(self._class_ends, index, side="right"))
        return {"image": image, "label": label, "key": key}

    def _key(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._text[start : self._ends[index]])

    def version(self) -> str:
        return stamp(self.root, [self._key(index) for index in range(len(self))])


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


def open_folder(root: Path, train: bool, holdout: int) -> FolderSource:
    """Training or evaluation images of a folder; arguments are `DataConfig`'s.

    Raises:
        UserError: it has no images, or no such part.
    """
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
    if not holdout:
        return FolderSource(root, list(classes.values()), list(classes))
    files, count = [], 0
    for group in classes.values():
        held = np.arange(count, count + len(group)) % holdout == 0
        files.append([name for name, out in zip(group, held, strict=True) if out != train])
        count += len(group)
    if not any(files):
        raise UserError(f"{root}: one image only, which is held out for evaluation")
    return FolderSource(root, files, list(classes))


def _open_split(root: Path, train: bool, validation: str) -> FolderSource:
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
