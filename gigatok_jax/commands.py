"""The verbs of the command line: their flags, and the library functions that they call.

A verb is a function of its flags' values, and its docstring is the help text. Functions import what
they need when they run, so that `gigatok --help` answers at once.
"""

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import dataclasses
import fnmatch
import itertools
import logging
import re
import types
from typing import Any

from absl import flags

from gigatok_jax.errors import UserError, first_line
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


def _sampling(values: dict[str, Any]) -> tuple[Any, set[str]]:
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


def _as_published(settings: Any, given: set[str], generator: Any) -> Any:
    """`settings` with those of a published generator that no flag has set.

    A flag of guidance sets all of it.
    """
    given = given | {*GUIDANCE} if given & {*GUIDANCE} else given
    published = {k: v for k, v in generator.made_by.get("sampling", {}).items() if k not in given}
    if not published:
        return settings
    logger.info("as published: %s", " ".join(f"--{k}={v}" for k, v in published.items()))
    return dataclasses.replace(settings, **published)


def _data(config: Any) -> Any:
    """The `data` of a configuration."""
    if config is None:
        raise UserError("--config: missing, expected a configuration with `data` to evaluate")
    if not hasattr(config, "data"):
        raise UserError("--config: expected that of a training run or a probe, which has `data`")
    return config.data


def _check_apart(flag: str, folder: Path, images: str, written: Iterable[str]) -> None:
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


def _check_no_evaluation(folder: Path) -> None:
    """Rejects a folder with the results of `evaluate`, whose files have the same names."""
    if (folder / MEASURED).exists():
        raise UserError(f"--out: expected a folder without results of evaluate, got {folder}")


def _check_data(flag: str, folder: Path, data: Any, *written: str) -> None:
    """`_check_apart` for the data of a configuration."""
    from gigatok_jax import distributed

    if data.source == "folder":
        distributed.in_main(lambda: _check_apart(flag, folder, data.path, written))


@verb(
    "train a tokenizer, a generator or a linear probe, or resume training",
    required("workdir", "folder of the run"),
    *PROCESSES,
    configs={"config": REQUIRED},
)
def train(config, workdir: str) -> None:
    """gigatok train --config=tokenizer:b_l --workdir=DIR [--config.FIELD=VALUE ...]

    Trains from scratch, or resumes from the newest checkpoint in DIR. Writes config.json,
    checkpoints/, metrics.jsonl, tensorboard/, pictures/ and, at the end, bundle/ to DIR.
    """
    from gigatok_jax.training import TASKS, loop

    if not isinstance(config, tuple(TASKS.values())):
        raise UserError(f"--config: expected a training run ({', '.join(TASKS)})")
    written = ("bundle", "checkpoints", "pictures", "tensorboard")
    _check_data("workdir", as_path(workdir), config.data, *written)
    loop.train(config, as_path(workdir))


@verb(
    "reconstruct images with a tokenizer, with metrics",
    required("tokenizer", TOKENIZER),
    required("images", "image file, or folder of images"),
    required("out", "folder for the results"),
    batch_size(8),
    SSIM_RANGE,
)
def reconstruct(tokenizer: str, images: str, out: str, **options: Any) -> None:
    """gigatok reconstruct --tokenizer=NAME --images=PATH --out=DIR

    Reconstructs an image, or all images in a folder and its subfolders. Writes grid.png (inputs
    over outputs), images/ (one PNG per image), and metrics.json: PSNR, SSIM, codebook usage, and
    LPIPS if its weights have been fetched (`gigatok weights fetch lpips_vgg16`).
    """
    from gigatok_jax import api, locks
    from gigatok_jax.evaluation import reconstruction

    source, folder = as_path(images), as_path(out)
    _check_no_evaluation(folder)
    _check_apart("out", folder, images, ("images", "grid.png"))
    loaded = api.load_tokenizer(tokenizer, where="--tokenizer")
    with locks.hold(folder):
        reconstruction.reconstruct(loaded, source, folder, **options)


