"""Places of files: local paths and buckets; atomic files and directories; the cache directory.

A `Path` is local or in a bucket (`gs://`). Its methods are those of pathlib. Buckets differ in
three ways: directories appear with their first file, nothing can be appended to or renamed, and
only `Path.open` opens a file for other libraries.
"""

import atexit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import errno
import glob
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
from typing import TYPE_CHECKING, Any, TypeAlias, Union
import zipfile

import numpy as np
import safetensors
import safetensors.numpy

from gigatok_jax.errors import UserError, first_line

if TYPE_CHECKING:  # its import takes longer than `gigatok --help`
    from etils import epath

Path: TypeAlias = Union[pathlib.Path, "epath.Path"]
BUCKET = "gs://"
CLIENTS = ("gcsfs", "google", "aiohttp")  # libraries whose errors are those of a bucket
DEFAULT_CACHE = pathlib.Path("~/.cache/gigatok_jax")


def checked_path(path: str | os.PathLike, where: str) -> str:
    """Expands "~"; `where` names the flag, field, variable or argument in messages.

    Raises:
      UserError: the path is a URL, but not of a supported bucket.
    """
    path = os.fspath(path)
    if "\0" in path:
        raise UserError(f"{where}: expected a path, got {path!r}")
    if path.startswith(BUCKET):
        if importlib.util.find_spec("gcsfs") is None:
            how = "pip install 'gigatok_jax[gcs]'"
            raise UserError(f"{where}: {path} cannot be read without gcsfs; {how}")
        if not path.removeprefix(BUCKET).strip("/"):
            raise UserError(f"{where}: expected gs://BUCKET/PATH, got {path!r}")
        return path
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", path):
        raise UserError(f"{where}: expected a local path or gs://BUCKET/PATH, got {path!r}")
    return os.path.expanduser(path)


def as_path(path: str | os.PathLike, where: str = "path") -> Path:
    """The path that a flag, field or variable names; arguments and errors as for `checked_path`."""
    path = checked_path(path, where)
    if not path.startswith(BUCKET):
        return pathlib.Path(path)
    from etils import epath
    import fsspec

    # Other processes write to the same folders, so that a listing is out of date at once.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(path)


def in_bucket(path: Path) -> bool:
    return not isinstance(path, pathlib.Path)


def is_of_bucket(error: BaseException) -> bool:
    """Whether an error is one of a bucket's client, such as a lost connection."""
    return type(error).__module__.startswith(CLIENTS)


def create(path: "epath.Path", text: str) -> bool:
    """Writes a file in a bucket, and returns True, unless it exists."""
    import fsspec

    system, place = fsspec.url_to_fs(str(path))
    try:
        system.pipe_file(place, text.encode(), mode="create")
    except FileExistsError:
        return False
    return True


def local_copy(path: Path) -> pathlib.Path:
    """A local file of the same name and content; that of a file in a bucket is removed at exit."""
    if not in_bucket(path):
        return path
    folder = tempfile.mkdtemp(prefix="gigatok-")
    atexit.register(shutil.rmtree, folder)
    return pathlib.Path(path.copy(pathlib.Path(folder, path.name)))


def scan(folder: Path) -> Iterator[tuple[str, bool]]:
    """What a folder holds, unsorted: names, and whether each is a folder."""
    if in_bucket(folder):
        import fsspec

        system, root = fsspec.url_to_fs(str(folder))
        for info in system.ls(root, detail=True):
            path = info["name"].rstrip("/")
            if path != root.rstrip("/"):  # an empty object that other programs make for the folder
                yield path.rpartition("/")[2], info["type"] == "directory"
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            # `entry.is_dir` usually needs no system call, but raises for a link to itself.
            yield entry.name, os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def real_path(path: Path) -> Path:
    """The path without symbolic links."""
    return path if in_bucket(path) else path.resolve()


def cache_dir() -> Path:
    """`$GIGATOK_CACHE`, or `gigatok_jax` in `$XDG_CACHE_HOME` or `~/.cache`."""
    for name, below in (("GIGATOK_CACHE", ""), ("XDG_CACHE_HOME", "gigatok_jax")):
        if path := os.environ.get(name):
            return as_path(path, name) / below
    return DEFAULT_CACHE.expanduser()


def local_cache_dir() -> pathlib.Path:
    """`cache_dir`, or its default if that is in a bucket: for downloads that can be resumed."""
    directory = cache_dir()
    return DEFAULT_CACHE.expanduser() if in_bucket(directory) else directory


