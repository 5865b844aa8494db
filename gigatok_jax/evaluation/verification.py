"""Checks that a model gives the numbers that are expected of it, by the protocol of these numbers.

The expectations are a `metrics.json` of `gigatok evaluate`, or the figure that the authors of
published weights give. The latter's protocol has only what the authors say.
"""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any, NamedTuple

from gigatok_jax import api, distributed, frozen_networks, locate
from gigatok_jax.data.sources import DataConfig, open_source
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import fid, generation, protocol, reconstruction, samples
from gigatok_jax.evaluation.features import Extractor
from gigatok_jax.files import Path, as_path, read_json
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.weights import fetch

logger = logging.getLogger(__name__)

# By how much a number may differ between machines, at least. Distances of samples also differ
# between random seeds, and published ones are of an unknown seed.
TOLERANCES = {
    "rfid": 0.02,
    "gfid": 0.1,
    "sfid": 0.2,
    "precision": 0.01,
    "recall": 0.01,
    "psnr": 0.02,
    "ssim": 0.001,
    "lpips": 0.001,
    "codebook_usage": 0.005,
}
RELATIVE = 0.02  # of the expected number, if that is more; PSNR, SSIM and shares are absolute
ABSOLUTE = ("psnr", "ssim", "precision", "recall", "codebook_usage")
NO_METRICS = ("images", "guidance", "reference_images")  # numbers that say how


class Deviation(UserError):
    """A model does not give the numbers that are expected of it."""

    exit_code = 1


class Row(NamedTuple):
    """One metric."""

    name: str
    expected: float
    found: float
    tolerance: float

    @property
    def passes(self) -> bool:
        return abs(self.found - self.expected) <= self.tolerance  # False for NaN


def tolerance(metric: str, expected: float) -> float:
    """By how much a metric may differ."""
    least = TOLERANCES.get(metric, 0.0)
    return least if metric in ABSOLUTE else max(least, RELATIVE * abs(expected))


def expectations(name: str, file: str = "") -> dict[str, Any]:
    """What is expected of a model: metrics and their "protocol", as in a `metrics.json`.

    Args:
      name: of the model, see `locate.find`.
      file: a `metrics.json`; "": that in the model's folder, or what is published of it.

    Raises:
      UserError: there are no expectations, or the file has none that can be verified.
    """
    if not file and locate.is_name(name) and name in fetch.PUBLISHED:
        return _published(name)
    own = as_path(file) if file else locate.find(name) / "metrics.json"
    if not own.exists():
        raise UserError(
            f"--expected: expected a metrics.json of `gigatok evaluate`, found none at {own}"
        )
    found = read_json(own, "expected metrics")
    stamp = found.get("protocol") or {}
    needed = {"reconstruction": {"crop", "image_size"}, "generation": {"sampling", "image_size"}}
    measure = stamp.get("measure")
    if measure not in needed or not {"images", "features", *needed[measure]} <= stamp.keys():
        raise UserError(
            f"{own}: expected the protocol of `evaluate reconstruction` or `evaluate generation`, "
            f"got that of {measure or 'nothing'}"
        )
    return found


def _published(name: str) -> dict[str, Any]:
    """The figure of published weights, such as "rFID 1.01"."""
    published = fetch.PUBLISHED[name]
    if not published.figure or published.not_verifiable:
        why = published.not_verifiable or "none is published"
        raise UserError(f"{name}: its figure cannot be verified: {why}")
    metric, value = published.figure.split()
    expected = {"images": samples.PUBLISHED, "features": {"distance": "fid"}}
    if published.tokenizer:
        expected |= {"measure": "generation", "sampling": dict(published.sampling)}
        expected |= {"searched": published.searched, "reference": {"members": fid.MEMBERS}}
    else:
        expected |= {"measure": "reconstruction", "crop": published.crop}
    return {metric.lower(): float(value), "protocol": expected}


def verify(
    name: str,
    expected: Mapping[str, Any],
    data: DataConfig,
    extractor: Extractor,
    *,
    tokenizer: str = "",
    reference: str = "",
    out: Path,
    batch_size: int,
) -> tuple[dict[str, Any], list[Row]]:
    """Measures a model as `expected` was.

    Args:
      name: of a tokenizer or a generator, see `locate.find`.
      expected: see `expectations`.
      data: whose evaluation images are reconstructed, or compared with samples.
      extractor: the network whose features are compared.
      tokenizer: of a generator; "": the published one.
      reference: of a generator; "": `data`, see `fid.read_reference`.
      out: folder for the results; the same call resumes a generator's evaluation.
      batch_size: images per batch.

    Returns:
      The metrics, as `evaluate` gives them, and a row per expected one.

    Raises:
      UserError: the model or the data cannot be read, what would be measured is not what the
        protocol says, or an expected metric cannot be measured.
    """
    wanted = expected["protocol"]
    _compare(wanted["features"], protocol.features(extractor), "--features")
    if "lpips" in expected and not frozen_networks.has_lpips():
        raise UserError("lpips: cannot be measured; first: gigatok weights fetch lpips_vgg16")
    if wanted["measure"] == "reconstruction":
        for flag, value in {"tokenizer": tokenizer, "reference": reference}.items():
            if value:
                raise UserError(f"--{flag}: expected none for a tokenizer, got {value}")
        found = _reconstruct(name, wanted, data, extractor, out, batch_size)
    else:
        model = api.load_generator(name)
        models = model, generation.load_matching_tokenizer(tokenizer, model), extractor
        found = _generate(*models, wanted, data, reference, out, batch_size)
    metrics = {
        metric: value
        for metric, value in expected.items()
        if metric not in NO_METRICS and isinstance(value, int | float)
    }
    if missing := metrics.keys() - found.keys():
        raise UserError(f"{min(missing)}: expected by the protocol, but cannot be measured")
    return found, [
        Row(metric, value, found[metric], tolerance(metric, value))
        for metric, value in metrics.items()
    ]


