"""The verbs of the command line: their flags, and the library functions that they call.

A verb is a function of its flags' values. The functions import what they need when they run, so
that `gigatok --help` answers at once.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import types
from typing import Any

from absl import flags

from gigatok_jax.errors import UserError

Define = Callable[[flags.FlagValues], Any]


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb of the command line; `run` takes the flags' values by name."""

    run: Callable[..., None]
    summary: str  # one line for `gigatok --help`; the docstring of `run` is the rest
    flags: Sequence[Define]
    configs: Mapping[str, str]  # flags that take a configuration, and their default files
    positional: str  # name of the argument that takes what is not a flag; "": nothing does

    @property
    def several_processes(self) -> bool:
        """Whether several processes can share the work."""
        return PROCESSES[0] in self.flags


VERBS: dict[str, Verb] = {}
OPTIONAL, REQUIRED = "optional", "required"  # in place of a configuration's default file


def verb(
    summary: str,
    *flags: Define,
    configs: Mapping[str, str] | None = None,
    positional: str = "",
) -> Callable:
    """Registers the decorated function as a verb of its name; see `Verb`."""

    def register(run):
        VERBS[run.__name__] = Verb(run, summary, flags, configs or {}, positional)
        return run

    return register


def flag(kind: str, name: str, *args: Any, **kwargs: Any) -> Define:
    """An absl flag that is defined when its verb is parsed; `kind` as in `flags.DEFINE_kind`."""
    define = getattr(flags, f"DEFINE_{kind}")
    return lambda flag_values: define(name, *args, flag_values=flag_values, **kwargs)


def required(name: str, text: str) -> Define:
    return flag("string", name, None, text, required=True)


def batch_size(default: int, text: str = "images at once") -> Define:
    return flag("integer", "batch_size", default, text, lower_bound=1)


PROCESSES = (
    flag("integer", "processes", 0, "number of processes of this run, if no launcher tells"),
    flag("integer", "process", -1, "index of this process, from 0"),
    flag("integer", "timeout", 120, "seconds after which a silent process is given up"),
    flag("string", "coordinator", "", "HOST:PORT of process 0"),
)

SAMPLING = (
    flag("float", "guidance", 1.0, "scale of classifier-free guidance; 1: none"),
    flag(
        "enum",
        "schedule",
        "constant",
        ["constant", "step", "linear", "reversed_linear", "triangular", "rectangular", "cosine"],
        "how the guidance depends on the position of the code",
    ),
    flag("float", "schedule_start", 0.18, "where step and rectangular begin, in [0, 1]"),
    flag("float", "schedule_end", 1.0, "where rectangular ends, in [0, 1]"),
    flag("float", "temperature", 1.0, "divides the logits; 0 takes the likeliest code"),
    flag("integer", "top_k", 0, "sample from the k likeliest codes; 0: from all"),
    flag("float", "top_p", 1.0, "sample from the likeliest codes of total probability p"),
)


def _sampling(values: dict[str, Any]) -> Any:
    """Takes the sampling flags out of `values`, as a `SamplingConfig`."""
    from gigatok_jax.sampling import SamplingConfig

    try:
        names = [field.name for field in dataclasses.fields(SamplingConfig)]
        settings = SamplingConfig(**{name: values.pop(name) for name in names})
    except ValueError as error:
        raise UserError(f"--{error}") from error
    if settings.schedule != "constant" and settings.guidance == 1:
        raise UserError(
            f"--guidance: expected more than 1 with schedule {settings.schedule}, got 1"
        )
    return settings


def _data(config: Any) -> Any:
    """The `data` of any run's configuration."""
    if config is None:
        raise UserError("--config: missing, expected a configuration whose `data` is evaluated")
    if not hasattr(config, "data"):
        raise UserError("--config: expected a training run's or a probe's, which has `data`")
    return config.data


@verb(
    "train a tokenizer, a generator or a linear probe, or resume training",
    required("workdir", "where the run lives"),
    *PROCESSES,
    configs={"config": REQUIRED},
)
def train(config, workdir: str) -> None:
    """gigatok train --config=configs/tokenizer.py:b_l --workdir=DIR [--config.FIELD=VALUE ...]

    Trains from scratch, or resumes from the newest checkpoint in DIR. DIR gets checkpoints/,
    metrics.jsonl, tensorboard/, pictures/, config.json and, at the end, bundle/.
    """
    from gigatok_jax.training import TASKS, loop

    if not isinstance(config, tuple(TASKS.values())):
        raise UserError(f"--config: expected the run of a {', '.join(TASKS)}, got another one")
    loop.train(config, pathlib.Path(workdir))