# Errors of the machine, after which the same command can go on; all others are of wrong paths.
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
DISK_FULL = "the disk is full"
# How libraries in C++ say that the disk is full.
FULL = ("No space left", "Failed to write", "Error writing local file", "unexpected pos")


def reason(error: BaseException) -> str:
    """Why a file could not be written, in a few words, whichever library says it."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return DISK_FULL
    if any(text in str(error) for text in FULL):
        return DISK_FULL
    return getattr(error, "strerror", None) or first_line(error)


# Errors of a file that is not there or not for us. Others may be gone at the next try: those of
# disks and networks, and those of buckets, which have many types.
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def unreadable(path: Path, error: Exception) -> OSError:
    """The error of the machine that a file could not be read, whichever library says it."""
    return OSError(errno.EIO, reason(error), str(path))


def unwritable(path: Path, error: Exception, size: int) -> OSError:
    """The error of a file of about `size` bytes that a library failed to write."""
    number, text = getattr(error, "errno", None) or errno.EIO, reason(error)
    if text == DISK_FULL:  # with another number, because `reason` words ENOSPC without the size
        number, text = errno.EIO, f"{text}; this file takes {size:,} bytes"
    return OSError(number, text, str(path))


def aside_path(path: Path, pid: int, kind: str = "partial") -> pathlib.Path:
    """The temporary path that `replacing` yields in process `pid`."""
    # A name may have 255 bytes, and this one must be longer.
    whole = os.fsencode(path.name)
    name = path.name if len(whole) < 200 else hashlib.sha256(whole).hexdigest()[:32]
    return path.with_name(f".{name}.{pid}.{kind}")


def printable(name: str) -> str:
    """A file's name with its bytes that are not UTF-8 written as in "a\\xf1o.jpg"."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _names_below(folder: Path) -> Iterator[str]:
    """Relative paths of all files and links below a folder."""
    if in_bucket(folder):
        yield from (name for name, _ in _listing(folder))
        return
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _listing(folder: "epath.Path") -> list[tuple[str, dict[str, Any]]]:
    """Relative paths and properties of all objects below a folder of a bucket."""
    import fsspec

    system, root = fsspec.url_to_fs(str(folder))
    found = system.find(root, detail=True)
    names = {name[len(root) :].lstrip("/"): found[name] for name in sorted(found)}
    # Other programs make empty objects for folders.
    return [(name, info) for name, info in names.items() if name and name[-1] != "/"]


def refuse_foreign(folder: Path, own: Iterable[str], describes: str) -> None:
    """Raises UserError if `folder` is a file, or holds one that this program did not write there.

    Hidden files, such as a lock or what file managers leave, do not count.

    Args:
      own: relative paths of what it wrote.
      describes: these files together, for messages.
    """
    known = {*own, "Thumbs.db"}  # Windows hides the latter
    if in_bucket(folder) and (folder / UPLOADING).exists():
        known |= set(json.loads((folder / UPLOADING).read_text()))
    found = [] if folder.is_dir() or not folder.exists() else ["a file"]
    for name in _names_below(folder):
        hidden = any(part[0] == "." for part in name.split("/"))
        if not hidden and printable(name) not in known:
            found.append(printable(name))
    if found:
        raise UserError(f"{folder}: expected {describes}, or an empty folder, found {min(found)}")


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: expected a file to write, found a folder")