@verb(
    "store a data set's images as records, for fast reading",
    flag(
        "multi_string",
        "from",
        None,
        "folder of images, or .tar or .parquet files: a folder, a pattern, or repeated",
        required=True,
    ),
    required("out", "folder for the records; with --to=tfds, DATA_DIR/NAME/VERSION"),
    flag("enum", "to", "records", ["records", "tfds"], "for data.source=records, or a TFDS set"),
    flag(
        "integer",
        "holdout",
        20,
        "if --from has no validation images, hold out one image in so many; 0: none",
        lower_bound=0,
    ),
    flag("integer", "shard_images", 1024, "images per shard", lower_bound=1),
    *PROCESSES,
    devices=False,
)
def pack(out: str, **options: Any) -> None:
    """gigatok pack --from=PATH [--from=PATH ...] --out=DIR

    Stores images in ArrayRecord shards, with the bytes of their files, labels, names and class
    names. PATH is one of these, or a pattern such as "/data/photos-{train,val}-*.tar":
      a folder of images, as for data.source=folder
      tar files: webdataset shards, or ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar
      Parquet files, as in ILSVRC/imagenet-1k on the Hugging Face Hub
    After a kill, the same command resumes. Files that have changed since are rejected. To train on
    the records, use --config.data.source=records --config.data.path=DIR. With --to=tfds, DIR is
    DATA_DIR/NAME/VERSION, such as /data/tfds/imagenet2012/5.1.0: to train on them, use
    --config.data.path=DATA_DIR --config.data.name=NAME.
    """
    from gigatok_jax import distributed, packing

    folder = as_path(out)
    with distributed.locked(folder):
        packing.pack(options.pop("from"), folder, **options)


@verb(
    "store the codes of a data set",
    required("tokenizer", TOKENIZER),
    required("out", "folder for the codes"),
    flag(
        "list",
        "crop_factors",
        ["1.1"],
        "store ten crops per factor, from a centre crop of factor times the image size; "
        "1.1,1.05 adds the reference's second set; empty: one centre crop",
    ),
    batch_size(32, "images read, and crops encoded, per batch"),
    flag("integer", "shard_images", 4096, "images per shard", lower_bound=1),
    flag(
        "enum",
        "format",
        "records",
        ["records", "parquet", "npz"],
        "also write one file per split for other programs; records: do not",
    ),
    flag("boolean", "overwrite", False, "replace the codes in --out"),
    *PROCESSES,
    configs={"config": REQUIRED},
)
def encode(tokenizer: str, config, out: str, crop_factors: list[str], **options: Any) -> None:
    """gigatok encode --tokenizer=NAME --config=FILE --out=DIR [--config.data.FIELD=VALUE ...]

    Stores the codes of the config's data set: ten crops of each training image, and the centre crop
    of each validation image. After a kill, the same command resumes. Images that have changed since
    are rejected; --overwrite encodes them anew. To train on the codes, use
    --config.data.source=codes --config.data.path=DIR. For other programs, --format=parquet adds
    train.parquet and validation.parquet (a row per crop: codes, label, key, crop), and --format=npz
    adds train.npz and validation.npz (codes [images, crops, N], labels, keys).
    """
    from gigatok_jax import api, distributed, encoding

    try:
        factors = tuple(float(factor) for factor in crop_factors)
    except ValueError:
        raise UserError(f"--crop_factors: expected numbers, got {crop_factors}") from None
    data, folder = _data(config), as_path(out)
    _check_data("out", folder, data)
    loaded = api.load_tokenizer(tokenizer, where="--tokenizer")
    with distributed.locked(folder):
        encoding.encode(loaded, data, folder, crop_factors=factors, **options)