@verb(
    "reconstruct images with a tokenizer and compare",
    required("tokenizer", "bundle or workdir"),
    required("images", "image file, or folder of images"),
    required("out", "folder for the results"),
    batch_size(8),
    flag(
        "integer",
        "ssim_range",
        1,
        "data_range of SSIM; the reference passes 2",
        lower_bound=1,
    ),
)
def reconstruct(tokenizer: str, images: str, out: str, **options: Any) -> None:
    """gigatok reconstruct --tokenizer=DIR --images=PATH --out=DIR

    Reconstructs images (a file, or all below a folder) with a tokenizer. OUT gets grid.png (input
    over output), images/ (one PNG each), and metrics.json: PSNR, SSIM, codebook usage, and LPIPS
    if its weights have been fetched (`gigatok weights fetch lpips_vgg16`).
    """
    from gigatok_jax import api
    from gigatok_jax.evaluation import reconstruction

    loaded = api.load_tokenizer(tokenizer)
    reconstruction.reconstruct(loaded, pathlib.Path(images), pathlib.Path(out), **options)


@verb(
    "store the codes of a data set",
    required("tokenizer", "bundle or workdir"),
    required("out", "folder for the codes"),
    flag(
        "list",
        "crop_factors",
        ["1.1"],
        "ten crops for each factor, of a center crop of factor times the image size; "
        "1.1,1.05 adds the reference's second set; empty: one center crop",
    ),
    batch_size(32, "images read, and crops encoded, at once"),
    flag("integer", "shard_images", 4096, "images per shard", lower_bound=1),
    *PROCESSES,
    configs={"config": REQUIRED},
)
def encode(tokenizer: str, config, out: str, crop_factors: list[str], **options: Any) -> None:
    """gigatok encode --tokenizer=DIR --config=FILE --out=DIR [--config.data.FIELD=VALUE ...]

    Stores the codes of the data set that the configuration names: of ten crops of each training
    image, and of the center crop of each validation image. After a kill, the same command resumes.
    Train on the codes with --config.data.source=codes --config.data.path=DIR.
    """
    from gigatok_jax import bundles, encoding
    from gigatok_jax.models.tokenizer import TokenizerConfig

    try:
        factors = tuple(float(factor) for factor in crop_factors)
    except ValueError:
        raise UserError(f"--crop_factors: expected numbers, got {crop_factors}") from None
    bundle = bundles.load(tokenizer, "tokenizer", TokenizerConfig)
    encoding.encode(bundle, _data(config), pathlib.Path(out), crop_factors=factors, **options)


@verb(
    "sample images by class from a generator",
    required("generator", "bundle or workdir"),
    required("tokenizer", "bundle or workdir"),
    required("out", "folder for the images"),
    flag("list", "classes", ["all"], "numbers or ranges such as 0,7,10-19; all: each"),
    flag("integer", "count", 0, "images, the classes in turn; 0: 8 per class", lower_bound=0),
    flag("boolean", "random_classes", False, "draw the classes uniformly, not in turn"),
    batch_size(32),
    flag("integer", "seed", 0, "of codes and classes", lower_bound=0),
    *SAMPLING,
    *PROCESSES,
)
def sample(
    generator: str,
    tokenizer: str,
    out: str,
    classes: list[str],
    count: int,
    random_classes: bool,
    seed: int,
    batch_size: int,
    **sampling: Any,
) -> None:
    """gigatok sample --generator=DIR --tokenizer=DIR --classes=0,1,207 --out=DIR

    Samples images by class. OUT gets grid.png (one class per row), images/ (one PNG each) and
    samples.npz in the layout of ADM's evaluator (`arr_0`, uint8 [n, H, W, 3], and `arr_1`, the
    classes). After a kill, the same command resumes. Image n does not depend on the others.
    """
    import numpy as np

    from gigatok_jax import api
    from gigatok_jax.evaluation import generation

    settings = _sampling(sampling)
    loaded = api.load_generator(generator)
    numbers = _class_numbers(classes, loaded.config.classes)
    count = count or generation.COLUMNS * len(numbers)
    if random_classes:
        order = np.random.default_rng(seed).choice(numbers, count)
    else:
        order = np.resize(numbers, count)
    generation.sample(
        loaded,
        generation.load_matching_tokenizer(tokenizer, loaded),
        order,
        settings,
        pathlib.Path(out),
        seed=seed,
        batch_size=batch_size,
    )


