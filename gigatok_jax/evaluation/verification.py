"""Checks that a model gives the numbers that are expected of it, by the protocol of these numbers.

The expectations are a `metrics.json` of `gigatok evaluate`, or the figure that the authors of
published weights give. These only name the number of images and the distance, FID.
"""

from collections.abc import Mapping
import dataclasses
import tempfile
from typing import Any, NamedTuple

from gigatok_jax import api
from gigatok_jax.data.sources import DataConfig, open_source
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import fid, generation, protocol, reconstruction
from gigatok_jax.evaluation.features import Extractor
from gigatok_jax.files import Path, as_path, read_json
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.weights import fetch

PUBLISHED_IMAGES = 50_000  # of ImageNet's validation set, and samples

# By how much a number may differ between machines. Distances of samples also differ between random
# seeds.
TOLERANCES = {
    "rfid": 0.02,
    "gfid": 0.1,
    "sfid": 0.2,
    "inception_score": 3.0,
    "precision": 0.01,
    "recall": 0.01,
    "psnr": 0.02,
    "ssim": 0.001,
    "lpips": 0.001,
    "codebook_usage": 0.005,
}
RELATIVE = 0.01  # of other metrics, relative to the expected number


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


def expectations(name: str, file: str = "") -> dict[str, Any]:
    """What is expected of a model: metrics and their "protocol", as in a `metrics.json`.

    Args:
      name: of the model, see `locate.find`.
      file: a `metrics.json`; "": that in the model's folder, or what is published of it.

    Raises:
      UserError: there are no expectations, or the file has none that can be verified.
    """
    own = as_path(file or name) / ("" if file else "metrics.json")
    if not file and not own.exists():
        if name not in fetch.PUBLISHED:
            raise UserError(
                f"--expected: missing, expected a metrics.json of `gigatok evaluate`; {name} is no "
                f"published name and has no {own.name}"
            )
        return _published(name)
    found = read_json(own, "expected metrics")
    measure = found.get("protocol", {}).get("measure")
    if measure not in ("reconstruction", "generation"):
        raise UserError(
            f"{own}: expected the protocol of an evaluation of reconstruction or generation, got "
            f"{measure or 'none'}"
        )
    return found


def _published(name: str) -> dict[str, Any]:
    """The figure of published weights, such as "rFID 1.01"."""
    published = fetch.PUBLISHED[name]
    if not published.figure or published.judged:
        why = f"its figure is of images {published.judged}" if published.judged else "no figure"
        raise UserError(f"{name}: cannot be verified: {why}")
    metric, value = published.figure.split()
    how = {"images": PUBLISHED_IMAGES, "features": {"distance": "fid"}}
    if published.tokenizer:
        how |= {"measure": "generation", "sampling": dict(published.sampling)}
        how["searched"] = published.searched
    else:
        how |= {"measure": "reconstruction", "crop": published.crop}
    return {metric.lower(): float(value), "protocol": how}


def verify(
    name: str,
    expected: Mapping[str, Any],
    data: DataConfig,
    extractor: Extractor,
    *,
    tokenizer: str = "",
    reference: str = "",
    out: Path | None = None,
    batch_size: int,
) -> tuple[list[Row], list[str]]:
    """Measures a model as `expected` was.

    Args:
      name: of a tokenizer or a generator, see `locate.find`.
      expected: see `expectations`.
      data: whose evaluation images are reconstructed, or compared with samples.
      extractor: the network whose features are compared.
      tokenizer: of a generator; "": the published one.
      reference: of a generator; "": `data`, see `fid.read_reference`.
      out: folder that keeps the results, so that the same call resumes; None: none.
      batch_size: images per batch.

    Returns:
      A row per expected metric, and in what the protocols differ. Rows of different protocols
      cannot be compared.

    Raises:
      UserError: the model or the data cannot be read, the number of images or the network is
        another one, or an expected metric cannot be measured.
    """
    how = expected["protocol"]
    for field, value in protocol.features(extractor).items():
        if how["features"].get(field, value) != value:
            raise UserError(
                f"--features: expected {field} {how['features'][field]}, as in the protocol, got "
                f"{value}"
            )
    with tempfile.TemporaryDirectory() as temporary:
        folder = out or as_path(temporary)
        if how["measure"] == "reconstruction":
            found = _reconstruct(name, how, data, extractor, folder, batch_size)
        else:
            model = api.load_generator(name)
            name = tokenizer or model.made_by.get("published_tokenizer", "")
            if not name:
                raise UserError("--tokenizer: missing, expected that of the generator")
            models = model, generation.load_matching_tokenizer(name, model), extractor
            found = _generate(*models, how, data, reference, folder, batch_size)
    rows = []
    for metric, value in expected.items():
        if metric in ("images", "guidance") or not isinstance(value, int | float):
            continue
        if metric not in found:
            raise UserError(f"{metric}: expected by the protocol, but cannot be measured here")
        tolerance = TOLERANCES.get(metric, RELATIVE * abs(value))
        rows.append(Row(metric, value, found[metric], tolerance))
    theirs, ours = (protocol.comparable(each) for each in (how, found["protocol"]))
    known = theirs if "versions" in how else {name: theirs[name] for name in theirs & ours.keys()}
    return rows, protocol.differences(known, {name: ours.get(name) for name in known})


def check(rows: list[Row], differences: list[str]) -> None:
    """Raises `Deviation` if the protocols differ or a row does not pass; see `verify`."""
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
    how: Mapping[str, Any],
    data: DataConfig,
    extractor: Extractor,
    out: Path,
    batch_size: int,
) -> dict[str, Any]:
    model = api.load_tokenizer(name)
    data = dataclasses.replace(data, eval_resize=how["crop"])
    images = len(open_source(data, train=False, image_size=model.config.image_size))
    if images < how["images"]:  # some of more may be damaged
        raise UserError(
            f"--config.data: expected {how['images']:,} evaluation images, as in the protocol, got "
            f"{images:,}"
        )
    ssim_range = how.get("ssim_range", 1)
    options = {"batch_size": batch_size, "ssim_range": ssim_range}
    return reconstruction.evaluate(model, extractor, data, out, **options)


def _generate(
    generator: api.PretrainedGenerator,
    tokenizer: api.AnyTokenizer,
    extractor: Extractor,
    how: Mapping[str, Any],
    data: DataConfig,
    reference: str,
    out: Path,
    batch_size: int,
) -> dict[str, Any]:
    data = dataclasses.replace(data, eval_resize=how.get("reference", {}).get("crop", "adm"))
    real = fid.load_reference(
        reference,
        data,
        extractor,
        count=how["images"],
        image_size=tokenizer.config.image_size,
        batch_size=batch_size,
    )
    evaluate = generation.evaluate_best if how.get("searched") else generation.evaluate
    settings = SamplingConfig(**how["sampling"])
    size = {"count": how["images"], "seed": how.get("seed", 0), "batch_size": batch_size}
    return evaluate(generator, tokenizer, extractor, real, settings, out, **size)
