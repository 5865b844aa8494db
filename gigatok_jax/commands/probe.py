"""gigatok probe --tokenizer=DIR --workdir=DIR --config=configs/probe.py [--config.FIELD=VALUE ...]

AR probing (paper, 3.1): judges a tokenizer by a small generator trained on its codes. Steps, each
skipped when its result is there, so that a kill costs little:
  reconstruction/  metrics and pictures of the evaluation images
  codes/           of all images
  generator/       the run of the small generator
  loss/            its validation loss
  generation/      metrics of its samples, at the best guidance
  linear_probe/    the run of the linear probe of its features
  samples/         samples by class
  maps.png         principal components of the decoder's features (Fig. 8)
tokenizer.json says what was probed, results.json what was found,
and report.html, all of it in one file.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags
import numpy as np

from gigatok_jax import api, bundles, distributed, files, pictures
from gigatok_jax.commands import encode, evaluate, sample, train
from gigatok_jax.config import from_mapping
from gigatok_jax.data import codes as stored
from gigatok_jax.data.crops import BadImage, center_crop
from gigatok_jax.data.sources import NOT_CONTENT, DataConfig, open_source
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import features, fid, generation, maps, reconstruction, report
from gigatok_jax.evaluation.probe import ProbeConfig
from gigatok_jax.files import read_json, write_json
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training.telemetry import read_metrics

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "how it is probed", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", None, "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("workdir", None, "where everything goes", flag_values=FLAGS)
flags.mark_flags_as_required(["config", "tokenizer", "workdir"], flag_values=FLAGS)

PER_CLASS, CLASSES = 8, 12  # samples of a class, and classes, in the picture
MAPPED = 8  # images of one class whose features are mapped


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    config = from_mapping(ProbeConfig, FLAGS.config.to_dict())
    probe(FLAGS.tokenizer, config, pathlib.Path(FLAGS.workdir))


def probe(directory: str, config: ProbeConfig, workdir: pathlib.Path) -> dict[str, float]:
    """Runs all steps that `workdir` lacks.

    Args:
      directory: the tokenizer's bundle or workdir.
      config: how it is probed; the generator's codes and classes are the tokenizer's and the
        data's.
      workdir: see the module's docstring.

    Returns:
      The metrics of all steps.

    Raises:
      UserError: `workdir` holds another probe, or a step cannot work.
    """
    bundle = bundles.load(directory, "tokenizer", TokenizerConfig)
    extractor = features.load(config.features)
    record = {"tokenizer": bundle.fingerprint, **_decisive(config)}
    files.claim(workdir / "probe.json", record, "a probe", write=False)
    reference = fid.load_reference(
        config.reference,
        config.data,
        extractor,
        count=config.samples,
        batch_size=config.batch_size,
        image_size=bundle.config.image_size,
    )
    # What could not work has been refused: from here on the folder is this probe's.
    distributed.claim(workdir / "probe.json", record, "a probe")
    if distributed.is_main():
        tokenizer_record = {"model": dataclasses.asdict(bundle.config), "made_by": bundle.made_by}
        write_json(workdir / "tokenizer.json", tokenizer_record)
    tokenizer = api.PretrainedTokenizer(bundle.config, bundle.weights)

    def once(name: str, step) -> dict[str, Any]:
        path = workdir / name / "metrics.json"
        if not path.exists():
            print(f"{name} ...", flush=True)
            result = step(workdir / name)
            evaluate.print_metrics(result)
            if distributed.is_main():
                write_json(path, result)
        distributed.barrier(name)
        found = read_json(path, f"the result of {name}")
        return {f"{name}_images" if key == "images" else key: v for key, v in found.items()}

    batch = {"batch_size": config.batch_size}
    results = once(
        "reconstruction",
        lambda out: reconstruction.evaluate(
            tokenizer, extractor, config.data, out, ssim_range=config.ssim_range, **batch
        ),
    )
    print("codes ...", flush=True)
    codes = workdir / "codes"
    encode.encode(
        bundle,
        config.data,
        codes,
        crop_factors=config.crop_factors,
        shard_images=config.shard_images,
        **batch,
    )
    print("generator ...", flush=True)
    data = dataclasses.replace(
        config.data, source="codes", path=str(codes), length=0, eval_length=0
    )
    class_names = stored.find_info(codes).class_names
    model = dataclasses.replace(
        config.generator.model,
        codes=bundle.config.latents,
        codebook_size=bundle.config.codebook_size,
        classes=len(class_names),
    )
    generator_run = dataclasses.replace(
        config.generator, model=model, data=data, tokenizer=str(directory)
    )
    train.train(dataclasses.asdict(generator_run), workdir / "generator")
    generator = api.load_generator(workdir / "generator")

    results |= once(
        "loss", lambda out: evaluate.evaluate_loss(generator, None, data, config.batch_size)
    )
    results |= once(
        "generation",
        lambda out: _generation(config, generator, tokenizer, extractor, reference, out),
    )

    print("linear_probe ...", flush=True)
    linear_data = config.data if config.linear_probe.features != "generator" else data
    linear_run = dataclasses.replace(
        config.linear_probe,
        data=linear_data,
        tokenizer=str(directory),
        generator=str(workdir / "generator"),
    )
    train.train(dataclasses.asdict(linear_run), workdir / "linear_probe")
    rows = read_metrics(workdir / "linear_probe" / "metrics.jsonl")
    results["linear_accuracy"] = rows[-1]["held_out/accuracy"]

    _samples(config, generator, tokenizer, class_names, results["guidance"], workdir / "samples")
    if not distributed.is_main():
        return results
    if not (workdir / "maps.png").exists():
        _maps(tokenizer, config.data, workdir / "maps.png")
    parameters = sum(leaf.size for leaf in jax.tree.leaves(bundle.weights["params"]))
    write_json(workdir / "results.json", results | {"parameters": parameters})
    report.write([workdir], workdir / "report.html")
    print(workdir / "report.html")
    return results


def _decisive(config: ProbeConfig) -> dict[str, Any]:
    """The fields that results depend on: a probe may go on with others on another machine."""
    how = {*NOT_CONTENT, "mesh", "loop", "remat", "feature_batch_size"}
    flat = _flat(dataclasses.asdict(config), "config")
    decisive = {path: value for path, value in flat.items() if how.isdisjoint(path.split("."))}
    for path in ("config.batch_size", "config.sample_batch_size"):
        del decisive[path]
    return decisive


def _flat(mapping: dict[str, Any], path: str) -> dict[str, Any]:
    """Nested fields as `path.a.b`, so that a message can name one."""
    flat = {}
    for name, value in mapping.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}.{name}")
        else:
            flat[f"{path}.{name}"] = value
    return flat


def _generation(
    config: ProbeConfig, generator, tokenizer, extractor, reference, out
) -> dict[str, Any]:
    draw = generation.Draw(
        generator, tokenizer, config.samples, config.seed, config.sample_batch_size
    )
    return generation.evaluate_best(draw, extractor, reference, config.sampling, out)


def _samples(config: ProbeConfig, generator, tokenizer, class_names, guidance: float, out) -> None:
    """Pictures of evenly spaced classes, at the guidance that was found best."""
    count = generator.config.classes
    shown = np.arange(min(CLASSES, count)) * count // min(CLASSES, count)
    settings: SamplingConfig = dataclasses.replace(config.sampling, guidance=guidance)
    classes = np.tile(shown, PER_CLASS)
    sample.sample(
        generator,
        tokenizer,
        classes,
        settings,
        out,
        class_names=class_names,
        seed=config.seed,
        batch_size=config.sample_batch_size,
    )


def _maps(tokenizer: api.PretrainedTokenizer, data: DataConfig, path: pathlib.Path) -> None:
    """Feature maps of the first evaluation images of one class."""
    source = open_source(data, train=False, image_size=tokenizer.config.image_size)
    chosen, label = [], None
    for index in range(len(source)):
        try:
            example = source[index]
        except BadImage:
            continue
        label = example["label"] if label is None else label
        if example["label"] == label:
            image = example["image"]
            chosen.append(center_crop(image, tokenizer.config.image_size))
        if len(chosen) == MAPPED:
            break
    pictures.save_png(path, maps.feature_maps(tokenizer, np.stack(chosen)))