def _class_numbers(items: list[str], count: int) -> list[int]:
    """The numbers that "all", or numbers and ranges such as "10-19", stand for."""
    if items == ["all"]:
        return list(range(count))
    numbers = []
    for item in items:
        first, dash, last = item.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise UserError(f"--classes: expected numbers and ranges such as 0,10-19, got {item!r}")
        numbers += range(int(first), int(last) + 1)
    bad = [number for number in numbers if number >= count]
    if bad or not numbers:
        raise UserError(f"--classes: expected numbers in 0..{count - 1}, got {bad or items}")
    return numbers


@verb(
    "evaluate reconstruction, generation, a generator's loss, or the cost of decoding",
    flag("string", "generator", "", "bundle or workdir"),
    flag("string", "tokenizer", "", "bundle or workdir"),
    required("out", "folder for the results"),
    batch_size(32),
    flag("string", "features", "inception", "network whose features are compared"),
    flag("string", "reference", "", ".npz of statistics or images"),
    flag("enum", "split", "eval", ["train", "eval"], "images of the data to compare with"),
    flag("integer", "count", 50_000, "number of samples", lower_bound=2),
    flag("integer", "seed", 0, "of codes and classes", lower_bound=0),
    flag("boolean", "search", False, "search for the best guidance"),
    *SAMPLING,
    flag(
        "integer",
        "ssim_range",
        1,
        "data_range of SSIM; the reference passes 2",
        lower_bound=1,
    ),
    flag("list", "decoders", ["s_b", "b_l", "xl_xxl"], "tokenizers to time"),
    flag("list", "generators", ["b", "l", "xxl"], "generators to time"),
    *PROCESSES,
    configs={"config": OPTIONAL},
    positional="measure",
)
def evaluate(measure: list[str], out: str, **values: Any) -> None:
    """gigatok evaluate MEASURE --out=DIR ...

    reconstruction --tokenizer=DIR --config=FILE: PSNR, SSIM, LPIPS (if its weights have been
      fetched), codebook usage and rFID of the evaluation images of the configuration's `data`.
    generation --generator=DIR --tokenizer=DIR (--reference=FILE.npz or --config=FILE): gFID, sFID,
      Inception Score, precision and recall, as ADM's evaluator defines them, of samples of
      uniformly drawn classes. --search walks from --guidance, in steps of 0.25, to the scale of
      the lowest gFID. After a kill, the same command resumes.
    loss --generator=DIR --config=FILE [--tokenizer=DIR]: the mean cross entropy of the codes of the
      evaluation images, given their classes. Images, unlike stored codes, need the tokenizer.
    cost [--decoders=s_b,b_l,xl_xxl] [--generators=b,l,xxl]: the share of sampling time that
      decoding takes on this machine, for models with random weights (paper, Table 4).

    --features=inception compares features of FID's network. A teacher's name (dinov2_vitb14,
    embedded) compares its features instead; the distance is then called fd_dinov2 or fd_teacher.
    OUT gets metrics.json and pictures.
    """
    from gigatok_jax import distributed
    from gigatok_jax.evaluation import print_metrics
    from gigatok_jax.files import write_json

    measures = {
        "reconstruction": _evaluate_reconstruction,
        "generation": _evaluate_generation,
        "loss": _evaluate_loss,
        "cost": _evaluate_cost,
    }
    if len(measure) != 1 or measure[0] not in measures:
        raise UserError(f"expected one of {', '.join(measures)}, got {measure}")
    sampling, folder = _sampling(values), pathlib.Path(out)
    args = types.SimpleNamespace(**values, sampling=sampling, out=folder)
    result = measures[measure[0]](args)
    print_metrics(result)
    if distributed.is_main():
        write_json(folder / "metrics.json", result)
    print(folder)


def _directory(args: types.SimpleNamespace, name: str) -> str:
    value = getattr(args, name)
    if not value:
        raise UserError(f"--{name}: missing, expected a bundle or workdir")
    return value


def _evaluate_reconstruction(args: types.SimpleNamespace) -> dict[str, float]:
    from gigatok_jax import api
    from gigatok_jax.evaluation import features, reconstruction

    return reconstruction.evaluate(
        api.load_tokenizer(_directory(args, "tokenizer")),
        features.load(args.features),
        _data(args.config),
        args.out,
        batch_size=args.batch_size,
        ssim_range=args.ssim_range,
    )


