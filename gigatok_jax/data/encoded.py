"""What sources of image files have in common, and which of their images are held out."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import hashlib
import os
import re
from typing import Any

import numpy as np

from gigatok_jax.data import crops
from gigatok_jax.errors import UserError

READERS = 16  # threads that read ahead; on network storage, one would wait most of the time


class EncodedSource:
    """Base of sources whose examples are image files, which are decoded when they are asked for."""

    class_names: tuple[str, ...]
    codes = 0

    def __len__(self) -> int:
        raise NotImplementedError

    def encoded(self, index: int) -> dict[str, Any]:
        """An example whose `image` is the file's content.

        Raises:
          BadImage: there is no such image, now and at the next try.
          OSError: the disk or the network failed.
        """
        raise NotImplementedError

    def version(self) -> str:
        """See `Source`."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.encoded(index)
        try:
            return example | {"image": crops.load(example["image"])}
        except crops.BadImage as error:
            raise crops.BadImage(f"{example['key']}: {error}") from error

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any] | crops.BadImage]:
        """Examples `start` to `stop` like `encoded`, or why one cannot be read, in order."""

        def read_one(index: int) -> dict[str, Any] | crops.BadImage:
            try:
                return self.encoded(index)
            except crops.BadImage as error:
                return error

        with ThreadPoolExecutor(READERS) as threads:
            # A few at a time, because images can be large.
            for first in range(start, stop, 4 * READERS):
                yield from threads.map(read_one, range(first, min(stop, first + 4 * READERS)))


def held_out(names: Iterable[str], every: int) -> set[str]:
    """About one name in `every`, at least one.

    A hash of the name decides, so that adding images never holds out one that was trained on.
    """
    digests = {
        name: int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big")
        for name in names
    }
    held = {name for name, digest in digests.items() if digest * every < 2**64}
    return held or {min(digests, key=digests.get)}


# Words in the names of files that hold one split of a data set.
SPLIT_OF = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_OF |= dict.fromkeys(("val", "valid", "validation", "eval", "dev"), "validation")


def split_files(names: Iterable[str]) -> dict[str, list[str]]:
    """Sorts names of files into "train" and "validation" by the words in them, and drops "test".

    If not both have files, none of them is a split: all files are "all".

    Raises:
      UserError: some names have such a word, and others none, or those of several splits.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        split = {SPLIT_OF[word] for word in _split_words(name)}
        found.setdefault(split.pop() if len(split) == 1 else "all", []).append(name)
    if len(found) > 1 and "all" in found:
        name = found["all"][0]
        raise UserError(
            f"{name}: expected one of train, validation and test in the name, because other files "
            f"have one, found {' and '.join(_split_words(name)) or 'none'}"
        )
    found.pop("test", None)
    if len(found) == 1:
        return {"all": next(iter(found.values()))}
    return found


def _split_words(name: str) -> list[str]:
    return [word for word in re.findall("[a-z]+", name.lower()) if word in SPLIT_OF]


def choose_split(
    splits: dict[str, list[str]], train: bool, holdout: int
) -> tuple[str, bool | None]:
    """The key of `split_files` to take, and `held` for `part`; arguments as in `DataConfig`."""
    if "all" in splits:
        return "all", (not train if holdout else None)
    return ("train" if train else "validation"), None


def part(keys: Sequence[str], held: bool | None, holdout: int) -> np.ndarray:
    """Which examples to take, bool [len(keys)].

    Args:
      keys: of the examples.
      held: takes those held out (True), the others (False), or all (None).
      holdout: holds out one in so many.
    """
    if held is None or not keys:
        return np.ones(len(keys), bool)
    out = held_out(keys, holdout)
    return np.array([(key in out) == held for key in keys])
