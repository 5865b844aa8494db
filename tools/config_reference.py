"""The reference of all config fields as Markdown: `python -m tools.config_reference`.

Types and defaults come from the dataclasses, and meanings from the comments above and beside their
fields, so the page cannot disagree with the program. `mkdocs_hooks` adds it to the documentation.
"""

import ast
from collections.abc import Iterable, Iterator
import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
import typing
from typing import Annotated, Any, Literal, NamedTuple, Union

from gigatok_jax.config import Names
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.evaluation.probing import ProbeConfig
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TokenizerConfig, TransformerSize
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.sharding import MeshConfig
from gigatok_jax.training.generator import GeneratorRun
from gigatok_jax.training.linear_probe import LinearProbeRun
from gigatok_jax.training.optimizer import OptimizerConfig
from gigatok_jax.training.task import LoopConfig, RunConfig
from gigatok_jax.training.tokenizer import ObjectiveConfig, TokenizerRun

# Title, class, and what precedes its fields on the command line.
SECTIONS = (
    ("All training runs", RunConfig, "config."),
    ("Tokenizer", TokenizerRun, "config."),
    ("Tokenizer's model", TokenizerConfig, "config.model."),
    ("Transformer's size", TransformerSize, "config.model.encoder."),
    ("Objective", ObjectiveConfig, "config.objective."),
    ("Generator", GeneratorRun, "config."),
    ("Generator's model", GeneratorConfig, "config.model."),
    ("Linear probe", LinearProbeRun, "config."),
    ("AR probing", ProbeConfig, "config."),
    ("Data", DataConfig, "config.data."),
    ("Optimizer", OptimizerConfig, "config.optimizer."),
    ("Loop", LoopConfig, "config.loop."),
    ("Mesh", MeshConfig, "config.mesh."),
    ("Sampling", SamplingConfig, "config.sampling."),
)

INTRODUCTION = """\
# Configuration

Every field of every run, with its default and meaning, from the source code. Set a field with
`--config.FIELD=VALUE`, such as `--config.optimizer.rate=2e-5` or
`--config.model.fsq_levels='(8,8,8,5,5,5)'`. An unknown field is rejected with a list of the valid
ones, and a wrong value with what was expected.

| config | its fields |
| --- | --- |
| `tokenizer:NAME`, `demo:tokenizer` | {all_training_runs}, {tokenizer} |
| `generator:NAME` | {all_training_runs}, {generator} |
| `probe:linear` | {all_training_runs}, {linear_probe} |
| `probe:NAME`, `demo:probe` | {ar_probing} |

AR probing contains two runs, whose fields are set as `--config.generator.FIELD` and
`--config.linear_probe.FIELD`.

Defaults are those of the classes. The configs that come with the program set some fields to other
values: `gigatok config show tokenizer:b_l` prints all values of one.
"""

BASES = {int: "integer", float: "number", str: "text", bool: "`True` or `False`"}


class Field(NamedTuple):
    """A field of a config class; type, default and meaning are Markdown."""

    name: str
    type: str
    default: str
    meaning: str  # "" if the source says nothing about it


def page() -> str:
    """The whole page, as Markdown."""
    links = {title.lower().replace(" ", "_"): _link(cls) for title, cls, _ in SECTIONS}
    return "\n".join([INTRODUCTION.format(**links), *(_section(*section) for section in SECTIONS)])


def fields(cls: type) -> Iterator[Field]:
    """The fields that a config class declares itself, in their order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    # A field that only changes an inherited default has the meaning of the inherited one.
    meanings = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            meanings |= {name: text for name, text in _comments(base).items() if text}
    for field in dataclasses.fields(cls):
        if field.name in cls.__annotations__:
            kind, meaning = _type(hints[field.name]), _escaped(meanings.get(field.name, ""))
            yield Field(field.name, kind, _default(field.default), meaning)


def _section(title: str, cls: type, prefix: str) -> str:
    rows = [f"| `{field.name}` | " + " | ".join(field[1:]) + " |" for field in fields(cls)]
    inherited = f" It also has those of {_link(RunConfig)}." if RunConfig in cls.__mro__[1:] else ""
    # Markdown shows what is indented by four spaces as it is.
    described = re.sub(r"^  (?=\S)", "    ", inspect.getdoc(cls), flags=re.MULTILINE)
    return "\n".join(
        [
            f"## {title}\n",
            f"{described}\n",
            f"Fields of `{cls.__name__}`, set as `--{prefix}FIELD`.{inherited}\n",
            "| field | type | default | meaning |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _link(cls: type) -> str:
    title = next(title for title, section, _ in SECTIONS if section is cls)
    slug = re.sub(r"[^a-z ]", "", title.lower()).replace(" ", "-")
    return f"[{title[0].lower() + title[1:] if title[1].islower() else title}](#{slug})"


def _comments(cls: type) -> dict[str, str]:
    """What the comments above and beside a class's fields say, by the field's name."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            comments[line] = token.string.lstrip("# ")
            if not token.line[:column].strip():
                alone.add(line)
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = range(first, node.end_lineno + 1)
            found[node.target.id] = " ".join(comments[i] for i in lines if i in comments)
    return found


def _type(hint: Any) -> str:
    """A type in words, such as "integer > 0"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint == Names:
        return "names, separated by commas"
    if origin is Annotated:
        return _type(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{_literal(value)}`" for value in arguments)
    if origin is tuple:
        return f"tuple; each: {_type(arguments[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments)
    if hint is types.NoneType:
        return "`None`"
    return _link(hint) if dataclasses.is_dataclass(hint) else BASES[hint]


def _bounds(metadata: Iterable[Any]) -> str:
    """The range of a number; Pydantic's `Field` holds the bounds in its own metadata."""
    limits = {}
    for item in metadata:
        for bound in getattr(item, "metadata", [item]):
            limits |= dataclasses.asdict(bound)
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [f"{sign} {limits[name]:,}" for name, sign in signs.items() if name in limits]
    return " " + ", ".join(found)


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "*required*"
    if not dataclasses.is_dataclass(value):
        return f"`{_literal(value)}`"
    # The section of the nested class has its defaults; only what differs belongs here.
    usual = {field.name: field.default for field in dataclasses.fields(value)}
    changed = {name: getattr(value, name) for name in usual if getattr(value, name) != usual[name]}
    return ", ".join(f"`{name}={_literal(v)}`" for name, v in changed.items()) or "as there"


def _literal(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, str) else str(value)


def _escaped(text: str) -> str:
    """Text in which Markdown reads nothing but code in backticks."""
    code = re.compile("(`[^`]*`)")
    return "".join(
        part if code.fullmatch(part) else re.sub(r"([\\*_|<\[\]])", r"\\\1", part)
        for part in code.split(text)
    )


if __name__ == "__main__":
    print(page())
