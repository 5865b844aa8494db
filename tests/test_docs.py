"""The documentation: the reference of config fields, and links on the site."""

import dataclasses
import importlib
import sys
import typing

import pytest

from gigatok_jax.evaluation.probing import ProbeConfig
from gigatok_jax.training.generator import GeneratorRun
from gigatok_jax.training.linear_probe import LinearProbeRun
from gigatok_jax.training.tokenizer import TokenizerRun
from tools import config_reference

RUNS = (TokenizerRun, GeneratorRun, LinearProbeRun, ProbeConfig)


def nested(cls):
    """A config class and those of its fields."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(hint):
            yield from nested(hint)


@pytest.fixture(scope="module")
def page():
    return config_reference.page()


@dataclasses.dataclass
class Example:
    """An example."""

    # What is above
    # in two lines,
    above: int = 1  # and beside.

    text: str = "# no comment"
    pair: tuple[int, ...] = (  # of numbers
        1,
        2,
    )
    silent: int = 0


def test_meanings_are_the_comments_above_and_beside_a_field():
    assert config_reference._comments(Example) == {
        "above": "What is above in two lines, and beside.",
        "text": "",
        "pair": "of numbers",
        "silent": "",
    }


def test_every_field_of_every_run_is_there_with_a_meaning():
    shown = {cls: set(config_reference.fields(cls)) for _, cls, _ in config_reference.SECTIONS}
    names = {cls: {field.name for field in fields} for cls, fields in shown.items()}
    for run in RUNS:
        for cls in nested(run):
            known = set().union(*(names.get(base, ()) for base in cls.__mro__))
            assert {field.name for field in dataclasses.fields(cls)} <= known, cls
    for cls, fields in shown.items():
        assert [f"{cls.__name__}.{f.name}" for f in fields if not f.meaning] == []


@pytest.mark.parametrize(
    "row",
    [
        "| `codebook_size` | integer ≥ 2, ≤ 1,073,741,824 | `16384` | number of different codes",
        '| `dtype` | `"auto"`, `"float32"`, `"bfloat16"` | `"auto"` |',
        "| `rate` | number > 0 or `None` | `0.0001` | peak learning rate",
        "| `freeze` | names, separated by commas | `()` |",
        "| `encoder` | [transformer's size](#transformers-size) | *required* |",
        '| `optimizer` | [optimizer](#optimizer) | `algorithm="lars"`, `rate=None`,',
        # Inherited, with another default.
        "| `average_decay` | number ≥ 0, < 1 | `0.9999` | moving average of weights; 0: none |",
    ],
)
def test_rows_of_the_page(page, row):
    assert f"\n{row}" in page


def test_the_page_needs_no_mkdocs(monkeypatch, page):
    monkeypatch.setitem(sys.modules, "mkdocs", None)  # importing it fails
    assert importlib.reload(config_reference).page() == page


@pytest.mark.parametrize(
    ("source", "link", "rewritten"),
    [
        ("docs/pods.md", "[a](../README.md#install)", "[a](overview.md#install)"),
        ("docs/pods.md", "[a](data.md#tar-files)", "[a](data.md#tar-files)"),
        ("docs/pods.md", "[a](../tools/config_reference.py)", "[a](configuration.md)"),
        ("docs/pods.md", "[a](#launchers)", "[a](#launchers)"),
        ("README.md", "![a](docs/images/drawings.png)", "![a](images/drawings.png)"),
        ("README.md", "[`a`](tests/test_docs.py)", "`a`"),  # the site has no such page
        ("README.md", "[a](https://x.org/y.md)", "[a](https://x.org/y.md)"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(monkeypatch, source, link, rewritten):
    hooks = mkdocs_hooks(monkeypatch)
    assert hooks.LINK.sub(lambda match: hooks.rewrite(match, source), link) == rewritten


def test_a_link_to_a_missing_file_is_a_warning(monkeypatch, caplog):
    hooks = mkdocs_hooks(monkeypatch)
    hooks.rewrite(hooks.LINK.match("[a](missing.md)"), "docs/pods.md")
    assert "docs/pods.md: a link to missing.md, which does not exist" in caplog.text


def mkdocs_hooks(monkeypatch):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    monkeypatch.syspath_prepend("tools")
    import mkdocs_hooks

    return mkdocs_hooks
