"""Atomic files and directories (written aside, then renamed), and the cache directory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
from typing import Any
import zipfile

import numpy as np
import safetensors
import safetensors.numpy

from gigatok_jax.errors import UserError, first_line


def cache_dir() -> pathlib.Path:
    """`$GIGATOK_CACHE`, or `gigatok_jax` in `$XDG_CACHE_HOME` or `~/.cache`."""
    for name, below in (("GIGATOK_CACHE", ""), ("XDG_CACHE_HOME", "gigatok_jax")):
        if path := os.environ.get(name):
            return pathlib.Path(local_path(path, name), below)
    return pathlib.Path("~/.cache/gigatok_jax").expanduser()


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


def unwritable(path: pathlib.Path, error: Exception, size: int) -> OSError:
    """The error of a file of about `size` bytes that a library failed to write."""
    number, text = getattr(error, "errno", None) or errno.EIO, reason(error)
    if text == DISK_FULL:  # with another number, because `reason` words ENOSPC without the size
        number, text = errno.EIO, f"{text}; this file takes {size:,} bytes"
    return OSError(number, text, str(path))


def local_path(path: str, where: str) -> str:
    """Expands "~"; `where` names the flag, field, variable or argument in messages.

    Raises:
      UserError: the path is a URL.
    """
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/", path):
        raise UserError(f"{where}: expected a local path, got {path!r}; buckets are not supported")
    if "\0" in path:
        raise UserError(f"{where}: expected a path, got {path!r}")
    return os.path.expanduser(path)


def aside_path(path: pathlib.Path, pid: int, kind: str = "partial") -> pathlib.Path:
    """The temporary path that `replacing` yields in process `pid`."""
    # A name may have 255 bytes, and this one must be longer.
    whole = os.fsencode(path.name)
    name = path.name if len(whole) < 200 else hashlib.sha256(whole).hexdigest()[:32]
    return path.with_name(f".{name}.{pid}.{kind}")


def printable(name: str) -> str:
    """A file's name with its bytes that are not UTF-8 written as in "a\\xf1o.jpg"."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def refuse_foreign(folder: pathlib.Path, own: Iterable[str], describes: str) -> None:
    """Raises UserError if `folder` is a file, or holds one that this program did not write there.

    Hidden files, such as a lock or what file managers leave, do not count.

    Args:
      own: relative paths of what it wrote.
      describes: these files together, for messages.
    """
    known = {*own, "Thumbs.db"}  # Windows hides the latter
    found = [] if folder.is_dir() or not folder.exists() else ["a file"]
    for path in folder.rglob("*"):
        name = printable(str(path.relative_to(folder)))
        hidden = any(part[0] == "." for part in path.relative_to(folder).parts)
        counts = not hidden and (path.is_symlink() or not path.is_dir())
        if counts and name not in known:
            found.append(name)
    if found:
        raise UserError(f"{folder}: expected {describes}, or an empty folder, found {min(found)}")


def _refuse_folder(path: pathlib.Path) -> None:
    if path.is_dir():
        raise UserError(f"{path}: expected a file to write, found a folder")


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike, check: Callable[[pathlib.Path], None] = _refuse_folder
) -> Iterator[pathlib.Path]:
    """Yields a temporary path for a file or directory, and renames it to `path` afterwards.

    If the block raises, the temporary file is removed and `path` is left as it was.

    Args:
      path: the file or directory.
      check: raises UserError if `path` may not be replaced; called before and after the block. By
        default, no folder may be.
    """
    path = pathlib.Path(path)
    check(path)
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


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON, which has no NaN or infinity: they become the strings "nan", "inf" and "-inf"."""

    def valid(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: valid(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [valid(item) for item in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(valid(value), indent=indent, allow_nan=False)


def clean(folder: pathlib.Path) -> None:
    """Undoes what killed processes left half done below a folder; call it with its lock held."""
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


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON; see `json_text`."""
    with replacing(path) as aside:
        aside.write_text(json_text(value, indent=2) + "\n")


def write_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    with replacing(path) as aside, aside.open("wb") as file:
        np.savez(file, **arrays)


def write_safetensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes C-contiguous arrays, in place: call it on a path from `replacing`."""
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.numpy.save_file(arrays, path)
    except (OSError, safetensors.SafetensorError) as error:  # a full disk, for example
        raise unwritable(path, error, sum(array.nbytes for array in arrays.values())) from error
    path.chmod(mode)  # the library ignores the umask: only the owner could read the file


def read_json(path: pathlib.Path, describes: str) -> dict[str, Any]:
    """Parses a JSON object; a UserError names what the file `describes`."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON that describes {describes}, got {error}") from None
    if not isinstance(value, dict):
        found = type(value).__name__
        raise UserError(f"{path}: expected a JSON object that describes {describes}, got a {found}")
    return value


def damaged_member(path: pathlib.Path) -> str | None:
    """The first member of a zip file that is not as it was written, or None."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except Exception:  # a damaged one raises many types
        return "its directory"


def read_index(path: pathlib.Path) -> dict[str, pathlib.Path]:
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


def claim(
    path: pathlib.Path, record: Mapping[str, Any], describes: str, *, write: bool = True
) -> None:
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
    directory: pathlib.Path, old: Mapping[str, Any], new: Mapping[str, Any], describes: str
) -> None:
    """Raises UserError for the first field that differs; `old` may lack newer fields."""
    for name, value in json.loads(json.dumps(new)).items():  # tuples become lists, as in `old`
        if name in old and old[name] != value:
            raise UserError(
                f"{directory}: holds {describes} made with another {name}: {old[name]!r}, "
                f"not {value!r}"
            )


def find(pattern: str, suffixes: tuple[str, ...]) -> list[pathlib.Path]:
    """The files that a pattern names, sorted.

    Args:
      pattern: a file; a folder, for the files in it with the first of `suffixes` that any has; or a
        pattern with "*", "?", "[abc]", "{a,b}" and "{000..127}".
      suffixes: such as ".tar".

    Raises:
      UserError: there are none, or none for one of the choices in braces.
    """
    path = pathlib.Path(pattern).expanduser()
    if path.is_dir():
        names = [child.name for child in path.iterdir()]
        by_suffix = [[path / name for name in names if name.endswith(s)] for s in suffixes]
        found = {pattern: next(filter(None, by_suffix), [])}
    elif path.exists():
        found = {pattern: [path]}
    else:
        choices = _without_braces(str(path))
        found = {choice: [pathlib.Path(name) for name in glob.glob(choice)] for choice in choices}
    for choice, paths in found.items():
        if not paths:
            raise UserError(f"{choice}: expected {suffixes[0]} files, found none")
    return sorted({path for paths in found.values() for path in paths})


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


def read_part(path: pathlib.Path, offset: int, size: int) -> bytes:
    """Reads `size` bytes of a file, or as many as there are, from a byte on."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def stamp(root: pathlib.Path, names: Iterable[str]) -> str:
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
    parts = [names[start : start + 4096] for start in range(0, len(names), 4096)]
    # On network storage, asking for a million files one by one would take minutes.
    with ThreadPoolExecutor(16) as threads:
        for text in threads.map(describe, parts):
            digest.update(text)
    return digest.hexdigest()[:16]