@contextlib.contextmanager
def replacing(path: Path, check: Callable[[Path], None] = _refuse_folder) -> Iterator[pathlib.Path]:
    """Yields a temporary path for a file or directory, and renames it to `path` afterwards.

    If the block raises, the temporary file is removed and `path` is left as it was. The temporary
    path is local; for a `path` in a bucket, files are uploaded afterwards, `MARKER` last.

    Args:
      path: the file or directory.
      check: raises UserError if `path` may not be replaced; called before and after the block. By
        default, no folder may be.
    """
    check(path)
    if in_bucket(path):
        with tempfile.TemporaryDirectory(prefix="gigatok-") as folder:
            aside = pathlib.Path(folder, path.name)
            yield aside
            check(path)
            _upload(aside, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_path(path, os.getpid())
    try:
        try:
            yield aside
        except OSError as error:  # a full disk, for example, which does not say where
            if error.errno is not None:
                name = str(error.filename or aside)
                error.filename = name.replace(str(aside), str(path))
            raise
        check(path)
        if path.is_dir():  # rename cannot replace a directory that is not empty
            old = aside_path(path, os.getpid(), "old")
            path.rename(old)
            aside.rename(path)
            shutil.rmtree(old)
        else:
            aside.replace(path)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


MARKER = "config.json"  # in a directory in a bucket, which is whole only if it has this file
UPLOADING = ".uploading"  # in one whose upload has not ended: names of all files, old and new


def _upload(source: pathlib.Path, target: "epath.Path") -> None:
    """Uploads a file, or a directory that replaces `target`."""
    from etils import epath

    if not source.is_dir():
        epath.Path(source).copy(target, overwrite=True)
        return
    new = sorted(_names_below(source), key=lambda name: (name == MARKER, name))
    names = {*new, *_names_below(target)} - {UPLOADING}
    (target / UPLOADING).write_text(json.dumps(sorted(names)))
    (target / MARKER).unlink(missing_ok=True)
    for name in new:
        epath.Path(source / name).copy(target / name, overwrite=True)
    for name in names.difference(new):
        (target / name).unlink(missing_ok=True)
    (target / UPLOADING).unlink()


def upload(source: pathlib.Path, target: Path) -> None:
    """Copies all files below a local folder to the same places below another one."""
    from etils import epath

    for name in _names_below(source):
        epath.Path(source / name).copy(target / name, overwrite=True)


class Lines:
    """A text file that grows by lines, which in a bucket is written anew with each."""

    def __init__(self, path: Path):
        self._path, self._file, self._text = path, None, ""
        if not in_bucket(path):
            self._file = path.open("a")
        elif path.exists():
            self._text = path.read_text()

    def add(self, line: str) -> None:
        if self._file:
            self._file.write(f"{line}\n")
            self._file.flush()
        else:
            self._text += f"{line}\n"
            self._path.write_text(self._text)

    def close(self) -> None:
        if self._file:
            self._file.close()


def remove_folder(folder: Path) -> None:
    """Removes a folder and all that is in it."""
    if in_bucket(folder):
        folder.rmtree()
    else:
        shutil.rmtree(folder)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON, which has no NaN or infinity: they become the strings "nan", "inf" and "-inf"."""

    def valid(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: valid(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [valid(item) for item in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(valid(value), indent=indent, allow_nan=False)


def clean(folder: Path) -> None:
    """Undoes what killed processes left half done below a folder; call it with its lock held."""
    if in_bucket(folder):  # nothing is written aside there
        return
    for path in list(folder.rglob(".*")):
        left = re.fullmatch(r"\.(.+)\.\d+\.(partial|old)", path.name)
        if left is None:
            continue
        whole = path.with_name(left[1])
        if left[2] == "old" and not whole.exists():  # killed between the two renames
            path.rename(whole)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON; see `json_text`."""
    with replacing(path) as aside:
        aside.write_text(json_text(value, indent=2) + "\n")


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with replacing(path) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes C-contiguous arrays, in place: call it on a path from `replacing`."""
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.numpy.save_file(arrays, path)
    except (OSError, safetensors.SafetensorError) as error:  # a full disk, for example
        raise unwritable(path, error, sum(array.nbytes for array in arrays.values())) from error
    path.chmod(mode)  # the library ignores the umask: only the owner could read the file


def read_json(path: Path, describes: str) -> dict[str, Any]:
    """Parses a JSON object; a UserError names what the file `describes`."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON that describes {describes}, got {error}") from None
    if not isinstance(value, dict):
        found = type(value).__name__
        raise UserError(f"{path}: expected a JSON object that describes {describes}, got a {found}")
    return value


