"""AR probing: evaluates a tokenizer by a small generator trained on its codes (paper, 3.1)."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Annotated, Any, Literal

from flax.traverse_util import flatten_dict
import numpy as np
import pydantic
from pydantic import Field, PositiveInt

from gigatok_jax import api, distributed, encoding, files, pictures
from gigatok_jax.config import configclass
from gigatok_jax.data import codes as stored
from gigatok_jax.data.crops import BadImage, center_crop
from gigatok_jax.data.sources import DataConfig, open_source
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.evaluation import (
    cost,
    features,
    fid,
    generation,
    print_metrics,
    reconstruction,
    report,
)
from gigatok_jax.files import Path, as_path, read_json, write_json
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training.generator import GeneratorRun
from gigatok_jax.training.linear_probe import LinearProbeRun
from gigatok_jax.training.loop import train
from gigatok_jax.training.task import Seed
from gigatok_jax.training.telemetry import read_metrics

PER_CLASS = 8  # samples of each class in the report
MAPPED = 8  # images whose features are shown as maps
# Fields of the generator's architecture that depend on the tokenizer.
OF_TOKENIZER = ("codes", "codebook_size", "classes", "positions")


@configclass
class ProbeConfig:
    """Settings of AR probing (paper, 3.1 and appendix B).

    The probe sets the networks and data of `generator` and `linear_probe`, and the generator's
    numbers of codes and classes.
    """

    generator: GeneratorRun  # run of the small generator
    linear_probe: LinearProbeRun  # run of the linear probe
    data: DataConfig = DataConfig()  # training images to encode, evaluation images to compare
    # Ten crops of each training image are encoded per factor, from a center crop so much larger; ()
    # for the center crop alone.
    crop_factors: tuple[float, ...] = (1.1,)
    # Network whose features are compared: "inception" for FID, or the name of a teacher.
    features: str = "inception"
    # Folder or .npz of real images, or .npz of their statistics; "": the evaluation images.
    reference: str = ""
    ssim_range: Literal[1, 2] = 1  # data_range of SSIM; the reference program passes 2
    samples: Annotated[int, Field(ge=2)] = 50_000  # per guidance scale
    sampling: SamplingConfig = SamplingConfig(guidance=2.0)  # the search starts at its guidance
    batch_size: PositiveInt = 32  # images per batch, except in sampling
    shard_images: PositiveInt = 4_096  # images per shard of codes, a multiple of batch_size
    sample_batch_size: PositiveInt = 64  # images per batch in sampling
    seed: Seed = 0  # of the samples

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.shard_images % self.batch_size:
            raise ValueError(
                f"shard_images: expected a multiple of batch_size={self.batch_size}, got "
                f"{self.shard_images}"
            )
        if self.data.source == "codes":
            raise ValueError("data.source: expected images, got 'codes'")
        self.sampling.check_schedule("sampling.")
        return self

    def identity(self) -> dict[str, Any]:
        """Fields that affect results, by dotted name; the others may change on a restart."""
        data = self.data.content() | {"eval_resize": self.data.eval_resize}
        fields = dataclasses.asdict(self) | {"data": data}
        if self.reference:  # its content, wherever it lies
            fields["reference"] = fid.describe(as_path(self.reference))
        del fields["batch_size"], fields["sample_batch_size"]
        for run in (fields["generator"], fields["linear_probe"]):
            for name in ("data", "mesh", "loop", "remat", "feature_batch_size"):
                run.pop(name, None)
        return flatten_dict({"config": fields}, sep=".")

    @staticmethod
    def protocol(identity: Mapping[str, Any], images: int) -> dict[str, Any]:
        """How the networks are trained, without what the tokenizer or the machine decides.

        Args:
          identity: see `identity`.
          images: number of training images.
        """
        dependent = {f"config.generator.model.{name}" for name in OF_TOKENIZER}
        return {"training_images": images} | {
            name.removeprefix("config."): value
            for name, value in identity.items()
            if name.startswith(("config.generator.", "config.linear_probe.", "config.crop_factors"))
            and not name.startswith("config.generator.sampling.")  # of pictures
            and not name.endswith((".tokenizer", ".evaluation_images", ".dtype"))
            and name not in dependent
        }


@dataclasses.dataclass
class _Probe:
    """State shared by the steps."""

    config: ProbeConfig
    workdir: Path
    name: str  # the tokenizer's
    tokenizer: api.AnyTokenizer
    extractor: features.Extractor
    reference: fid.Reference | None
    results: dict[str, Any]  # metrics of the steps so far

    @property
    def codes(self) -> DataConfig:
        """The codes as training data."""
        path = str(self.workdir / "codes")
        return dataclasses.replace(
            self.config.data, source="codes", path=path, length=0, eval_length=0
        )

    @property
    def training_tokenizer(self) -> str:
        """The tokenizer's name for runs that train; one of the user's cannot be part of these."""
        return "" if isinstance(self.tokenizer, api.OwnTokenizer) else self.name

    @property
    def class_names(self) -> tuple[str, ...]:
        return stored.STORE.find_info(self.codes.path).class_names

    @functools.cached_property
    def generator(self) -> api.PretrainedGenerator:
        return api.load_generator(self.workdir / "generator")


def probe(name: str, config: ProbeConfig, workdir: Path) -> dict[str, Any]:
    """Runs the steps without results in `workdir`, in the order of `STEPS`; writes a report.

    Args:
      name: of the tokenizer, see `api.load_tokenizer`.
      config: how to probe it.
      workdir: gets the files of step NAME in `NAME/` and its metrics in `steps/NAME.json`, which
        marks it as finished; `tokenizer.json`, `results.json` with all metrics, and `report.html`.

    Returns:
      The metrics of all steps.

    Raises:
      UserError: `workdir` holds another probe, or the input of a step is wrong.
    """
    tokenizer = api.load_tokenizer(name, where="--tokenizer")
    extractor = features.load(config.features)
    # Opening the data is cheap; reading them with other codes would mix two probes.
    sources = {
        split: open_source(config.data, train=train, image_size=tokenizer.config.image_size)
        for split, train in (("training", True), ("evaluation", False))
    }
    # Before hours of work: what a later step would reject.
    _generator_model(config.generator, tokenizer, len(sources["training"].class_names))
    _check_features(config.linear_probe.features, tokenizer)
    made = {"tokenizer": tokenizer.fingerprint, "codes_of": tokenizer.codes_of}
    identity = {**made, **config.identity()}
    for split, source in sources.items():
        identity[f"set of {split} images"] = f"{len(source)} images, version {source.version()}"
    # Reject another probe's workdir early: the reference can take hours to compute.
    files.claim(workdir / "probe.json", identity, "a probe", write=False)
    reference = fid.load_reference(
        config.reference,
        config.data,
        extractor,
        count=config.samples,
        batch_size=config.batch_size,
        image_size=tokenizer.config.image_size,
    )
    # Write nothing before all inputs have been checked.
    distributed.claim(workdir / "probe.json", identity, "a probe")
    if distributed.is_main():
        described = {
            "family": tokenizer.family,
            "image_size": tokenizer.config.image_size,
            "codes": tokenizer.config.latents,
            "codebook_size": tokenizer.config.codebook_size,
            "model": dataclasses.asdict(tokenizer.config),
            "made_by": dict(tokenizer.made_by),
        }
        write_json(workdir / "tokenizer.json", described)

    shared = _Probe(
        config=config,
        workdir=workdir,
        name=name,
        tokenizer=tokenizer,
        extractor=extractor,
        reference=reference,
        results={
            "parameters": tokenizer.parameters,
            "protocol": {"probe": config.protocol(identity, len(sources["training"]))},
        },
    )
    for name, step in STEPS.items():
        finished = workdir / "steps" / f"{name}.json"
        if not finished.exists():
            print(f"{name} ...", flush=True)
            metrics = step(shared, workdir / name)
            print_metrics(metrics)
            if distributed.is_main():
                write_json(finished, metrics)
        distributed.barrier(name, working=True)
        metrics = read_json(finished, f"the metrics of {name}")
        if "images" in metrics:
            metrics[f"{name}_images"] = metrics.pop("images")
        if "protocol" in metrics:
            shared.results["protocol"][name] = metrics.pop("protocol")
        shared.results |= metrics
    if distributed.is_main():
        write_json(workdir / "results.json", shared.results)
        report.write([workdir], workdir / "report.html")
        print(workdir / "report.html")
    return shared.results


def _check_features(features: str, tokenizer: api.AnyTokenizer) -> None:
    """Raises UserError if the tokenizer lacks the features that the linear probe reads."""
    known = ["generator", "latents", "encoder", "decoder"]
    if isinstance(tokenizer, api.OwnTokenizer):
        known = known[:1]
    elif not tokenizer.has_decoder_features:
        known = known[:2]
    if features not in known:
        raise UserError(
            f"config.linear_probe.features: expected {' or '.join(known)} with a tokenizer of the "
            f"family {tokenizer.family}, got {features}"
        )


def _reconstruct(probe: _Probe, out: Path) -> dict[str, Any]:
    config = probe.config
    return reconstruction.evaluate(
        probe.tokenizer,
        probe.extractor,
        config.data,
        out,
        batch_size=config.batch_size,
        ssim_range=config.ssim_range,
    )


def _time(probe: _Probe, out: Path) -> dict[str, Any]:
    del out
    return cost.codec(probe.tokenizer, probe.config.batch_size)


def _encode(probe: _Probe, out: Path) -> dict[str, Any]:
    config = probe.config
    encoding.encode(
        probe.tokenizer,
        config.data,
        out,
        crop_factors=config.crop_factors,
        batch_size=config.batch_size,
        shard_images=config.shard_images,
    )
    return {}


def _train_generator(probe: _Probe, out: Path) -> dict[str, Any]:
    run = probe.config.generator
    model = _generator_model(run, probe.tokenizer, len(probe.class_names))
    name = probe.training_tokenizer
    train(dataclasses.replace(run, model=model, data=probe.codes, tokenizer=name), out)
    return {}


def _generator_model(
    run: GeneratorRun, tokenizer: api.AnyTokenizer, classes: int
) -> GeneratorConfig:
    """The generator for a tokenizer's codes.

    Raises:
      UserError: the probe's generator cannot model as many codes.
    """
    codes, size = tokenizer.config.latents, tokenizer.config.codebook_size
    try:
        return dataclasses.replace(run.model, codes=codes, codebook_size=size, classes=classes)
    except ValueError as error:
        raise UserError(f"config.generator.model.{first_line(error)}") from error


def _evaluate_loss(probe: _Probe, out: Path) -> dict[str, Any]:
    del out
    return generation.evaluate_loss(probe.generator, None, probe.codes, probe.config.batch_size)


def _evaluate_generation(probe: _Probe, out: Path) -> dict[str, Any]:
    config = probe.config
    return generation.evaluate_best(
        probe.generator,
        probe.tokenizer,
        probe.extractor,
        probe.reference,
        config.sampling,
        out,
        count=config.samples,
        seed=config.seed,
        batch_size=config.sample_batch_size,
    )


def _train_linear_probe(probe: _Probe, out: Path) -> dict[str, Any]:
    run = probe.config.linear_probe
    run = dataclasses.replace(
        run,
        # Only the generator's features can be computed from stored codes.
        data=probe.codes if run.features == "generator" else probe.config.data,
        tokenizer=probe.training_tokenizer,
        generator=str(probe.workdir / "generator"),
    )
    train(run, out)
    return {"linear_accuracy": read_metrics(out / "metrics.jsonl")[-1]["held_out/accuracy"]}


def _sample_classes(probe: _Probe, out: Path) -> dict[str, Any]:
    """Samples of evenly spaced classes, at the best guidance."""
    config, classes = probe.config, probe.generator.trained
    generation.sample(
        probe.generator,
        probe.tokenizer,
        np.tile(generation.evenly_spaced(classes, generation.CLASSES), PER_CLASS),
        dataclasses.replace(config.sampling, guidance=probe.results["guidance"]),
        out,
        class_names=probe.class_names,
        seed=config.seed,
        batch_size=config.sample_batch_size,
    )
    return {}


def _map_features(probe: _Probe, out: Path) -> dict[str, Any]:
    """Evaluation images of one class, and maps of the decoder's features below them (Fig. 8).

    Only tokenizers of the family GigaTok have them.
    """
    if not distributed.is_main() or not probe.tokenizer.has_decoder_features:
        return {}
    size = probe.tokenizer.config.image_size
    source = open_source(probe.config.data, train=False, image_size=size)
    images, label, resize = [], None, probe.config.data.eval_resize
    for index in range(len(source)):
        try:
            example = source[index]
        except BadImage:
            continue
        label = example["label"] if label is None else label
        if example["label"] == label:
            images.append(center_crop(example["image"], size, resize))
        if len(images) == MAPPED:
            break
    picture = feature_maps(probe.tokenizer, np.stack(images))
    pictures.save_png(out.with_suffix(".png"), picture)
    return {}


# In order of execution. Each step writes to the folder of its name ("maps" to maps.png) and returns
# metrics.
STEPS = {
    "reconstruction": _reconstruct,
    "time": _time,
    "codes": _encode,
    "generator": _train_generator,
    "loss": _evaluate_loss,
    "generation": _evaluate_generation,
    "linear_probe": _train_linear_probe,
    "samples": _sample_classes,
    "maps": _map_features,
}


def feature_maps(tokenizer: api.AnyTokenizer, images: np.ndarray, layer: int = 1) -> np.ndarray:
    """A picture of images, uint8 `[n, S, S, 3]`, over maps of a decoder layer's features."""
    tokens = tokenizer.decoder_features(tokenizer.encode(images), layer=layer)
    maps = component_maps(np.asarray(tokens))
    scale = images.shape[1] // maps.shape[1]
    maps = maps.repeat(scale, axis=1).repeat(scale, axis=2)
    return pictures.grid([images, maps])


def component_maps(features: np.ndarray) -> np.ndarray:
    """Shows the first three principal components of features as colors (Fig. 8).

    Args:
      features: `[n, T, W]`, whose T tokens form a square.

    Returns:
      uint8 `[n, side, side, 3]`. Components are computed over all tokens of all images,
      and each is stretched over its central 98 %.
    """
    count, tokens, width = features.shape
    flat = features.reshape(-1, width).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    axes = np.linalg.eigh(flat.T @ flat).eigenvectors[:, ::-1][:, :3]
    # An eigenvector's sign is arbitrary: make its largest entry positive.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    components = flat @ axes
    low, high = np.percentile(components, [1, 99], axis=0)
    colors = np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)
    side = round(tokens**0.5)
    return (255 * colors).astype(np.uint8).reshape(count, side, side, -1)