def _evaluate_generation(args: types.SimpleNamespace) -> dict[str, Any]:
    from gigatok_jax import api
    from gigatok_jax.evaluation import features, fid, generation

    generator = api.load_generator(_directory(args, "generator"))
    tokenizer = generation.load_matching_tokenizer(_directory(args, "tokenizer"), generator)
    extractor = features.load(args.features)
    reference = fid.load_reference(
        args.reference,
        None if args.reference else _data(args.config),
        extractor,
        count=args.count,
        batch_size=args.batch_size,
        image_size=tokenizer.config.image_size,
        train=args.split == "train",
    )
    evaluate, out = generation.evaluate, args.out / "drawn"
    if args.search:
        evaluate, out = generation.evaluate_best, args.out
    return evaluate(
        generator,
        tokenizer,
        extractor,
        reference,
        args.sampling,
        out,
        count=args.count,
        seed=args.seed,
        batch_size=args.batch_size,
    )


def _evaluate_loss(args: types.SimpleNamespace) -> dict[str, float]:
    from gigatok_jax import api
    from gigatok_jax.evaluation import generation

    data, tokenizer = _data(args.config), None
    generator = api.load_generator(_directory(args, "generator"))
    if args.tokenizer:
        tokenizer = generation.load_matching_tokenizer(args.tokenizer, generator)
    elif data.source != "codes":
        raise UserError("--tokenizer: expected a bundle or workdir, which encodes the images")
    return generation.evaluate_loss(generator, tokenizer, data, args.batch_size)


def _evaluate_cost(args: types.SimpleNamespace) -> dict[str, Any]:
    import jax

    from gigatok_jax.evaluation import cost

    size = {"batch_size": args.batch_size, "guidance": args.sampling.guidance}
    table = cost.shares(args.decoders, args.generators, **size)
    print("decoder / generator" + "".join(f"{name:>10}" for name in args.generators))
    for decoder, row in table.items():
        print(f"{decoder:<19}" + "".join(f"{share:>10.1%}" for share in row.values()))
    return {**size, "device": jax.devices()[0].device_kind, "shares": table}


@verb(
    "AR probing: evaluate a tokenizer by a small generator trained on its codes",
    required("tokenizer", "bundle or workdir"),
    required("workdir", "where everything is written"),
    *PROCESSES,
    configs={"config": REQUIRED},
)
def probe(tokenizer: str, workdir: str, config) -> None:
    """gigatok probe --tokenizer=DIR --workdir=DIR --config=configs/probe.py [--config.FIELD=...]

    AR probing (paper, 3.1): evaluates a tokenizer by a small generator trained on its codes. Each
    step is skipped when its result exists, so that a kill costs little:
      reconstruction/  metrics and pictures of the evaluation images
      codes/           of all images
      generator/       the run of the small generator
      loss/            its validation loss
      generation/      metrics of its samples, at the best guidance
      linear_probe/    the run of the linear probe of its features
      samples/         samples by class
      maps.png         principal components of the decoder's features (Fig. 8)
    tokenizer.json says what was probed, results.json holds the metrics, and report.html shows
    everything in one file.
    """
    from gigatok_jax.evaluation import probing

    if not isinstance(config, probing.ProbeConfig):
        raise UserError("--config: expected a probe's, such as configs/probe.py")
    probing.probe(tokenizer, config, pathlib.Path(workdir))


@verb(
    "show probes or training runs in one HTML file",
    flag("string", "out", "", "the file; by default report.html in the first DIR"),
    positional="workdirs",
)
def report(workdirs: list[str], out: str) -> None:
    """gigatok report DIR [DIR ...] [--out=FILE.html]

    Shows what `gigatok probe` or `gigatok train` left in DIR in one HTML file: tables, curves,
    pictures and settings. A probe must be finished; a training run need not be. Several of a kind
    are set side by side: probes in the paper's table and figures, training runs in one chart per
    metric.
    """
    from gigatok_jax.evaluation import report as reports

    if not workdirs:
        raise UserError("expected the workdir of a probe or a training run, or of several")
    folders = [pathlib.Path(workdir) for workdir in workdirs]
    path = pathlib.Path(out) if out else folders[0] / "report.html"
    reports.write(folders, path)
    print(path)


