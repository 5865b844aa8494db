"""Verbs that measure: evaluate, verify, probe, report."""

import re
import types
from typing import Any

from gigatok_jax.commands.verbs import (
    ITS_TOKENIZER,
    MEASURED,
    MODEL,
    OPTIONAL,
    PROCESSES,
    REQUIRED,
    SAMPLING,
    SEED,
    SSIM_RANGE,
    TOKENIZER,
    Models,
    as_published,
    batch_size,
    check_data,
    data_of,
    flag,
    required,
    sampling_settings,
    verb,
)
from gigatok_jax.errors import UserError
from gigatok_jax.files import as_path


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
    (sampling, given), folder = sampling_settings(values), as_path(out)
    args = types.SimpleNamespace(**values, sampling=sampling, given=given, out=folder)
    if args.config is not None:
        check_data("out", folder, data_of(args.config), "guidance_*")
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


def _evaluate_reconstruction(args: types.SimpleNamespace) -> tuple[dict[str, float], Models]:
    from gigatok_jax import api
    from gigatok_jax.evaluation import features, reconstruction

    tokenizer = api.load_tokenizer(_name(args, "tokenizer"), where="--tokenizer")
    metrics = reconstruction.evaluate(
        tokenizer,
        features.load(args.features),
        data_of(args.config),
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
    sampling = as_published(args.sampling, args.given, generator)
    extractor = features.load(args.features)
    reference = fid.load_reference(
        args.reference,
        None if args.reference else data_of(args.config),
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

    data, tokenizer = data_of(args.config), None
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
    name, data = names[0], data_of(config)
    wanted = verification.expectations(name, expected)
    distance = wanted["protocol"]["features"]["distance"]
    if (distance == "fid") != (features == extractors.INCEPTION):  # before a download
        raise UserError(
            f"--features: expected the network of {distance}, as in the protocol, got {features}"
        )
    folder = as_path(out or f"runs/verify/{re.sub('[^0-9A-Za-z_.-]+', '_', name.strip('/'))}")
    check_data("out", folder, data, "guidance_*")
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
    check_data("workdir", folder, config.data, *probing.STEPS)
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
