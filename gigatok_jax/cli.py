"""The `gigatok` command: finds the verb, and turns what users get wrong into one line."""

import importlib
import logging
import os
import sys
import traceback

from ml_collections import ConfigDict

from gigatok_jax.errors import UserError
from gigatok_jax.files import cache_dir

# Verb to what it does; each is a module of `gigatok_jax.commands` with FLAGS and run().
VERBS = {
    "train": "train, or go on training: tokenizer, generator",
    "reconstruct": "pass images through a tokenizer and compare",
    "encode": "store the codes of a data set",
    "evaluate": "measure reconstruction, generation, or a generator's loss",
    "probe": "AR probing: judge a tokenizer by a small generator trained on it",
    "report": "probes side by side in one HTML file",
    "sample": "draw images by class from a generator",
    "plan": "compile a run for devices that are not there: memory, FLOPs, time",
    "convert": "turn a reference checkpoint into a bundle, or back",
    "weights": "fetch published weights",
    "demo": "the main job on drawings that the program makes itself",
}


# Those that several processes can share.
SHARED = ("train", "encode", "evaluate", "probe", "sample")


def main(argv: list[str] | None = None) -> int:
    """Runs `gigatok VERB ...`; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    verb = arguments[0]
    try:
        if verb not in VERBS:
            raise UserError(f"{verb!r}: no such verb; known: {', '.join(VERBS)}")
        return _run(verb, arguments[1:])
    except UserError as error:
        print(f"gigatok: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"gigatok: error: {what}", file=sys.stderr)
        return UserError.exit_code


def entry() -> None:
    """The program: `main`, and the end of the process."""
    take_huge_pages()
    try:
        code = main()
    except KeyboardInterrupt:
        print("\ngigatok: interrupted", file=sys.stderr)
        code = 130  # as a shell says it
    except Exception:
        traceback.print_exc()
        code = 1
    if code and _started():
        # The ordinary way out waits for processes that may be lost.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def take_huge_pages() -> None:
    """Starts the program again with huge pages for large allocations, where the C library has them.

    On CPUs, XLA maps gigabytes anew at each step; in pages of 4 KiB that costs a tenth of the time.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _started() -> bool:
    """Whether this process has joined others; JAX need not have been imported."""
    module = sys.modules.get("gigatok_jax.distributed")
    return module is not None and module.started()


def _run(verb: str, arguments: list[str]) -> int:
    # Compilations are kept between runs; a run that resumes starts in seconds.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_dir() / "compilations"))
    from absl import flags

    from gigatok_jax import distributed

    argv, sys.argv = sys.argv, [verb, *arguments]  # where config_flags finds --config.FIELD
    command = _fresh_module(f"gigatok_jax.commands.{verb}")
    if verb in SHARED:
        _define_processes(command.FLAGS)
    try:
        if any(argument in ("-h", "--help") for argument in arguments):
            print(command.__doc__)
            print(command.FLAGS.get_help())
            return 0
        positional = command.FLAGS(sys.argv)[1:]
        if "config" in command.FLAGS and command.FLAGS.config is not None:
            _ = command.FLAGS.config.to_dict  # raises if the file is not there
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(_unknown_field(verb, arguments) or _one_line(error)) from error
    finally:
        sys.argv = argv
    if verb in SHARED:
        _join(command.FLAGS)
    _log_to_terminal()
    with distributed.ending_together():
        command.run(positional)
    return 0


def _define_processes(flag_values) -> None:
    from absl import flags

    from gigatok_jax import distributed

    for name, default, text in (
        ("processes", 0, "of this run, where its launcher does not tell"),
        ("process", -1, "which of them this is, from 0"),
        ("timeout", distributed.TIMEOUT, "seconds without a sign after which one is given up"),
    ):
        flags.DEFINE_integer(name, default, text, flag_values=flag_values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0", flag_values=flag_values)


def _join(flag_values) -> None:
    """Makes this process one of several, of which the first alone has something to say."""
    from gigatok_jax import distributed

    names = ("coordinator", "processes", "process", "timeout")
    distributed.start(distributed.Processes(*(flag_values[name].value for name in names)))
    _require_accelerator()
    if distributed.started() and not distributed.is_main():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _require_accelerator() -> None:
    """Refuses to go on without what JAX_PLATFORMS names first; a step on a CPU may take a day."""
    import jax

    asked, _, _ = os.environ.get("JAX_PLATFORMS", "").partition(",")
    if asked in ("", "cpu"):
        return
    try:
        found = jax.default_backend() != "cpu"
    except (AssertionError, RuntimeError):  # which one depends on what is missing
        found = False
    if not found:
        raise UserError(
            f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: JAX finds no {asked} device here; its "
            f"libraries come with pip install -e '.[cuda]' or '.[tpu]'"
        )


def _unknown_field(verb: str, arguments: list[str]) -> str | None:
    """Says which `--config.FIELD` there is not; None where all are known."""
    names = [argument.lstrip("-").partition("=")[0] for argument in arguments]
    command = _fresh_module(f"gigatok_jax.commands.{verb}")
    if verb in SHARED:
        _define_processes(command.FLAGS)
    sys.argv = [verb, *(a for a, name in zip(arguments, names, strict=True) if "." not in name)]
    try:
        command.FLAGS(sys.argv)
    except Exception:  # the fault is another one
        return None
    for name, *fields in (name.split(".") for name in names):
        node = command.FLAGS[name].value if name in command.FLAGS else None
        if not isinstance(node, ConfigDict):
            continue
        for depth, field in enumerate(fields):
            if not isinstance(node, ConfigDict) or field not in node:
                known = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "none"
                path = ".".join([name, *fields[: depth + 1]])
                return f"--{path}: no such field; known: {known}"
            node = node[field]
    return None


def _one_line(error: Exception) -> str:
    """What is wrong with the flags, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].endswith("must have a value other than None."):
        return f"{lines[0].split('=')[0].removeprefix('flag ')}: missing"
    # config_flags lists where it looked, and names the file last.
    if "Failed loading config file" in lines[0]:
        return f"--config: {lines[-1].strip()}"
    return lines[0]


def _fresh_module(name: str):
    """The module, its flags as at the start of a process whatever earlier calls parsed."""
    if name in sys.modules:
        return importlib.reload(sys.modules[name])
    return importlib.import_module(name)


class _TerminalHandler(logging.Handler):
    """Writes messages above a progress bar that may be on the terminal."""

    def emit(self, record):
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_terminal() -> None:
    """Shows what this program has to say, and of its libraries only warnings."""
    from absl import flags
    from absl import logging as absl_logging

    from gigatok_jax import distributed

    flags.FLAGS.mark_as_parsed()  # Grain and absl's log have flags of their own
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = _TerminalHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("gigatok_jax")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if distributed.is_main() else logging.WARNING)
    logger.propagate = False


def _help() -> str:
    lines = ["usage: gigatok VERB [--help] ...", ""]
    lines += [f"  {verb:<12} {text}" for verb, text in VERBS.items()]
    return "\n".join(lines)