@verb(
    "sample images by class from a generator, or complete images",
    required("generator", MODEL),
    flag("string", "tokenizer", "", ITS_TOKENIZER),
    required("out", "folder for the images"),
    flag("list", "classes", ["all"], "numbers, ranges and names, such as 0,10-19,otter, or all"),
    flag(
        "integer",
        "count",
        0,
        "number of images; 0: 8 per class; with --from, completions per image; 0: 4",
        lower_bound=0,
    ),
    flag("string", "from", "", "image file or folder of images to complete"),
    flag(
        "float",
        "keep",
        None,
        "with --from: fraction of an image's codes to keep; default: 0.5",
        lower_bound=0.0,
        upper_bound=1.0,
    ),
    flag("boolean", "random_classes", False, "choose classes at random, not in turn"),
    batch_size(32),
    flag("integer", "seed", 0, "random seed of codes and classes", **SEED),
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
    keep: float | None,
    **sampling: Any,
) -> None:
    """gigatok sample --generator=NAME [--tokenizer=NAME] --classes=0,1,207 --out=DIR

    Samples images by class. A published generator, such as gigatok_gpt_b_s_s, brings its tokenizer
    and guidance. Writes grid.png (one class per row), images/ (one PNG per image) and
    samples.npz in the layout of ADM's evaluator: `arr_0`, uint8 [n, H, W, 3], and `arr_1`, the
    classes. After a kill, the same command resumes. Image n does not depend on the others.

    With --from=IMAGES, completes images instead: keeps the first of their codes (--keep=0.5) and
    draws the others, four times. The first codes of a 2D tokenizer are the top of the image; those
    of a 1D tokenizer belong to all of it. --classes names the images' class; without it, the
    generator is not told a class, and there is no guidance.
    """
    import numpy as np

    from gigatok_jax import api, distributed, locks
    from gigatok_jax.evaluation import completion, generation

    source = sampling.pop("from")
    if source and (random_classes or distributed.started()):
        what = "no --random_classes" if random_classes else "a single process"
        raise UserError(f"--from: expected {what} when images are completed")
    if keep is not None and not source:
        raise UserError("--keep: expected --from, the images to complete")
    settings, given = _sampling(sampling)
    _check_no_evaluation(as_path(out))
    loaded = api.load_generator(generator, where="--generator")
    if source:
        _check_apart("out", as_path(out), source, ("images", "grid.png"))
        label = loaded.config.null_class
        if classes != ["all"]:
            settings = _as_published(settings, given, loaded)
            label, *more = _class_numbers(classes, loaded.trained, loaded.class_names)
            if more:
                raise UserError(f"--classes: expected one class with --from, got {classes}")
        elif settings.guidance > 1:
            raise UserError("--guidance: expected 1 with --from and without --classes")
        matching = generation.load_matching_tokenizer(tokenizer, loaded)
        folder = as_path(out)
        share = 0.5 if keep is None else keep
        options = {"label": label, "share": share, "count": count or 4}
        with locks.hold(folder):
            completion.complete(
                loaded,
                matching,
                as_path(source),
                settings,
                folder,
                seed=seed,
                batch_size=batch_size,
                **options,
            )
        return
    settings = _as_published(settings, given, loaded)
    numbers = _class_numbers(classes, loaded.trained, loaded.class_names)
    count = count or generation.COLUMNS * len(numbers)
    if random_classes:
        order = np.random.default_rng(seed).choice(numbers, count)
    else:
        order = np.resize(numbers, count)
    matching = generation.load_matching_tokenizer(tokenizer, loaded)
    folder = as_path(out)
    with distributed.locked(folder):
        generation.sample(
            loaded,
            matching,
            order,
            settings,
            folder,
            class_names=loaded.class_names,
            seed=seed,
            batch_size=batch_size,
        )


def _class_numbers(items: list[str], trained: Sequence[int], names: Sequence[str]) -> list[int]:
    """Expands "all", or numbers, ranges such as "10-19" and names, to numbers of classes.

    The classes of ImageNet have two names, a WordNet id and a word.
    """
    import difflib

    from gigatok_jax import imagenet
    from gigatok_jax.api import class_list

    if items == ["all"]:
        return list(trained)
    numbers_of, ranges = collections.defaultdict(list), []
    for number, both in enumerate(zip(names, imagenet.words(names), strict=True)):
        for name in {name.lower() for name in both}:
            numbers_of[name].append(number)
    for item in items:
        first, dash, last = item.partition("-")
        last = last if dash else first
        if first.isdecimal() and last.isdecimal() and int(first) <= int(last):
            ranges.append(range(int(first), int(last) + 1))
        elif found := numbers_of.get(item.strip().lower()):
            if len(found) > 1:
                raise UserError(
                    f"--classes: expected a name of one class, got {item!r}, which is that of "
                    f"{', '.join(map(str, found))}; give the number"
                )
            ranges.append(found)
        else:
            near = difflib.get_close_matches(item.lower(), numbers_of, 3, 0.5)
            hint = f"; is it {' or '.join(map(repr, near))}?" if near else ""
            raise UserError(
                "--classes: expected numbers, ranges and names of classes, such as 0,10-19, got "
                f"{item!r}{hint}"
            )
    known, numbers = set(trained), itertools.chain.from_iterable(ranges)
    # The first few: a range may be longer than memory.
    bad = list(itertools.islice((number for number in numbers if number not in known), 6))
    if bad or not ranges:
        more = " and more" if len(bad) > 5 else ""
        raise UserError(
            f"--classes: expected trained classes, {class_list(trained)}, got "
            f"{bad[:5] or items}{more}"
        )
    return [number for some in ranges for number in some]


