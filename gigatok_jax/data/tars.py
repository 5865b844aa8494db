"""Images in tar files: webdataset shards, or ImageNet's own.

An index of where each image lies is made once and kept, so that any image can be read by itself.
"""

import collections
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import functools
import hashlib
import importlib.resources
import itertools
import json
import logging
import os
import re
import tarfile
from typing import IO, Any, NamedTuple

import filelock
import numpy as np
from tqdm import tqdm

from gigatok_jax import files
from gigatok_jax.data.encoded import READERS, EncodedSource, choose_split, part, split_files
from gigatok_jax.data.folders import READABLE, UNREADABLE, report_unread
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import Path

logger = logging.getLogger(__name__)

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

# Lists of class names beside the shards: one name on a line, or a JSON array.
CLASS_FILES = ("classes.txt", "classnames.txt", "class_names.txt", "classes.json")
MOST_CLASSES = 1_000_000

VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


class TarSource(EncodedSource):
    """Images of tar files, in the order of the files' names, then of the members.

    Args:
      root: folder of the tar files.
      index: file of an `_Index`.
      stamp: version of the tar files, which must be that of the index.
      split: "train" or "validation" of `split_files`, or "all".
      held, holdout: see `encoded.part`.
      class_names: by label.
    """

    def __init__(
        self,
        root: Path,
        index: Path,
        stamp: str,
        split: str,
        held: bool | None,
        holdout: int,
        class_names: tuple[str, ...],
    ):
        self._arguments = (root, index, stamp, split, held, holdout, class_names)
        self.class_names, self._root = class_names, root
        found = _load(index, stamp)
        if found is None:
            raise UserError(f"{root}: the tar files have changed since this run started")
        self._tars = [os.fsdecode(name) for name in found.tars]
        chosen = split_files(self._tars)[split]
        keep = np.isin(found.tar, [i for i, name in enumerate(self._tars) if name in chosen])
        if held is not None:
            keep &= part([os.fsdecode(key) for key in found.keys], held, holdout)
        self._tar, self._offset, self._size = found.tar[keep], found.offset[keep], found.size[keep]
        self._labels, self._keys = found.label[keep], found.keys[keep]

    def __reduce__(self):
        return TarSource, self._arguments

    def __len__(self) -> int:
        return len(self._keys)

    def encoded(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        key = files.printable(os.fsdecode(self._keys[index]))
        path = self._root / self._tars[self._tar[index]]
        try:
            image = files.read_part(path, int(self._offset[index]), int(self._size[index]))
        except Exception as error:  # of the whole file: the image was there
            raise files.unreadable(path, error) from error
        return {"image": image, "label": int(self._labels[index]), "key": key}

    def label(self, index: int) -> int:
        return int(self._labels[index])

    def version(self) -> str:
        _, _, stamp, split, held, holdout, _ = self._arguments
        return f"{split} of {stamp}" if held is None else f"{held} 1/{holdout} of {stamp}"


def open_tars(patterns: Iterable[str], train: bool, holdout: int) -> TarSource:
    """Opens the training or evaluation images of tar files.

    Files whose names, below their common folder, have the word "train" or "val" (or "validation")
    hold these splits. If there are not both, `holdout` decides as for folders.

    Args:
      patterns: see `files.find`.
      train, holdout: see `folders.open_folder`.

    Raises:
      UserError: there are no tar files or images, or a file is compressed or damaged, or an image
        has no label.
    """
    root, names = files.find(patterns, SUFFIXES)
    for name in names:
        if not name.endswith(".tar"):
            raise UserError(f"{root / name}: expected an uncompressed .tar file; unpack it first")
    splits = split_files(names)
    tars = sorted(name for names in splits.values() for name in names)
    if not tars:
        raise UserError(
            f"{root / names[0]}: expected files to train on, found those of a test split"
        )
    stamp = files.stamp(root, tars)
    index, found = _find_index(root, tars, stamp)
    report_unread(root, collections.Counter(found.unread.tolist()))
    split, held = choose_split(splits, train, holdout)
    source = TarSource(root, index, stamp, split, held, holdout, _class_names(root, found))
    if not len(source):
        few = f"no images in {splits[split][0]}"
        if held is not None:
            few = "too few images to hold any out; set holdout to 0"
        raise UserError(f"{root}: {few}")
    return source


def _class_names(root: Path, found: "_Index") -> tuple[str, ...]:
    """By label: names from the tar files, or of a list beside them, or numbers."""
    if len(found.classes):
        return tuple(found.classes.tolist())
    last = int(found.label.max())
    path = next((root / name for name in CLASS_FILES if (root / name).is_file()), None)
    if path is None:
        names = list(map(str, range(min(last, MOST_CLASSES) + 1)))
    elif path.suffix == ".txt":
        names = path.read_text().rstrip().splitlines()
    else:
        try:
            names = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: expected a JSON array of class names, got {error}") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{path}: expected a JSON array of class names")
    for place in (found.label.argmin(), found.label.argmax()):
        if not 0 <= found.label[place] < len(names):
            raise UserError(
                f"{root}: {files.printable(os.fsdecode(found.keys[place]))}: expected a label from "
                f"0 to {len(names) - 1}{f', as in {path.name}' if path else ''}, got "
                f"{found.label[place]}"
            )
    return tuple(names)


