"""The classes of ImageNet, which its data sets name by WordNet ids such as n02099601."""

from collections.abc import Iterable
import functools
import pathlib

TABLE = pathlib.Path(__file__).parent / "assets" / "imagenet_words.txt"


@functools.cache
def classes() -> dict[str, str]:
    """The 1,000 ids, by label, with a word of WordNet for each, such as "golden retriever"."""
    return dict(line.split(" ", 1) for line in TABLE.read_text().splitlines())


def words(class_names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes with words in place of ids; other names stay."""
    return tuple(classes().get(name, name) for name in class_names)