def damaged_member(path: Path) -> str | None:
    """The first member of a zip file that is not as it was written, or None."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return archive.testzip()
    except Exception:  # a damaged one raises many types
        return "its directory"


INDEX = "model.safetensors.index.json"  # in a folder whose model is divided into several files


def read_index(path: Path) -> dict[str, Path]:
    """The files of a Hugging Face index (`*.index.json`), which lie beside it, by tensor.

    Raises:
      UserError: the index is damaged, or names a file elsewhere.
    """
    places = read_json(path, "the shards of a checkpoint").get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise UserError(f"{path}: expected a weight_map of tensors to files, got {places!r}")
    for file in places.values():
        if not isinstance(file, str) or file in ("", "..") or pathlib.PurePath(file).name != file:
            raise UserError(f"{path}: weight_map: expected files in its own folder, got {file!r}")
    return {name: path.with_name(file) for name, file in places.items()}


def claim(path: Path, record: Mapping[str, Any], describes: str, *, write: bool = True) -> None:
    """Records in the JSON file `path` how its directory was made; `write=False` only checks.

    Args:
      describes: the directory's content, for messages.

    Raises:
      UserError: `path` holds a different record; the message names the first field that differs.
    """
    if path.exists():
        refuse_other(path.parent, read_json(path, describes), record, describes)
    if write:
        write_json(path, record)


def refuse_other(
    directory: Path, old: Mapping[str, Any], new: Mapping[str, Any], describes: str
) -> None:
    """Raises UserError for the first field that differs; `old` may lack newer fields."""
    for name, value in json.loads(json.dumps(new)).items():  # tuples become lists, as in `old`
        if name in old and old[name] != value:
            raise UserError(
                f"{directory}: holds {describes} made with another {name}: {old[name]!r}, "
                f"not {value!r}"
            )


def find(patterns: Iterable[str], suffixes: tuple[str, ...]) -> tuple[Path, list[str]]:
    """The folder of the files that patterns name, and their paths relative to it, sorted.

    Args:
      patterns: each a file; a folder, which stands for the files in it with the first of `suffixes`
        that any has; or a pattern with "*", "?", "[abc]", "{a,b}" and "{000..127}".
      suffixes: such as ".tar".

    Raises:
      UserError: there are none, or none for one of the choices in braces.
    """
    paths = sorted({path for pattern in patterns for path in _find(pattern, suffixes)})
    root = next(
        folder
        for folder in paths[0].parents
        if all(folder == path.parent or folder in path.parents for path in paths)
    )
    return root, [path.relative_to(root).as_posix() for path in paths]


def _find(pattern: str, suffixes: tuple[str, ...]) -> list[Path]:
    path = as_path(pattern)
    path = path if in_bucket(path) else path.absolute()
    if path.is_dir():
        names = [name for name, _ in scan(path)]
        by_suffix = [[path / name for name in names if name.endswith(s)] for s in suffixes]
        found = {pattern: next(filter(None, by_suffix), [])}
    elif path.exists():
        found = {pattern: [path]}
    else:
        found = {choice: _glob(choice) for choice in _without_braces(str(path))}
    for choice, paths in found.items():
        if not paths:
            raise UserError(f"{choice}: expected {suffixes[0]} files, found none")
    return [path for paths in found.values() for path in paths]


def _glob(pattern: str) -> list[Path]:
    if pattern.startswith(BUCKET):
        import fsspec

        system, place = fsspec.url_to_fs(pattern)
        return [as_path(BUCKET + name) for name in system.glob(place)]
    return [pathlib.Path(name) for name in glob.glob(pattern)]


def _without_braces(pattern: str) -> list[str]:
    """The patterns that one with "{a,b}" or "{000..127}" stands for, as in a shell."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    choices = braces[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
        first, last = numbers.groups()
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [each for choice in choices for each in _without_braces(before + choice + after)]


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Reads `size` bytes of a file, or as many as there are, from a byte on."""
    if in_bucket(path):  # an open file would read megabytes ahead
        import fsspec

        system, place = fsspec.url_to_fs(str(path))
        return system.cat_file(place, offset, offset + size)
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def size_of(path: Path) -> int:
    """Size of a file in bytes."""
    return path.stat().length if in_bucket(path) else path.stat().st_size


def stamp(root: Path, names: Iterable[str]) -> str:
    """Hashes the names, sizes and modification times of files in `root` to sixteen hex digits."""

    def describe(some: Sequence[str]) -> bytes:
        lines = []
        for name in some:
            try:
                found = (root / name).stat()
                lines.append(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0")
            except OSError:  # a dangling link, for example: an unreadable image
                lines.append(f"{name}\0missing\0")
        return os.fsencode("".join(lines))

    names, digest = list(names), hashlib.sha256()
    if in_bucket(root):
        found = {name: (info["size"], info.get("mtime")) for name, info in _listing(root)}
        for name in names:
            digest.update(os.fsencode(f"{name}\0{found.get(name)}\0"))
        return digest.hexdigest()[:16]
    parts = [names[start : start + 4096] for start in range(0, len(names), 4096)]
    # On network storage, asking for a million files one by one would take minutes.
    with ThreadPoolExecutor(16) as threads:
        for text in threads.map(describe, parts):
            digest.update(text)
    return digest.hexdigest()[:16]