@verb(
    "evaluate reconstruction, generation, samples, a generator's loss, or the cost of decoding",
    flag("string", "generator", "", MODEL),
    flag("string", "tokenizer", "", ITS_TOKENIZER),
    required("out", "folder for the results"),
    batch_size(32),
    flag(
        "string",
        "features",
        "inception",
        "network whose features are compared",
    ),
    flag("string", "samples", "", ".npz or folder of images"),
    flag("string", "reference", "", ".npz or folder of real images, or .npz of their statistics"),
    flag("enum", "split", "eval", ["train", "eval"], "split of the data to compare with"),
    flag("integer", "count", 50_000, "number of samples", lower_bound=2),
    flag("integer", "seed", 0, "random seed of codes and classes", **SEED),
    flag("boolean", "search", False, "search for the guidance with the lowest gFID"),
    *SAMPLING,
    SSIM_RANGE,
    flag("list", "decoders", ["s_b", "b_l", "xl_xxl"], "tokenizers to time"),
    flag("list", "generators", ["b", "l", "xxl"], "generators to time"),
    *PROCESSES,
    configs={"config": OPTIONAL},
    positional="measure",
)
def evaluate(measure: list[str], out: str, **values: Any) -> None:
    """gigatok evaluate MEASURE --out=DIR ...

    reconstruction --tokenizer=NAME --config=FILE: PSNR, SSIM, LPIPS (if its weights have been
      fetched), codebook usage and rFID on the evaluation images of the config's `data`.
    generation --generator=NAME --tokenizer=NAME (--reference=FILE.npz or --config=FILE): gFID,
      sFID, Inception Score, precision and recall of samples of random classes, as ADM's evaluator
      defines them. --search walks from --guidance, in steps of 0.25, to the scale with the lowest
      gFID. After a kill, the same command resumes.
    samples --samples=FILE.npz|FOLDER --reference=FILE.npz|FOLDER: these metrics of images from
      anywhere, which are not resized or cropped.
    loss --generator=NAME --config=FILE [--tokenizer=NAME]: mean cross entropy of the evaluation
      images' codes, given their classes. Images need --tokenizer, stored codes do not.
    cost [--decoders=s_b,b_l,xl_xxl] [--generators=b,l,xxl]: share of generation time that decoding
      takes on this machine, with random weights (paper, Table 4).

    --features=inception is FID's network. A teacher (dinov2_vitb14, embedded) replaces it; the
    distance is then called fd_dinov2 or fd_teacher. Writes metrics.json and pictures to OUT.
    """
    from gigatok_jax import distributed, files
    from gigatok_jax.evaluation import print_metrics

    measures = {
        "reconstruction": _evaluate_reconstruction,
        "generation": _evaluate_generation,
        "samples": _evaluate_samples,
        "loss": _evaluate_loss,
        "cost": _evaluate_cost,
    }
    if len(measure) != 1 or measure[0] not in measures:
        raise UserError(f"expected one of {', '.join(measures)}, got {measure}")
    (sampling, given), folder = _sampling(values), as_path(out)
    args = types.SimpleNamespace(**values, sampling=sampling, given=given, out=folder)
    if args.config is not None:
        _check_data("out", folder, _data(args.config), "guidance_*")
    if (folder / "images").exists():
        raise UserError(f"--out: expected a folder without the images/ of another verb, got {out}")
    with distributed.locked(folder):
        # Results of all measures have the same names.
        mark, record = folder / MEASURED, {"measure": measure[0]}
        distributed.in_main(lambda: files.claim(mark, record, "results", write=False))
        result, models = measures[measure[0]](args)
        print_metrics(result)
        if distributed.is_main():
            # So that a kill never leaves the metrics of one model beside the mark of another.
            (folder / "metrics.json").unlink(missing_ok=True)
            files.write_json(mark, record | {kind: m.fingerprint for kind, m in models.items()})
            files.write_json(folder / "metrics.json", result)
    print(folder)


def _name(args: types.SimpleNamespace, name: str) -> str:
    value = getattr(args, name)
    if not value:
        raise UserError(f"--{name}: missing, expected a {name}")
    return value


# These return the metrics, and the models that were measured.


def _evaluate_reconstruction(args: types.SimpleNamespace) -> tuple[dict[str, float], Models]:
    from gigatok_jax import api
    from gigatok_jax.evaluation import features, reconstruction

    tokenizer = api.load_tokenizer(_name(args, "tokenizer"), where="--tokenizer")
    metrics = reconstruction.evaluate(
        tokenizer,
        features.load(args.features),
        _data(args.config),
        args.out,
        batch_size=args.batch_size,
        ssim_range=args.ssim_range,
    )
    return metrics, {"tokenizer": tokenizer}