class _Index(NamedTuple):
    """Where the images of tar files lie; `keys` are their members' names."""

    stamp: np.ndarray  # str: `files.stamp` of the tar files
    tars: np.ndarray  # bytes [files]: their names
    classes: np.ndarray  # str [classes]: their names if the tar files have them, or none
    tar: np.ndarray  # int32 [images], and so on: place in `tars`
    offset: np.ndarray  # int64, in bytes
    size: np.ndarray  # int64, in bytes
    label: np.ndarray  # int64
    keys: np.ndarray  # bytes
    unread: np.ndarray  # str: suffixes of the pictures that cannot be read


def _find_index(root: Path, tars: list[str], stamp: str) -> tuple[Path, _Index]:
    """Finds the index of tar files, or makes it: beside them, or in the cache."""

    def name(*parts: str) -> str:
        return f"tar_index_{hashlib.sha256(os.fsencode(chr(0).join(parts))).hexdigest()[:16]}.npz"

    def look() -> tuple[Path, _Index] | None:
        found = ((path, _load(path, stamp)) for path in paths)
        return next(((path, index) for path, index in found if index is not None), None)

    cached = name(str(files.real_path(root)), *tars)
    paths = (root / f".{name(*tars)}", files.cache_dir() / cached)
    if found := look():
        return found
    lock = files.local_cache_dir() / f".{cached}.lock"
    with contextlib.ExitStack() as stack:
        # One process of a machine makes it. Where the cache cannot be locked, each does.
        with contextlib.suppress(OSError, NotImplementedError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(filelock.FileLock(lock))
        if found := look():
            return found
        made = _make_index(root, tars, stamp)
        try:
            files.write_npz(paths[0], made._asdict())
            return paths[0], made
        except Exception as error:  # those of buckets have many types
            logger.info("%s; keeping the index of the tar files in %s", first_line(error), paths[1])
            files.write_npz(paths[1], made._asdict())
            return paths[1], made


def _load(path: Path, stamp: str) -> _Index | None:
    """An index, or None if it is missing, damaged, of other files, or lacks what can be read."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            found = _Index(**arrays)
    except Exception:  # damaged zip files raise many types
        return None
    current = found.stamp.item() == stamp and READABLE.isdisjoint(found.unread.tolist())
    return found if current else None


def _make_index(root: Path, tars: list[str], stamp: str) -> _Index:
    logger.info("looking for images in %d tar files of %s, once", len(tars), root)
    parts = [_Part(i, root / name) for i, name in enumerate(tars)]
    rows, unread = [], collections.Counter()
    with ThreadPoolExecutor(READERS) as threads:
        while parts:
            bar = tqdm(threads.map(_scan, parts), "index", len(parts), unit="tar", disable=None)
            found, inner, ignored = zip(*bar, strict=True)
            rows += itertools.chain.from_iterable(found)
            parts = list(itertools.chain.from_iterable(inner))
            unread.update(itertools.chain.from_iterable(ignored))
    if not rows:
        report_unread(root, unread)
        raise UserError(f"{root}: no images in {', '.join(tars[:3])}")
    tar, offset, size, keys, labels = zip(*sorted(rows), strict=True)
    names = sorted({label for label in labels if isinstance(label, str)})
    if names and not all(isinstance(label, str) for label in labels):
        raise UserError(f"{root}: expected labels that are all numbers, or all names, found both")
    numbers = {name: number for number, name in enumerate(names)}
    return _Index(
        stamp=np.array(stamp),
        tars=np.array([os.fsencode(name) for name in tars]),
        classes=np.array(names, np.str_),
        tar=np.array(tar, np.int32),
        offset=np.array(offset, np.int64),
        size=np.array(size, np.int64),
        label=np.array([numbers.get(label, label) for label in labels], np.int64),
        keys=np.array([os.fsencode(key) for key in keys], np.bytes_),
        unread=np.array(list(unread.elements()), np.str_),
    )


Label = int | str  # number or name


class _Part(NamedTuple):
    """A tar file, or one inside of it."""

    tar: int
    path: Path
    start: int = 0  # in bytes
    end: int | None = None  # None: that of the file
    label: Label | None = None  # of an inner one: its name


class _Picture(NamedTuple):
    """A member of a tar file that is a picture, by its name."""

    name: str
    extension: str  # all that follows the first dot, in lower case
    suffix: str  # what follows the last dot
    offset: int
    size: int


def _scan(part: _Part) -> tuple[list[tuple], list[_Part], list[str]]:
    """The images of a tar file, inner tar files, and the suffixes of pictures that are ignored.

    An image is a row (tar, offset, size, key, label). Its label is in `KEY.cls` or `KEY.json`
    beside the image `KEY.jpg`, as webdataset writes them. In a tar file of tar files, as ImageNet's
    training images, it is the inner file's name.
    """
    pictures: dict[str, dict[str, _Picture]] = {}  # of a key, by name
    labels: dict[str, Label] = {}
    inner, ignored = [], []
    path = part.path
    with path.open("rb") as file:
        for name, place in _members(file, part):
            folder, _, base = name.rpartition("/")
            if base.startswith("."):  # as macOS adds them
                continue
            key, _, extension = base.partition(".")
            key, extension = f"{folder}/{key}", extension.lower()
            suffix = extension.rpartition(".")[2]
            if place is None:
                ignored += [f"{suffix} (link)"] if suffix in READABLE else []
                continue
            offset, size = place
            if extension == "tar":
                label = files.printable(base[: -len(".tar")])
                inner.append(_Part(part.tar, path, offset, offset + size, label))
            elif suffix in READABLE or suffix in UNREADABLE:
                key = key if part.label is None else name
                picture = _Picture(name, extension, suffix, offset, size)
                pictures.setdefault(key, {})[name] = picture
            elif extension == "cls" or (extension == "json" and key not in labels):
                file.seek(offset)
                if (label := _parse_label(path, name, file.read(size))) is not None:
                    labels[key] = label
    rows = []
    for key, found in pictures.items():
        image, unread = _choose(path, list(found.values()))
        ignored += unread
        if image is None:
            continue
        label = labels.get(key, part.label)
        if label is None and (validation := VALIDATION_IMAGE.fullmatch(image.name)):
            label = _validation_labels()[int(validation[1]) - 1]
        if label is None:
            raise UserError(
                f"{path}: {files.printable(image.name)}: expected a label in .cls or .json "
                "beside it; unpack tar files of class folders, and read these"
            )
        rows.append((part.tar, image.offset, image.size, image.name, label))
    return rows, inner, ignored


def _choose(path: Path, pictures: list[_Picture]) -> tuple[_Picture | None, list[str]]:
    """The image among the pictures of a key; if there is none, their suffixes.

    A key ends at the first dot. `KEY.mask.png` is no image beside `KEY.jpg`, but alone it is.
    """
    whole = [each for each in pictures if each.extension == each.suffix] or pictures
    images = [each for each in whole if each.suffix in READABLE]
    if len(images) > 1:
        both = " and ".join(files.printable(each.name) for each in images[:2])
        raise UserError(f"{path}: expected one image of a name, up to its first dot, found {both}")
    return (images[0], []) if images else (None, [each.suffix for each in whole])


def _members(file: IO[bytes], part: _Part) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Names of the files in a tar file, with offset and size; None for links that lead to none.

    A hard link leads to an earlier file. Symbolic links are not followed.
    """
    places: dict[str, tuple[int, int]] = {}
    path, end = part.path, part.end if part.end is not None else file.seek(0, os.SEEK_END)
    file.seek(part.start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in iter(tar.next, None):
                tar.members.clear()  # they would fill the memory
                if member.offset >= end:  # an inner file without an end, and what follows it
                    break
                if member.offset_data + member.size > end:
                    raise UserError(f"{path}: incomplete, at {files.printable(member.name)}")
                if member.isreg():
                    places[member.name] = member.offset_data, member.size
                elif member.islnk() and member.linkname in places:
                    places[member.name] = places[member.linkname]
                elif not member.islnk() and not member.issym():
                    continue
                yield member.name.removeprefix("./"), places.get(member.name)
            last = tar.offset
    except tarfile.TarError as error:
        raise UserError(
            f"{path}: expected an uncompressed tar file that is whole: {first_line(error)}"
        ) from None
    # The end is a block of zeros. At a damaged header, tarfile ends too, without an error.
    file.seek(last)
    if last < end and file.read(min(tarfile.BLOCKSIZE, end - last)).strip(b"\0"):
        raise UserError(f"{path}: damaged at byte {last}")


def _parse_label(path: Path, name: str, text: bytes) -> Label | None:
    """The content of a .cls or .json member; None if a .json has no label."""
    try:
        if name.lower().endswith(".json"):
            label = json.loads(text).get("label")
        else:
            label = text.decode().strip()
            label = int(label) if re.fullmatch(r"[+-]?\d+", label) else label
        if label is None or (type(label) in (int, str) and label != ""):
            return label
    except (ValueError, AttributeError):
        pass
    raise UserError(
        f"{path}: {files.printable(name)}: expected a number or name of a class, got {text[:40]!r}"
    )


@functools.cache
def _validation_labels() -> list[str]:
    """The classes of ImageNet's validation images, which TFDS has, in their order."""
    path = "datasets/imagenet2012/validation_labels.txt"
    return (importlib.resources.files("tensorflow_datasets") / path).read_text().split()