@verb(
    "compile a run for devices that do not exist here: memory, FLOPs, time",
    required("topology", "devices, such as v5e:4x4 or h100:8"),
    flag("enum", "job", "train", ["train", "sample"], "which program"),
    flag(
        "float",
        "utilisation",
        0.4,
        "fraction of the peak FLOPs that a step reaches",
        lower_bound=0.01,
        upper_bound=1.0,
    ),
    flag(
        "float",
        "effort",
        -1.0,
        "of the compiler: -1 is quick, 0 what a run itself uses; until JAX 0.10",
        lower_bound=-1.0,
        upper_bound=1.0,
    ),
    configs={"config": REQUIRED},
)
def plan(config, topology: str, job: str, utilisation: float, effort: float) -> None:
    """gigatok plan --config=configs/tokenizer.py:xl_xxl --topology=v5p:4x4x2 [--config.FIELD=...]

    Compiles the training step (or, with --job=sample, a generator's sampling) for devices that need
    not exist here: TPUs v4, v5e, v5p, v6e as CHIP:AxB or CHIP:AxBxC, with the `tpu` extra. Prints
    each device's memory by part, FLOPs, bytes, a lower bound on the time of a step, and the days of
    training. GPUs (a100, h100, h200, b200 as CHIP:COUNT), and TPUs without the extra, are estimated
    from shapes. Exits with 1 if the memory does not suffice, after listing settings that fit.
    """
    from gigatok_jax.planning import plan as planning
    from gigatok_jax.training import GeneratorRun, TokenizerRun

    if not isinstance(config, TokenizerRun | GeneratorRun):
        raise UserError("--config: expected the run of a tokenizer or a generator")
    planning.plan(config, topology, job, utilisation, effort)


@verb(
    "convert a checkpoint of the reference to a bundle, or back",
    flag("multi_string", "from", None, "what to read", required=True),
    required("out", "what to write"),
    flag(
        "string",
        "model",
        "",
        "architecture: b_l, ... or dinov2_vitb14, ...; or a bundle of the same one",
    ),
    flag("string", "weights", "auto", "which weights of the checkpoint: model, ema or auto"),
    flag("boolean", "to_torch", False, "convert a bundle to a checkpoint"),
    lambda flag_values: flags.DEFINE_alias("to-torch", "to_torch", flag_values=flag_values),
    positional="kind",
)
def convert(kind: list[str], to_torch: bool, model: str, weights: str, out: str, **values) -> None:
    """gigatok convert KIND --from=FILE --out=DIR, or --to-torch --from=DIR --out=FILE

    Converts a checkpoint of the reference (.pt, .safetensors) to a bundle, or a bundle back. KIND:
    tokenizer, generator, dino, dinov2, clip, siglip, lpips, inception. For a checkpoint in several
    files, repeat --from.
    """
    from gigatok_jax.weights import convert as converters

    sources = values["from"]
    if len(kind) != 1:
        raise UserError(f"expected one KIND of {', '.join(converters.KINDS)}, got {kind}")
    if to_torch:
        if len(sources) != 1:
            raise UserError(f"--from: expected one bundle, got {sources}")
        converters.to_file(kind[0], sources[0], pathlib.Path(out))
    else:
        converters.to_bundle(kind[0], sources, pathlib.Path(out), model=model, weights=weights)
    print(out)


@verb(
    "fetch published weights",
    positional="names",
)
def weights(names: list[str]) -> None:
    """gigatok weights fetch NAME

    Downloads published weights into the cache (GIGATOK_CACHE), checks them and converts them.
    """
    from gigatok_jax.weights import convert as converters
    from gigatok_jax.weights import fetch

    if len(names) != 2 or names[0] != "fetch":
        raise UserError(f"expected: weights fetch NAME, with NAME of {', '.join(fetch.PUBLISHED)}")
    print(converters.fetch_bundle(names[1]))


@verb(
    "train and probe a tiny tokenizer on drawings that the program makes itself",
    flag("string", "workdir", "runs/demo", "where everything is written"),
    configs={"tokenizer": "configs/demo.py:tokenizer", "probe": "configs/demo.py:probe"},
)
def demo(workdir: str, tokenizer, probe) -> None:
    """gigatok demo [--workdir=DIR] [--tokenizer.FIELD=VALUE ...] [--probe.FIELD=VALUE ...]

    Trains a tiny tokenizer on drawings that the program makes itself, with every loss and the
    teacher that comes with it; reconstructs held-out drawings; and probes the tokenizer: trains a
    small generator on its codes, samples by class, and writes report.html (configs/demo.py). Takes
    minutes on two cores. DIR gets tokenizer/ (the run), drawings/ (held out), reconstructions/,
    samples/, and probe/ (see `gigatok probe`).
    """
    from gigatok_jax import demo as demonstration

    demonstration.demo(pathlib.Path(workdir), tokenizer, probe)
