"""gigatok evaluate MEASURE --out=DIR ...

reconstruction --tokenizer=DIR --config=FILE: passes the evaluation images that the config's `data`
  names through a tokenizer: PSNR, SSIM, LPIPS (where its weights are there), codebook usage, rFID.
generation --generator=DIR --tokenizer=DIR (--reference=FILE.npz or --config=FILE): draws images of
  uniformly drawn classes: gFID, sFID, Inception Score, precision and recall, as ADM's evaluator
  defines them. --search walks in steps of 0.25 from --guidance to the scale of the least gFID. What
  a kill left is taken up.
loss --generator=DIR --config=FILE [--tokenizer=DIR]: the mean cross entropy of the codes of the
  evaluation images, or of stored codes, their classes given. Images need the tokenizer.
cost [--decoders=s_b,b_l,xl_xxl] [--generators=b,l,xxl]: the share of the time of making images that
  decoding their codes takes on this machine, for models of random weights (Table 4).

--features=inception is FID's network; a teacher's name (dinov2_vitb14, embedded) compares its
features instead, and the distance is then called fd_dinov2 or fd_teacher. OUT gets metrics.json and
pictures.
"""

import functools
import pathlib

from absl import flags
import jax
from ml_collections import config_flags
from tqdm import tqdm

from gigatok_jax import api, distributed
from gigatok_jax.commands import sampling_flags
from gigatok_jax.commands.sample import load_matching_tokenizer
from gigatok_jax.data import codes, pipeline
from gigatok_jax.data.sources import DataConfig, data_config
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import cost, features, fid, generation, reconstruction
from gigatok_jax.files import write_json
from gigatok_jax.training.evaluating import held_out_means
from gigatok_jax.training.generator import validation_loss

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "its `data` is evaluated on", flag_values=FLAGS)
flags.DEFINE_string("generator", "", "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", "", "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the results", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 32, "images at once", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("features", features.INCEPTION, "network that is asked", flag_values=FLAGS)
flags.DEFINE_string("reference", "", ".npz of statistics or images", flag_values=FLAGS)
flags.DEFINE_enum(
    "split", "eval", ["train", "eval"], "of the data, as a reference", flag_values=FLAGS
)
flags.DEFINE_integer("count", 50_000, "images drawn", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of codes and classes", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_boolean("search", False, "for the best guidance", flag_values=FLAGS)
sampling_flags.define(FLAGS)
flags.DEFINE_integer(
    "ssim_range", 1, "data_range of SSIM; the reference passes 2", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_list("decoders", ["s_b", "b_l", "xl_xxl"], "tokenizers timed", flag_values=FLAGS)
flags.DEFINE_list("generators", ["b", "l", "xxl"], "generators timed", flag_values=FLAGS)
flags.mark_flags_as_required(["out"], flag_values=FLAGS)


def run(positional: list[str]) -> None:
    measures = {
        "reconstruction": _reconstruction,
        "generation": _generation,
        "loss": _loss,
        "cost": _cost,
    }
    if len(positional) != 1 or positional[0] not in measures:
        raise UserError(f"expected one of {', '.join(measures)}, got {positional}")
    out = pathlib.Path(FLAGS.out)
    result = measures[positional[0]](out)
    print_metrics(result)
    if distributed.is_main():
        write_json(out / "metrics.json", result)
    print(out)


def print_metrics(metrics: dict) -> None:
    """A table of all that are numbers."""
    for name, value in metrics.items():
        if isinstance(value, int):
            print(f"  {name:<18}{value:>12,}")
        elif isinstance(value, float):
            print(f"  {name:<18}{value:12.4f}")


def _data() -> DataConfig:
    if FLAGS.config is None:
        raise UserError("--config: missing, expected a configuration whose `data` is evaluated on")
    return data_config(FLAGS.config)


def _required(name: str) -> str:
    if not FLAGS[name].value:
        raise UserError(f"--{name}: missing, expected a bundle or workdir")
    return FLAGS[name].value


def _reconstruction(out: pathlib.Path) -> dict[str, float]:
    return reconstruction.evaluate(
        api.load_tokenizer(_required("tokenizer")),
        features.load(FLAGS.features),
        _data(),
        out,
        batch_size=FLAGS.batch_size,
        ssim_range=FLAGS.ssim_range,
    )


def _generation(out: pathlib.Path) -> dict:
    settings = sampling_flags.settings(FLAGS)
    generator = api.load_generator(_required("generator"))
    tokenizer = load_matching_tokenizer(_required("tokenizer"), generator)
    extractor = features.load(FLAGS.features)
    reference = fid.load_reference(
        FLAGS.reference,
        None if FLAGS.reference else _data(),
        extractor,
        count=FLAGS.count,
        batch_size=FLAGS.batch_size,
        image_size=tokenizer.config.image_size,
        train=FLAGS.split == "train",
    )
    draw = generation.Draw(generator, tokenizer, FLAGS.count, FLAGS.seed, FLAGS.batch_size)
    if not FLAGS.search:
        return generation.evaluate(draw, extractor, reference, settings, out / "drawn")
    return generation.evaluate_best(draw, extractor, reference, settings, out)


def _cost(out: pathlib.Path) -> dict:
    del out
    guidance = sampling_flags.settings(FLAGS).guidance
    size = {"batch_size": FLAGS.batch_size, "guidance": guidance}
    table = cost.shares(FLAGS.decoders, FLAGS.generators, **size)
    print("decoder / generator" + "".join(f"{name:>10}" for name in FLAGS.generators))
    for decoder, row in table.items():
        print(f"{decoder:<19}" + "".join(f"{share:>10.1%}" for share in row.values()))
    return {**size, "device": jax.devices()[0].device_kind, "shares": table}


def _loss(out: pathlib.Path) -> dict[str, float]:
    del out
    data = _data()
    generator, tokenizer = api.load_generator(_required("generator")), None
    if FLAGS.tokenizer:
        tokenizer = load_matching_tokenizer(FLAGS.tokenizer, generator)
    elif data.source != "codes":
        raise UserError("--tokenizer: expected a bundle or workdir, which encodes the images")
    return evaluate_loss(generator, tokenizer, data, FLAGS.batch_size)


def evaluate_loss(
    generator: api.PretrainedGenerator,
    tokenizer: api.PretrainedTokenizer | None,
    data: DataConfig,
    batch_size: int,
) -> dict[str, float]:
    """The number of held-out images, and the mean loss of their codes.

    Raises:
      UserError: the data cannot be read, or are codes of another tokenizer.
    """
    config = generator.config
    size = tokenizer.config.image_size if tokenizer else 0
    batches = pipeline.eval_batches(data, size, batch_size, *distributed.place())
    if len(batches.class_names) > config.classes:
        raise UserError(
            f"the data have {len(batches.class_names)} classes, the generator {config.classes}"
        )
    if data.source == "codes":
        codes.find_info(data.path).check(
            codes=config.codes,
            codebook_size=config.codebook_size,
            tokenizer=generator.made_by.get("tokenizer"),
        )
    params, dtype = generator.variables["params"], generator.module.dtype
    compiled = jax.jit(functools.partial(validation_loss, config, dtype=dtype))

    def loss(batch):
        encoded = batch["codes"] if "codes" in batch else tokenizer.encode(batch["image"])
        return {"loss": compiled(params, encoded, batch["label"])}

    with batches:
        progress = tqdm(batches, total=-(-batches.examples // batch_size), disable=None)
        means = held_out_means(loss, progress, batches.examples)
    bad = distributed.sums({"bad": batches.bad_count})["bad"]
    return {"images": batches.examples - int(bad), **means}
