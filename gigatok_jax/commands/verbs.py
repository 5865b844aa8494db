"""What a verb of the command line is, and the flags and checks that several verbs share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import fnmatch
import logging
from typing import Any

from absl import flags

from gigatok_jax.errors import UserError
from gigatok_jax.files import Path, as_path, real_path

logger = logging.getLogger(__name__)

Define = Callable[[flags.FlagValues], Any]
Models = Mapping[str, Any]  # `api.Pretrained` by kind


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb of the command line; `run` takes the flags' values by name."""

    run: Callable[..., None]
    summary: str  # one line for `gigatok --help`; the docstring of `run` is the rest
    flags: Sequence[Define]
    configs: Mapping[str, str]  # flags that take a configuration, and their default files
    positional: str  # name of the argument for what is not a flag; "": not accepted
    devices: bool  # whether it computes on the devices of JAX_PLATFORMS

    @property
    def several_processes(self) -> bool:
        """Whether several processes can share the work of this verb."""
        return PROCESSES[0] in self.flags


VERBS: dict[str, Verb] = {}
OPTIONAL, REQUIRED = "optional", "required"  # in place of a configuration's default file


def verb(
    summary: str,
    *flags: Define,
    configs: Mapping[str, str] | None = None,
    positional: str = "",
    devices: bool = True,
) -> Callable:
    """Registers the decorated function as the verb of the same name; see `Verb`."""

    def register(run):
        VERBS[run.__name__] = Verb(run, summary, flags, configs or {}, positional, devices)
        return run

    return register


def flag(kind: str, name: str, *args: Any, **kwargs: Any) -> Define:
    """An absl flag, defined only when its verb is parsed; `kind` as in `flags.DEFINE_kind`."""
    define = getattr(flags, f"DEFINE_{kind}")
    return lambda flag_values: define(name, *args, flag_values=flag_values, **kwargs)


def required(name: str, text: str) -> Define:
    def define(flag_values):
        flags.DEFINE_string(name, None, text, flag_values, required=True)
        given = "expected a value, got ''"
        flags.register_validator(name, lambda value: value != "", given, flag_values)

    return define


def batch_size(default: int, text: str = "images per batch") -> Define:
    return flag("integer", "batch_size", default, text, lower_bound=1)


MEASURED = "evaluation.json"  # in a folder of results of `evaluate`: the measure, the models
SEED = {"lower_bound": 0, "upper_bound": 2**32 - 1}
PROCESSES = (
    flag("integer", "processes", 0, "number of processes, unless the launcher sets it"),
    flag("integer", "process", -1, "index of this process, from 0"),
    flag("integer", "timeout", 120, "seconds until a silent process counts as lost"),
    flag("string", "coordinator", "", "HOST:PORT of process 0"),
)
SSIM_RANGE = flag(
    "integer", "ssim_range", 1, "data range of SSIM; the reference program uses 2", lower_bound=1
)
# What `--tokenizer` and `--generator` take, see `locate.find`.
MODEL = "folder (bundle or workdir), published name, or hf://OWNER/REPO[/FOLDER][@REVISION]"
TOKENIZER = f"{MODEL}; or your own, python:MODULE:FUNCTION"
ITS_TOKENIZER = f"{TOKENIZER}; default: that of a published generator"
SAMPLING = (
    flag(
        "float",
        "guidance",
        None,
        "scale of classifier-free guidance; 1: none; default: 1, or the setting of a published "
        "generator, with its schedule, unless a flag of guidance is set",
    ),
    flag(
        "enum",
        "schedule",
        None,
        # Not taken from `sampling.Schedule`, because importing that module takes seconds.
        ["constant", "step", "linear", "reversed_linear", "triangular", "rectangular", "cosine"],
        "how guidance varies over the codes of an image; default: constant",
    ),
    flag(
        "float", "schedule_start", None, "start of step and rectangular, in [0, 1]; default: 0.18"
    ),
    flag("float", "schedule_end", None, "end of rectangular, in [0, 1]; default: 1"),
    flag(
        "float",
        "temperature",
        None,
        "divides the logits; 0: always the likeliest code; default: 1, or that of the generator "
        "drawings_gpt",
    ),
    flag("integer", "top_k", 0, "sample from the k likeliest codes; 0: all"),
    flag("float", "top_p", 1.0, "sample from the likeliest codes with probability p together"),
)
GUIDANCE = ("guidance", "schedule", "schedule_start", "schedule_end")


def sampling_settings(values: dict[str, Any]) -> tuple[Any, set[str]]:
    """Moves the sampling flags from `values`: a `SamplingConfig`, and which fields are set."""
    from gigatok_jax.sampling import SamplingConfig

    names = [field.name for field in dataclasses.fields(SamplingConfig)]
    given = {name: values.pop(name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    try:
        settings = SamplingConfig(**given)
        settings.check_schedule()
    except ValueError as error:
        raise UserError(f"--{error}") from error
    return settings, {*given}


def as_published(settings: Any, given: set[str], generator: Any) -> Any:
    """`settings` with those of a published generator that no flag has set.

    A flag of guidance sets all of it.
    """
    given = given | {*GUIDANCE} if given & {*GUIDANCE} else given
    published = {k: v for k, v in generator.made_by.get("sampling", {}).items() if k not in given}
    if not published:
        return settings
    logger.info("as published: %s", " ".join(f"--{k}={v}" for k, v in published.items()))
    return dataclasses.replace(settings, **published)


def data_of(config: Any) -> Any:
    """The `data` of a configuration."""
    if config is None:
        raise UserError("--config: missing, expected a configuration with `data` to evaluate")
    if not hasattr(config, "data"):
        raise UserError("--config: expected that of a training run or a probe, which has `data`")
    return config.data


def check_apart(flag: str, folder: Path, images: str, written: Iterable[str]) -> None:
    """Rejects results among the images that they come from, and images among the results.

    The former would be read as images by the next call, the latter replaced. `written` are patterns
    of what is written to `folder`.
    """
    from gigatok_jax.data.folders import places

    folder = real_path(folder)
    for place in sorted(places(as_path(images))):
        if folder.is_relative_to(place):
            raise UserError(f"--{flag}: expected a folder outside of the images' {place}")
        name = place.relative_to(folder).parts[0] if place.is_relative_to(folder) else ""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in written):
            raise UserError(
                f"--{flag}: expected a folder whose {name!r}, which is written to, has none of "
                f"the images, got those in {place}"
            )


def check_no_evaluation(folder: Path) -> None:
    """Rejects a folder with the results of `evaluate`, whose files have the same names."""
    if (folder / MEASURED).exists():
        raise UserError(f"--out: expected a folder without results of evaluate, got {folder}")


def check_data(flag: str, folder: Path, data: Any, *written: str) -> None:
    """`check_apart` for the data of a configuration."""
    from gigatok_jax import distributed

    if data.source == "folder":
        distributed.in_main(lambda: check_apart(flag, folder, data.path, written))
