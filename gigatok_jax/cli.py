"""The `gigatok` command: parses flags, joins other processes, and prints errors as one line."""

from collections.abc import Mapping
import dataclasses
import importlib.metadata
import inspect
import logging
import os
import sys
import traceback
import types
import typing
from typing import Any

from gigatok_jax.errors import RunStopped, UserError, first_line, lookup
from gigatok_jax.files import MACHINE, cache_dir, checked_path, is_of_bucket, reason

HELP = ("-h", "--help", "-help", "help")


def main(argv: list[str] | None = None) -> int:
    """Runs `gigatok VERB ...` and returns the exit code: 2 for wrong input, 1 for a failed run."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        return _run(arguments)
    except UserError as error:
        print(f"gigatok: error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if is_of_bucket(error):
            print(f"gigatok: error: gs://: {first_line(error)}", file=sys.stderr)
            return RunStopped.exit_code
        if not isinstance(error, OSError):
            raise
        what = f"{error.filename}: {reason(error)}" if error.filename else reason(error)
        print(f"gigatok: error: {what}", file=sys.stderr)
        return RunStopped.exit_code if error.errno in MACHINE else UserError.exit_code


def entry() -> None:
    """Runs `main` and ends the process."""
    if not set(sys.argv) & {*HELP}:
        take_huge_pages()
    sys.unraisablehook = _unraisable
    try:
        code = main()
    except KeyboardInterrupt:
        print("\ngigatok: interrupted", file=sys.stderr)
        code = 130  # 128 + SIGINT, as shells report it
    except Exception:
        traceback.print_exc()
        code = 1
    distributed = sys.modules.get("gigatok_jax.distributed")
    if code and distributed and distributed.started():
        # A normal exit would wait for processes that may be lost.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _unraisable(problem: Any) -> None:
    """Prints errors of C++ threads, but for TensorStore's after a failed save or restore."""
    if str(problem.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(problem)


PARSER_MESSAGES = {
    "invalid literal for int() with base 10:": "expected an integer, got",
    "could not convert string to float:": "expected a number, got",
}


def take_huge_pages() -> None:
    """Restarts the program with huge pages for large allocations, where glibc supports them.

    On CPUs, XLA maps gigabytes of memory at every step; with 4 KiB pages that takes 10 % of the
    time. glibc reads the setting only when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _run(arguments: list[str]) -> int:
    # Cached compilations let a resumed run start in seconds. Set before JAX is imported.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "compilations"))
    from gigatok_jax import commands

    if not arguments or arguments[0] in HELP:
        print("usage: gigatok VERB [--help] ...\n       gigatok --version\n")
        print("\n".join(f"  {name:<12} {verb.summary}" for name, verb in commands.VERBS.items()))
        return 0
    name, *rest = arguments
    if name == "--version":
        print(f"gigatok_jax {importlib.metadata.version('gigatok_jax')}")
        return 0
    verb = lookup(name, commands.VERBS, "verb")
    values = parse(name, verb, rest)
    if values is None:
        return 0
    if verb.several_processes:
        _join(values, verb.devices)
    else:
        if verb.devices:
            from gigatok_jax import sharding

            sharding.require_accelerator()
        _log_to_terminal()
    from gigatok_jax import distributed

    with distributed.ending_together():
        verb.run(**values)
    return 0


def parse(name: str, verb: Any, arguments: list[str]) -> dict[str, Any] | None:
    """Parses the flags of a verb: values by name, or None after printing its help.

    The value of a configuration flag is the dataclass that results from `--config=FILE:ARGUMENT`
    and all overrides `--config.a.b=c`.

    Raises:
      UserError: a flag or a field is unknown, missing, or has a wrong value.
    """
    from absl import flags
    from ml_collections import config_dict, config_flags

    from gigatok_jax import commands, config

    flag_values = flags.FlagValues()
    for define in verb.flags:
        define(flag_values)
    if set(arguments) & {*HELP}:
        print(inspect.getdoc(verb.run))
        print(flag_values.module_help(commands.verbs.__name__))
        return None
    if name == "config" and arguments[:1] == ["show"] and len(arguments) > 1:
        arguments = ["show", f"--config={arguments[1]}", *arguments[2:]]
    arguments, files = _take_config_files(arguments, verb.configs)
    loaded, unset = {}, {}
    for flag, default in verb.configs.items():
        file = checked_path(files.get(flag, default), f"--{flag}")
        if file == commands.REQUIRED:
            raise UserError(f"--{flag}: missing")
        loaded[flag] = None if file == commands.OPTIONAL else config.load(file)
        arguments, unset[flag] = _check_overrides(flag, loaded[flag], arguments)
    argv = [name, *arguments]
    try:
        for flag, value in loaded.items():
            if value is not None:
                fields = config.to_config_dict(value)
                for path, kind in unset[flag].items():
                    fields.update_from_flattened_dict({path: config_dict.placeholder(kind)})
                config_flags.DEFINE_config_dict(
                    flag, fields, sys_argv=argv, flag_values=flag_values
                )
        positional = flag_values(argv)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        message = first_line(error)
        for pythons, ours in PARSER_MESSAGES.items():
            message = message.replace(pythons, ours)
        if message.endswith("must have a value other than None."):
            message = f"{message.split('=')[0].removeprefix('flag ')}: missing"
        raise UserError(message) from error
    values = {flag: flag_values[flag].value for flag in flag_values}
    for flag, value in loaded.items():
        if value is not None:
            fields = _local_paths(values[flag].to_dict(), f"{flag}.")
            values[flag] = config.from_mapping(type(value), fields, flag)
        else:
            values[flag] = None
    values = _local_paths(values, "--")
    values = {flag.replace("-", "_"): value for flag, value in values.items()}
    if verb.positional:
        values |= _local_paths({verb.positional: positional}, "")
    elif positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    # Fields of configurations are flags too; their names have dots.
    return {k: v for k, v in values.items() if k not in IGNORED and "." not in k}


IGNORED = ("help", "helpfull", "helpshort", "helpxml", "flagfile", "undefok", "?")


# Flags, and fields of configurations, that hold a path.
PATHS = {"workdir", "workdirs", "out", "images", "reference", "from", "path", "branch_from"}
PATHS |= {"metrics", "samples", "reports", "space"}
# Those that name a model, see `locate.find`: a path, a name, or an address on the Hub.
MODELS = {"tokenizer", "generator", "teacher", "features", "model", "init_from"}


def _local_paths(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values`, with "~" expanded in all paths; see `files.checked_path`."""
    result = dict(values)

    def expand(name, value):
        address = name in MODELS and value.startswith("hf://")
        return value if address else checked_path(value, where + name)

    for name, value in values.items():
        if isinstance(value, dict):
            result[name] = _local_paths(value, f"{where}{name}.")
        elif name in PATHS | MODELS and isinstance(value, str):
            result[name] = expand(name, value)
        elif name in PATHS | MODELS and isinstance(value, list):
            result[name] = [expand(name, item) for item in value]
    return result


def _take_config_files(
    arguments: list[str], names: Mapping[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """Splits off `--config=FILE` and `--config FILE`: the other arguments, and files by flag."""
    rest, files = [], {}
    pending = iter(arguments)
    for argument in pending:
        flag, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and flag in names:
            files[flag] = value if equals else next(pending, "")
        else:
            rest.append(argument)
    return rest, files


def _check_overrides(
    flag: str, config: Any, arguments: list[str]
) -> tuple[list[str], dict[str, type]]:
    """Rejects the first `--config.a.b` that is not a field, listing the valid ones.

    Splits off `--config.a.b=None`, which the parser of flags does not know: returns the other
    arguments, and the types of these fields by path.
    """
    rest, unset = [], {}
    for argument in arguments:
        left, _, value = argument.partition("=")
        name, *fields = left.lstrip("-").split(".")
        if name != flag or not argument.startswith("-"):
            rest.append(argument)
            continue
        kind, path = type(config), f"--{flag}"
        if config is None:
            raise UserError(f"--{flag}: missing, but {argument.partition('=')[0]} is set")
        for field in fields:
            path += f".{field}"
            hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
            if field not in hints:
                raise UserError(
                    f"{path}: no such field; known: {', '.join(sorted(hints)) or 'none'}"
                )
            kind = hints[field]
        if value == "None" and types.NoneType in typing.get_args(kind):
            (unset[".".join(fields)],) = {*typing.get_args(kind)} - {types.NoneType}
        else:
            rest.append(argument)
    return rest, unset


def _join(values: dict[str, Any], devices: bool) -> None:
    """Joins the other processes of a run; all but process 0 then show only warnings."""
    from gigatok_jax import distributed, sharding

    names = ("coordinator", "processes", "process", "timeout")
    distributed.start(*(values.pop(name) for name in names))
    if devices:
        sharding.require_accelerator()
    if distributed.started() and not distributed.is_main():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _log_to_terminal(logging.INFO if distributed.is_main() else logging.WARNING)


class _TerminalHandler(logging.Handler):
    """Writes messages above progress bars."""

    def emit(self, record):
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Drops what libraries log of errors that they also raise, which end as one line."""
    return not record.exc_info


def _log_to_terminal(level: int = logging.INFO) -> None:
    """Shows the messages of this program, but only warnings of its libraries."""
    from absl import flags
    from absl import logging as absl_logging

    flags.FLAGS.mark_as_parsed()  # Grain and absl's logging fail on unparsed flags
    absl_logging.set_verbosity(absl_logging.WARNING)
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).addFilter(_without_traceback)
    handler = _TerminalHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("gigatok_jax")
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