def _compare(wanted: Mapping[str, Any], found: Mapping[str, Any], flag: str) -> None:
    """Raises UserError at the first field that both have and that differs."""
    for field, value in wanted.items():
        if found.get(field, value) != value:
            raise UserError(
                f"{flag}: expected {field} {value}, as in the protocol, got {found[field]}"
            )


def check(expected: Mapping[str, Any], found: Mapping[str, Any], rows: list[Row]) -> None:
    """Raises `Deviation` if a row does not pass, or the protocols differ; see `verify`.

    Pixels that differ are only logged: versions of Pillow decode JPEG files differently.
    """
    theirs, ours = (protocol.comparable(each["protocol"]) for each in (expected, found))
    if "versions" not in expected["protocol"]:  # published: only what the authors say
        theirs = {name: value for name, value in theirs.items() if name in ours}
    # Fields that a newer program has added are no difference.
    ours = {name: value for name, value in ours.items() if name in theirs}
    differences = protocol.differences(theirs, ours)
    pixels = [each for each in differences if each.split()[0].endswith("pixels")]
    if pixels:
        logger.warning(
            "the images are not the same, pixel for pixel: %s; versions then %s, now %s",
            "; ".join(pixels),
            *(each["protocol"].get("versions") for each in (expected, found)),
        )
    differences = [each for each in differences if each not in pixels]
    if differences:
        raise Deviation(f"protocol: expected the same, got {'; '.join(differences)}")
    for row in rows:
        if not row.passes:
            raise Deviation(
                f"{row.name}: expected {row.expected:.4f} within {row.tolerance:.4f}, got "
                f"{row.found:.4f}"
            )


def _reconstruct(
    name: str,
    wanted: Mapping[str, Any],
    data: DataConfig,
    extractor: Extractor,
    out: Path,
    batch_size: int,
) -> dict[str, Any]:
    model = api.load_tokenizer(name)
    _compare(wanted, {"image_size": model.config.image_size}, name)
    data = dataclasses.replace(data, eval_resize=wanted["crop"])
    images = len(open_source(data, train=False, image_size=model.config.image_size))
    if images < wanted["images"]:  # some of more may be damaged
        raise UserError(
            f"--config.data: expected {wanted['images']:,} evaluation images, as in the protocol, "
            f"got {images:,}"
        )
    options = {"batch_size": batch_size, "ssim_range": wanted.get("ssim_range", 1)}
    return reconstruction.evaluate(model, extractor, data, out, **options)


def _generate(
    generator: api.PretrainedGenerator,
    tokenizer: api.AnyTokenizer,
    extractor: Extractor,
    wanted: Mapping[str, Any],
    data: DataConfig,
    reference: str,
    out: Path,
    batch_size: int,
) -> dict[str, Any]:
    _compare(wanted, {"image_size": tokenizer.config.image_size}, "--tokenizer")
    real = wanted.get("reference", {})
    if not reference and "crop" not in real:
        what = real.get("name", "ADM's VIRTUAL_imagenet256_labeled.npz")
        raise UserError(f"--reference: missing, expected {what}, as in the protocol")
    data = dataclasses.replace(data, eval_resize=real.get("crop", "adm"))
    loaded = fid.load_reference(
        reference,
        data,
        extractor,
        count=wanted["images"],
        image_size=tokenizer.config.image_size,
        batch_size=batch_size,
        train=real.get("split") == "training",
    )
    theirs = {name: value for name, value in real.items() if name not in ("name", "pixels")}

    def compare():  # before hours of sampling
        _compare(theirs, loaded.described, "--reference" if reference else "--config.data")

    distributed.in_main(compare)
    settings = SamplingConfig(**wanted["sampling"])
    evaluate = generation.evaluate_best
    if not wanted.get("searched"):
        evaluate, out = generation.evaluate, generation.guidance_folder(out, settings)
    size = {"count": wanted["images"], "seed": wanted.get("seed", 0), "batch_size": batch_size}
    return evaluate(generator, tokenizer, extractor, loaded, settings, out, **size)
