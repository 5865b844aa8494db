"""Verbs that show what models do: reconstruct, sample, app, demo."""

import collections
from collections.abc import Sequence
import itertools
from typing import Any

from gigatok_jax.commands.verbs import (
    ITS_TOKENIZER,
    MODEL,
    PROCESSES,
    SAMPLING,
    SEED,
    SSIM_RANGE,
    TOKENIZER,
    VERBS,
    as_published,
    batch_size,
    check_apart,
    check_data,
    check_no_evaluation,
    flag,
    required,
    sampling_settings,
    verb,
)
from gigatok_jax.errors import UserError
from gigatok_jax.files import as_path


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
    check_no_evaluation(folder)
    check_apart("out", folder, images, ("images", "grid.png"))
    loaded = api.load_tokenizer(tokenizer, where="--tokenizer")
    with locks.hold(folder):
        reconstruction.reconstruct(loaded, source, folder, **options)


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
    settings, given = sampling_settings(sampling)
    check_no_evaluation(as_path(out))
    loaded = api.load_generator(generator, where="--generator")
    folder, options = as_path(out), {"seed": seed, "batch_size": batch_size}
    if source:
        check_apart("out", folder, source, ("images", "grid.png"))
        label = loaded.config.null_class
        if classes != ["all"]:
            settings = as_published(settings, given, loaded)
            label, *more = class_numbers(classes, loaded.trained, loaded.class_names)
            if more:
                raise UserError(f"--classes: expected one class with --from, got {classes}")
        elif settings.guidance > 1:
            raise UserError("--guidance: expected 1 with --from and without --classes")
        else:
            settings = as_published(settings, given | {"guidance"}, loaded)
        matching = generation.load_matching_tokenizer(tokenizer, loaded)
        options |= {"label": label, "share": 0.5 if keep is None else keep, "count": count or 4}
        with locks.hold(folder):
            completion.complete(loaded, matching, as_path(source), settings, folder, **options)
        return
    settings = as_published(settings, given, loaded)
    numbers = class_numbers(classes, loaded.trained, loaded.class_names)
    count = count or generation.COLUMNS * len(numbers)
    if random_classes:
        order = np.random.default_rng(seed).choice(numbers, count)
    else:
        order = np.resize(numbers, count)
    matching = generation.load_matching_tokenizer(tokenizer, loaded)
    options["class_names"] = loaded.class_names
    with distributed.locked(folder):
        generation.sample(loaded, matching, order, settings, folder, **options)


def class_numbers(items: list[str], trained: Sequence[int], names: Sequence[str]) -> list[int]:
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
    "reconstruct, sample and complete images in a browser",
    flag("multi_string", "tokenizer", [], f"{TOKENIZER}; repeated, to compare several"),
    flag("multi_string", "generator", [], f"{MODEL}; with its tokenizer, unless it is published"),
    flag("string", "reports", "runs", "folder that is searched for reports"),
    flag("string", "host", "127.0.0.1", "address to listen on; default: for this machine only"),
    flag("integer", "port", 7860, "port to listen on", lower_bound=1, upper_bound=65535),
    flag("boolean", "share", False, "make the page public, through Gradio's servers"),
    flag("string", "space", "", "do not serve: write a Hugging Face Space to this folder"),
)
def app(tokenizer: list[str], generator: list[str], reports: str, space: str, **options) -> None:
    """gigatok app [--tokenizer=NAME ...] [--generator=NAME ...] [--reports=DIR]

    Serves a page that shows what tokenizers and generators do: reconstructions and their codes,
    codes of one image in another, samples, completions, and the reports of probes. Without names,
    it uses the included models of drawings. Needs the extra `app`. Ctrl-C ends it.

    --space=DIR writes what a Hugging Face Space of this page needs: app.py, requirements.txt,
    README.md, the models that are folders, and the reports. Models that are names are downloaded
    when the Space starts.
    """
    if space:
        from gigatok_jax.app import space as spaces

        spaces.write(as_path(space), tokenizer, generator, as_path(reports))
        return
    from gigatok_jax.app import server

    server.serve(tokenizer, generator, as_path(reports), **options)


@verb(
    "train and probe a tiny tokenizer on generated drawings",
    flag("string", "workdir", "", "folder for the results; default: runs/demo, or runs/quick"),
    flag("boolean", "quick", False, "use the included models, and train nothing"),
    configs={"tokenizer": "configs/demo.py:tokenizer", "probe": "configs/demo.py:probe"},
)
def demo(workdir: str, quick: bool, tokenizer, probe) -> None:
    """gigatok demo [--workdir=DIR] [--tokenizer.FIELD=VALUE ...] [--probe.FIELD=VALUE ...]

    Or gigatok demo --quick [--workdir=DIR].

    Trains a tiny tokenizer on generated drawings of 64 pixels, with the embedded teacher;
    reconstructs held-out drawings; runs AR probing, with a small generator and report.html; samples
    by class; and completes drawings from half of their codes. Takes about ten minutes on two cores.
    Writes tokenizer/ (the run), drawings/ (held out), reconstructions/, probe/ (see `gigatok
    probe`), samples/ and completions.png to DIR.

    With --quick, reconstructs, samples and completes with the included models, drawings and
    drawings_gpt, within a minute.
    """
    from gigatok_jax import config, locks
    from gigatok_jax import demo as demonstration

    folder = as_path(workdir or ("runs/quick" if quick else "runs/demo"))
    if quick:
        for name, given in (("tokenizer", tokenizer), ("probe", probe)):
            if given != config.load(VERBS["demo"].configs[name]):
                raise UserError(f"--{name}: --quick trains nothing, so expected no settings")
        with locks.hold(folder):
            demonstration.quick(folder)
        return
    for data in (tokenizer.data, probe.data):
        check_data("workdir", folder, data, *demonstration.FOLDERS)
    with locks.hold(folder):
        demonstration.demo(folder, tokenizer, probe)
