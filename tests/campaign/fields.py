"""Wrong values for every field of every configuration and every flag: one line each."""

import contextlib
import dataclasses
import functools
import io
import pathlib
import typing

from gigatok_jax import cli, commands, config

VALUES = ("", "x", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "9" * 30, "[", "None", "\x00é")
CONFIGS = {
    "train": ("tokenizer:s_s", "generator:b", "probe:linear"),
    "probe": ("probe",),
    "encode": ("tokenizer:s_s",),
}


def cases(root: pathlib.Path, count: None) -> typing.Iterator:
    del count
    for verb, names in CONFIGS.items():
        for name in names:
            for path in paths(type(config.load(name)), config.load(name)):
                for value in VALUES:
                    argument = f"--config.{path}={value}"
                    arguments = [verb, f"--config={name}", argument]
                    yield f"{verb}:{name} {argument!r}", functools.partial(one, root, arguments)
    for verb, definition in commands.VERBS.items():
        for flag in flags(definition):
            for value in VALUES:
                argument = f"--{flag}={value}"
                yield f"{verb} {argument!r}", functools.partial(one, root, [verb, argument])


def paths(kind: type, value, prefix: str = ""):
    """Dotted names of all fields."""
    for field in dataclasses.fields(kind):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            yield from paths(type(inner), inner, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def flags(verb) -> list[str]:
    from absl import flags as absl_flags

    values = absl_flags.FlagValues()
    for define in verb.flags:
        define(values)
    return [name for name in values if name not in cli.IGNORED]


def one(root: pathlib.Path, arguments: list[str]) -> tuple[str, str]:
    """Parses, and nothing more: a value is accepted, or refused in one line that names it."""
    definition = commands.VERBS[arguments[0]]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            cli.parse(arguments[0], definition, [*required(definition, arguments), *arguments[1:]])
    except cli.UserError as error:
        text = str(error)
        # A rule over several fields may name another one of them.
        name = arguments[-1].partition("=")[0].lstrip("-").rpartition(".")[2]
        named = name.replace("-", "_") in text or ": expected " in text
        return ("one line" if named and "\n" not in text else "failed"), text
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {error}"
    return "accepted", ""


def required(definition, arguments: list[str]) -> list[str]:
    """The flags without which a verb does not parse, but for the one that is tried."""
    tried = {argument.partition("=")[0].lstrip("-") for argument in arguments}
    needed = [f"--{name}=x" for name in ("workdir", "tokenizer", "generator", "images", "out")]
    needed += ["--topology=h100:8", "--from=x", "--config=tokenizer:s_s"]
    known = {*flags(definition), *(name for name in definition.configs if name == "config")}
    return [f for f in needed if f[2:].partition("=")[0] in known - tried]
