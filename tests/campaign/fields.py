"""Wrong values for every field of every configuration and every flag: one line each."""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import io
import pathlib

from gigatok_jax import cli, commands, config
from tests.campaign import verbs

VALUES = ("", "x", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "9" * 30, "[", "None", "\x00é")
CONFIGS = (  # verb, flag, file
    *(("train", "config", name) for name in ("tokenizer:s_s", "generator:b", "probe:linear")),
    ("probe", "config", "probe"),
    ("encode", "config", "tokenizer:s_s"),
    ("evaluate", "config", "tokenizer:s_s"),
    *(("plan", "config", name) for name in ("tokenizer:s_s", "generator:b")),
    ("demo", "tokenizer", "demo:tokenizer"),
    ("demo", "probe", "demo:probe"),
)


def cases(root: pathlib.Path, count: int | None) -> Iterator:
    del root, count
    for verb, flag, file in CONFIGS:
        names = list(paths(config.load(file)))
        chosen = [f"--{flag}={file}"] * (verb != "demo")  # which has its own
        for name in names:
            for value in VALUES:
                argument = f"--{flag}.{name}={value}"
                arguments = [verb, *chosen, argument]
                yield f"{verb}:{file} {argument!r}", functools.partial(one, arguments, names)
    for verb, definition in commands.VERBS.items():
        for flag in flags(definition):
            for value in VALUES:
                argument = f"--{flag}={value}"
                yield f"{verb} {argument!r}", functools.partial(one, [verb, argument], [])


def paths(value, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from paths(inner, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def flags(verb) -> list[str]:
    from absl import flags as absl_flags

    values = absl_flags.FlagValues()
    for define in verb.flags:
        define(values)
    return [name for name in values if name not in cli.IGNORED]


def one(arguments: list[str], names: list[str]) -> verbs.Outcome:
    """Parses, and nothing more: a value is accepted, or refused in one line that names it."""
    definition = commands.VERBS[arguments[0]]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            cli.parse(arguments[0], definition, [*required(definition, arguments), *arguments[1:]])
    except cli.UserError as error:
        text = str(error)
        name = arguments[-1].partition("=")[0].lstrip("-")
        # A rule over several fields may name another one of them.
        others = [other for other in names if f"{other}: expected " in text]
        named = name.rpartition(".")[2].replace("-", "_") in text.replace("-", "_") or others
        return ("one line" if named and "\n" not in text else "failed"), text, {}
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {error}", {}
    return "accepted", "", {}


def required(definition, arguments: list[str]) -> list[str]:
    """The flags without which a verb does not parse, but for the one that is tried."""
    tried = {argument.partition("=")[0].lstrip("-") for argument in arguments}
    needed = [f"--{name}=x" for name in ("workdir", "tokenizer", "generator", "images", "out")]
    needed += ["--topology=h100:8", "--from=x", "--config=tokenizer:s_s"]
    known = {*flags(definition), *(name for name in definition.configs if name == "config")}
    return [f for f in needed if f[2:].partition("=")[0] in known - tried]