def _evaluate_generation(args: types.SimpleNamespace) -> tuple[dict[str, Any], Models]:
    from gigatok_jax import api
    from gigatok_jax.evaluation import features, fid, generation

    generator = api.load_generator(_name(args, "generator"), where="--generator")
    tokenizer = generation.load_matching_tokenizer(args.tokenizer, generator)
    sampling = _as_published(args.sampling, args.given, generator)
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
    evaluate, out = generation.evaluate, generation.guidance_folder(args.out, sampling)
    if args.search:
        evaluate, out = generation.evaluate_best, args.out
    metrics = evaluate(
        generator,
        tokenizer,
        extractor,
        reference,
        sampling,
        out,
        count=args.count,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    return metrics, {"generator": generator, "tokenizer": tokenizer}


def _evaluate_samples(args: types.SimpleNamespace) -> tuple[dict[str, Any], Models]:
    from gigatok_jax import distributed
    from gigatok_jax.evaluation import features, samples

    for name in ("samples", "reference"):
        if not getattr(args, name):
            raise UserError(f"--{name}: missing, expected an .npz file or a folder of images")
    extractor, options = features.load(args.features), {"batch_size": args.batch_size}
    place = as_path(args.samples)
    result = distributed.in_main(
        lambda: samples.evaluate(place, args.reference, extractor, **options)
    )
    return result or {}, {}


def _evaluate_loss(args: types.SimpleNamespace) -> tuple[dict[str, float], Models]:
    from gigatok_jax import api
    from gigatok_jax.evaluation import generation

    data, tokenizer = _data(args.config), None
    generator = api.load_generator(_name(args, "generator"), where="--generator")
    if args.tokenizer or data.source != "codes":
        tokenizer = generation.load_matching_tokenizer(args.tokenizer, generator)
    metrics = generation.evaluate_loss(generator, tokenizer, data, args.batch_size)
    return metrics, {"generator": generator}


def _evaluate_cost(args: types.SimpleNamespace) -> tuple[dict[str, Any], Models]:
    from gigatok_jax.evaluation import cost, protocol

    size = {"batch_size": args.batch_size, "guidance": args.sampling.guidance}
    table = cost.shares(args.decoders, args.generators, **size)
    print("decoder / generator" + "".join(f"{name:>10}" for name in args.generators))
    for decoder, row in table.items():
        print(f"{decoder:<19}" + "".join(f"{share:>10.1%}" for share in row.values()))
    return {"shares": table, "protocol": protocol.stamp("cost", **size)}, {}


@verb(
    "measure a model again, and compare with the numbers published of it",
    flag("string", "expected", "", "metrics.json of `evaluate`; default: see below"),
    flag("string", "tokenizer", "", ITS_TOKENIZER),
    flag("string", "reference", "", ".npz or folder of real images, or .npz of their statistics"),
    flag("string", "features", "inception", "network whose features are compared"),
    flag("string", "out", "", "folder for the results; default: runs/verify/NAME"),
    batch_size(32),
    *PROCESSES,
    configs={"config": "probe"},
    positional="names",
)
def verify(names: list[str], config, out: str, expected: str, features: str, **options) -> None:
    """gigatok verify NAME --config.data.path=PATH [--reference=FILE.npz]

    Measures a tokenizer or a generator by the protocol of its numbers, prints what was expected and
    found, and exits with 1 if a number is outside of its tolerance, or the protocol is another one,
    so that numbers cannot be compared. The numbers are those of a metrics.json that `gigatok
    evaluate` wrote: --expected, or the file of this name beside the model. For published weights
    they are the authors' rFID or gFID, on ImageNet's 50,000 validation images or of 50,000 samples,
    which takes hours. Writes metrics.json and pictures to --out. After a kill, the same command
    resumes sampling.
    """
    from gigatok_jax import distributed, files
    from gigatok_jax.evaluation import features as extractors
    from gigatok_jax.evaluation import verification

    if len(names) != 1:
        raise UserError(f"expected the NAME of one model, got {names or 'none'}")
    name, data = names[0], _data(config)
    wanted = verification.expectations(name, expected)
    distance = wanted["protocol"]["features"]["distance"]
    if (distance == "fid") != (features == extractors.INCEPTION):  # before a download
        raise UserError(
            f"--features: expected the network of {distance}, as in the protocol, got {features}"
        )
    folder = as_path(out or f"runs/verify/{re.sub('[^0-9A-Za-z_.-]+', '_', name.strip('/'))}")
    _check_data("out", folder, data, "guidance_*")
    with distributed.locked(folder):
        mark, record = folder / MEASURED, {"measure": "verification", "name": name}
        distributed.in_main(lambda: files.claim(mark, record, "results", write=False))
        extractor = extractors.load(features)
        found, rows = verification.verify(name, wanted, data, extractor, out=folder, **options)
        if distributed.is_main():
            files.write_json(mark, record)
            files.write_json(folder / "metrics.json", found)
    print(f"{'metric':<18}{'expected':>12}{'found':>12}{'tolerance':>12}")
    for row in rows:
        print(f"{row.name:<18}" + "".join(f"{value:>12.4f}" for value in row[1:]))
    verification.check(wanted, found, rows)
    print(folder)


@verb(
    "AR probing: evaluate a tokenizer by training a small generator on its codes",
    required("tokenizer", TOKENIZER),
    required("workdir", "folder for the results"),
    *PROCESSES,
    configs={"config": REQUIRED},
)
def probe(tokenizer: str, workdir: str, config) -> None:
    """gigatok probe --tokenizer=NAME --workdir=DIR --config=probe [--config.FIELD=VALUE ...]

    AR probing (paper, 3.1): evaluates a tokenizer by training a small generator on its codes. The
    steps are below, by what they write. After a kill, the same command skips finished steps.
      reconstruction/  metrics and pictures of the evaluation images
      codes/           codes of all images
      generator/       training run of the small generator
      steps/loss.json  its validation loss
      generation/      metrics of its samples at the best guidance
      linear_probe/    training run of a linear probe of its features
      samples/         samples by class
      steps/time.json  times of encoding and decoding
      maps.png         principal components of the decoder's features (Fig. 8)
    tokenizer.json describes the tokenizer, results.json has all metrics, and report.html shows
    everything in one file.
    """
    from gigatok_jax import distributed
    from gigatok_jax.evaluation import probing

    if not isinstance(config, probing.ProbeConfig):
        raise UserError("--config: expected that of AR probing, such as --config=probe")
    folder = as_path(workdir)
    if (folder / "config.json").exists():
        raise UserError(f"--workdir: expected a folder without a training run, got {workdir}")
    _check_data("workdir", folder, config.data, *probing.STEPS)
    with distributed.locked(folder):
        probing.probe(tokenizer, config, folder)


@verb(
    "show probes or training runs in one HTML file",
    flag("string", "out", "", "HTML file; default: report.html in the first DIR"),
    positional="workdirs",
    devices=False,
)
def report(workdirs: list[str], out: str) -> None:
    """gigatok report DIR [DIR ...] [--out=FILE.html]

    Shows a run of `gigatok probe` or `gigatok train` in one HTML file: tables, curves, pictures and
    settings. A probe must be finished; a training run need not be. Several runs of one kind appear
    side by side: probes in the paper's table and figures, training runs in one chart per metric.
    """
    from gigatok_jax.evaluation import report as reports

    if not workdirs:
        raise UserError("expected workdirs of probes or of training runs")
    folders = [as_path(workdir) for workdir in workdirs]
    path = as_path(out) if out else folders[0] / "report.html"
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out: expected a file name that ends with .html, got {out}")
    reports.write(folders, path)
    print(path)


@verb(
    "compile a run for hardware you need not have: memory, FLOPs, time",
    required("topology", "devices, such as v5e:4x4 or h100:8"),
    flag(
        "integer",
        "ledger",
        0,
        "print where bytes, FLOPs and kernels go, in this many rows; 0: do not",
        lower_bound=0,
    ),
    flag("enum", "job", "train", ["train", "sample"], "program to compile"),
    flag(
        "float",
        "utilisation",
        0.4,
        "fraction of the peak FLOPs that a step is assumed to reach",
        lower_bound=0.01,
        upper_bound=1.0,
    ),
    flag(
        "float",
        "effort",
        -1.0,
        "compiler effort: -1 is quick, 0 is that of a real run; JAX 0.11 and newer always use 0",
        lower_bound=-1.0,
        upper_bound=1.0,
    ),
    configs={"config": REQUIRED},
    devices=False,
)
def plan(config, topology: str, job: str, utilisation: float, effort: float, ledger: int) -> None:
    """gigatok plan --config=tokenizer:xl_xxl --topology=v5p:4x4x2 [--config.FIELD=VALUE ...]

    Compiles the training step (or a generator's sampling, with --job=sample) for devices that need
    not exist: TPUs (v4 or v5p as CHIP:AxBxC, v5e or v6e as CHIP:AxB) with the `tpu` extra, GPUs
    (a100, h100, h200 or b200 as CHIP:COUNT or CHIP:HOSTSxCOUNT) with `cuda`. Without the extra,
    estimates from shapes. Prints memory per device, FLOPs, bytes, kernels, a lower bound on the
    step's time, and days of training. If memory is too small, lists settings that fit, and exits
    with 1. --ledger=30 shows the 30 places that move most bytes.
    """
    from gigatok_jax.planning import plan as planning
    from gigatok_jax.training import GeneratorRun, TokenizerRun

    if not isinstance(config, TokenizerRun | GeneratorRun):
        raise UserError("--config: expected the training run of a tokenizer or a generator")
    planning.plan(config, topology, job, utilisation, effort, ledger)


@verb(
    "convert the reference's checkpoints to bundles and back",
    flag("multi_string", "from", None, "checkpoint or bundle to read", required=True),
    required("out", "bundle or checkpoint to write"),
    flag(
        "string",
        "model",
        "",
        "architecture, such as b_l or dinov2_vitb14, or a bundle that has it",
    ),
    flag("string", "weights", "auto", "weights to take from the checkpoint: model, ema or auto"),
    flag("boolean", "to_torch", False, "convert a bundle to a checkpoint"),
    lambda flag_values: flags.DEFINE_alias("to-torch", "to_torch", flag_values=flag_values),
    positional="kind",
)
def convert(kind: list[str], to_torch: bool, model: str, weights: str, out: str, **values) -> None:
    """gigatok convert KIND --from=FILE --out=DIR, or --to-torch --from=DIR --out=FILE

    Converts a published checkpoint (.pt, .safetensors) to a bundle, or back. KIND is tokenizer,
    generator, vqgan, titok, dino, dinov2, clip, siglip, lpips or inception. For a checkpoint in
    several files, repeat --from.
    """
    from gigatok_jax import locks
    from gigatok_jax.weights import convert as converters

    sources = values["from"]
    if len(kind) != 1:
        raise UserError(f"expected one KIND of {', '.join(converters.KINDS)}, got {kind}")
    if to_torch:
        if len(sources) != 1:
            raise UserError(f"--from: expected one bundle, got {sources}")
        converters.to_file(kind[0], sources[0], as_path(out))
    else:
        folder = as_path(out)
        # A new folder appears with its weights; until then, there is nothing to lock.
        with locks.hold(folder) if folder.is_dir() else contextlib.nullcontext():
            converters.to_bundle(kind[0], sources, folder, model=model, weights=weights)
    print(out)


@verb("print versions, devices and the cache, for a report of a problem", devices=False)
def env() -> None:
    """gigatok env

    Prints the versions of Python and libraries, the devices that JAX finds, and the cache.
    """
    import importlib.metadata
    import platform

    import jax

    from gigatok_jax.files import cache_dir

    names = ["gigatok_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"]
    names += ["array_record", "pillow", "tensorflow-datasets", "torch", "libtpu"]
    names += [f"jax-cuda{n}-plugin" for n in (12, 13)]
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    try:
        kinds = [device.device_kind for device in jax.devices()]
        found["devices"] = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    except (RuntimeError, AssertionError) as error:
        found["devices"] = f"none ({first_line(error)})"
    found["cache"] = cache_dir()
    print("\n".join(f"{name:<20} {value}" for name, value in found.items()))


@verb(
    "list the installed configurations, or show all fields of one",
    configs={"config": OPTIONAL},
    positional="words",
    devices=False,
)
def config(words: list[str], config) -> None:
    """gigatok config list, or gigatok config show NAME [--config.a.b=c ...]

    Lists the installed configurations, or shows one. Each field is printed as the flag that sets
    it. Those that follow from others, such as the number of steps, are filled in.
    """
    import inspect
    import shlex

    from flax.traverse_util import flatten_dict

    from gigatok_jax.config import installed

    match words:
        case ["list"] if config is None:
            for name, module in installed().items():
                print(f"{name}: {inspect.getdoc(module)}\n")
        case ["show"] if config is not None:
            if hasattr(config, "resolved_optimizer"):
                resolved = {"steps": config.total_steps, "optimizer": config.resolved_optimizer}
                config = dataclasses.replace(config, **resolved)
            for name, value in flatten_dict(dataclasses.asdict(config), sep=".").items():
                print(f"--config.{name}={shlex.quote(str(value))}")
        case _:
            raise UserError(f"expected list, or show NAME, got {' '.join(words) or 'nothing'}")


@verb("list published weights, or download and convert them", positional="words")
def weights(words: list[str]) -> None:
    """gigatok weights list, or gigatok weights fetch NAME

    Lists published weights: kind, parameters, size as a bundle, the authors' rFID or gFID, and the
    folder if they are in the cache (GIGATOK_CACHE); and the models that come with the program. Or
    downloads published weights into the cache, checks and converts them, and prints the folder of
    the bundle. Commands fetch what they name by themselves.
    """
    import jax

    from gigatok_jax import bundles, locate
    from gigatok_jax.weights import convert as converters
    from gigatok_jax.weights import fetch

    def row(name, kind, count, figure, where):
        params = f"{count / 1e6:>6,.{0 if count > 1e7 else 1}f}M"
        size = f"{4 * count / 1e9:>5.2f} GB"  # float32
        print(f"{name:<28} {kind:<10} {params} {size}  {figure:<12} {where}")

    match words:
        case ["list"]:
            print(
                f"{'name':<28} {'kind':<10} {'params':>7} {'size':>8}  {'as published':<12} folder"
            )
            for name, published in fetch.PUBLISHED.items():
                count = converters.parameter_count(published.kind, published.model)
                folder = fetch.bundle_path(name) if fetch.is_there(name) else "not fetched"
                row(name, published.kind, count, published.figure, folder)
            for name, (kind, folder) in locate.INCLUDED.items():
                weights = bundles.load(folder, kind).weights["params"]
                row(name, kind, sum(x.size for x in jax.tree.leaves(weights)), "", "included")
        case ["fetch", name] if name in locate.INCLUDED:
            print(locate.INCLUDED[name][1])
        case ["fetch", name]:
            print(converters.fetch_bundle(name))
        case _:
            known = ", ".join(fetch.PUBLISHED)
            raise UserError(f"expected: weights list, or weights fetch NAME, with NAME of {known}")


@verb(
    "upload a model to the Hugging Face Hub",
    flag("boolean", "private", False, "create a private repository"),
    flag("string", "license", "", "license of the weights for the model card, such as apache-2.0"),
    flag(
        "multi_string",
        "metrics",
        [],
        "metrics.json of `evaluate` or results.json of `probe` for the model card; default: those "
        "beside the model",
    ),
    positional="places",
    devices=False,
)
def push(places: list[str], private: bool, license: str, metrics: list[str]) -> None:
    """gigatok push DIR hf://OWNER/REPO[/FOLDER][@BRANCH] [--private] [--metrics=FILE]

    Uploads a bundle, or the bundle of a workdir, in one commit: config.json, model.safetensors, and
    README.md, a model card with the metrics that were measured. Creates the repository if it does
    not exist, and leaves other files in it alone. The token is that of HF_TOKEN or `hf auth login`.
    The address then names the model, as in --tokenizer=hf://OWNER/REPO.
    """
    from gigatok_jax import publish

    if len(places) != 2:
        raise UserError(f"expected DIR and hf://OWNER/REPO, got {places}")
    files = [as_path(file) for file in metrics]
    print(publish.push(*places, private=private, license=license, metrics=files))


@verb(
    "train and probe a tiny tokenizer on generated drawings",
    flag("string", "workdir", "runs/demo", "folder for the results"),
    flag("boolean", "quick", False, "use the included models, and train nothing"),
    configs={"tokenizer": "configs/demo.py:tokenizer", "probe": "configs/demo.py:probe"},
)
def demo(workdir: str, quick: bool, tokenizer, probe) -> None:
    """gigatok demo [--workdir=DIR] [--tokenizer.FIELD=VALUE ...] [--probe.FIELD=VALUE ...]

    Or gigatok demo --quick [--workdir=DIR].

    Trains a tiny tokenizer on generated drawings of 64 pixels, with every loss and the embedded
    teacher; reconstructs held-out drawings; runs AR probing, with a small generator and
    report.html; samples by class; and completes drawings from half of their codes. Takes about ten
    minutes on two cores. Writes tokenizer/ (the run), drawings/ (held out), reconstructions/,
    probe/ (see `gigatok probe`), samples/ and completions.png to DIR.

    With --quick, reconstructs, samples and completes with the included models, drawings and
    drawings_gpt, within a minute.
    """
    from gigatok_jax import config, locks
    from gigatok_jax import demo as demonstration

    folder = as_path(workdir)
    if quick:
        for name, given in (("tokenizer", tokenizer), ("probe", probe)):
            if given != config.load(VERBS["demo"].configs[name]):
                raise UserError(f"--{name}: --quick trains nothing, so expected no settings")
        with locks.hold(folder):
            demonstration.quick(folder)
        return
    for data in (tokenizer.data, probe.data):
        _check_data("workdir", folder, data, *demonstration.FOLDERS)
    with locks.hold(folder):
        demonstration.demo(folder, tokenizer, probe)
