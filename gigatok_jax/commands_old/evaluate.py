"""gigatok evaluate MEASURE --out=DIR ...

reconstruction --tokenizer=DIR --config=FILE: passes the evaluation images of the config's `data`
  through a tokenizer: PSNR, SSIM, LPIPS (if its weights are installed), codebook usage, rFID.
generation --generator=DIR --tokenizer=DIR (--reference=FILE.npz or --config=FILE): samples images
  of uniformly drawn classes: gFID, sFID, Inception Score, precision and recall, as ADM's evaluator
  defines them. --search looks for the guidance of least gFID in steps of 0.25 from --guidance. A
  restart resumes.
loss --generator=DIR --config=FILE [--tokenizer=DIR]: mean cross entropy of the codes of the
  evaluation images, or of stored codes, given their classes. Images need the tokenizer.
cost [--decoders=s_b,b_l,xl_xxl] [--generators=b,l,xxl]: share of the time of generating images that
  decoding takes on this machine, for models with random weights (Table 4).

--features=inception is FID's network. The name of a teacher (dinov2_vitb14, embedded) compares its
features instead; the distance is then called fd_dinov2 or fd_teacher. OUT gets metrics.json and
pictures.
"""

from pathlib import Path

from absl import flags
import jax
from ml_collections import config_flags

from gigatok_jax import api, distributed
from gigatok_jax.commands import sampling_flags
from gigatok_jax.data.sources import DataConfig, data_config
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import cost, features, generation, probing, reconstruction, sets
from gigatok_jax.files import write_json

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "its `data` is evaluated", flag_values=FLAGS)
flags.DEFINE_string("generator", "", "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", "", "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the results", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 32, "images at once", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string(
    "features", features.INCEPTION, "network whose features are compared", flag_values=FLAGS
)
flags.DEFINE_string("reference", "", ".npz of statistics or images", flag_values=FLAGS)
flags.DEFINE_enum(
    "split", "eval", ["train", "eval"], "of the data, used as the reference", flag_values=FLAGS
)
flags.DEFINE_integer("count", 50_000, "images to sample", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of codes and classes", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_boolean("search", False, "search for the best guidance", flag_values=FLAGS)
sampling_flags.define(FLAGS)
flags.DEFINE_integer(
    "ssim_range", 1, "data_range of SSIM; the reference passes 2", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_list("decoders", ["s_b", "b_l", "xl_xxl"], "tokenizers to time", flag_values=FLAGS)
flags.DEFINE_list("generators", ["b", "l", "xxl"], "generators to time", flag_values=FLAGS)
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
    out = Path(FLAGS.out)
    result = measures[positional[0]](out)
    probing.print_metrics(result)
    if distributed.is_main():
        write_json(out / "metrics.json", result)
    print(out)


def _data() -> DataConfig:
    if FLAGS.config is None:
        raise UserError("--config: missing, expected a configuration whose `data` is evaluated")
    return data_config(FLAGS.config)


def _required(name: str) -> str:
    if not FLAGS[name].value:
        raise UserError(f"--{name}: missing, expected a bundle or workdir")
    return FLAGS[name].value


def _reconstruction(out: Path) -> dict[str, float]:
    return reconstruction.evaluate(
        api.load_tokenizer(_required("tokenizer")),
        features.load(FLAGS.features),
        _data(),
        out,
        batch_size=FLAGS.batch_size,
        ssim_range=FLAGS.ssim_range,
    )


def _generation(out: Path) -> dict:
    settings = sampling_flags.settings(FLAGS)
    generator = api.load_generator(_required("generator"))
    tokenizer = generation.load_matching_tokenizer(_required("tokenizer"), generator)
    extractor = features.load(FLAGS.features)
    reference = sets.load_reference(
        FLAGS.reference,
        None if FLAGS.reference else _data(),
        extractor,
        count=FLAGS.count,
        batch_size=FLAGS.batch_size,
        image_size=tokenizer.config.image_size,
        train=FLAGS.split == "train",
    )
    inputs = (generator, tokenizer, extractor, reference, settings)
    options = {"count": FLAGS.count, "seed": FLAGS.seed, "batch_size": FLAGS.batch_size}
    if not FLAGS.search:
        return generation.evaluate(*inputs, out / "drawn", **options)
    return generation.evaluate_best(*inputs, out, **options)


def _cost(out: Path) -> dict:
    del out
    guidance = sampling_flags.settings(FLAGS).guidance
    size = {"batch_size": FLAGS.batch_size, "guidance": guidance}
    table = cost.shares(FLAGS.decoders, FLAGS.generators, **size)
    print("decoder / generator" + "".join(f"{name:>10}" for name in FLAGS.generators))
    for decoder, row in table.items():
        print(f"{decoder:<19}" + "".join(f"{share:>10.1%}" for share in row.values()))
    return {**size, "device": jax.devices()[0].device_kind, "shares": table}


def _loss(out: Path) -> dict[str, float]:
    del out
    data = _data()
    generator, tokenizer = api.load_generator(_required("generator")), None
    if FLAGS.tokenizer:
        tokenizer = generation.load_matching_tokenizer(FLAGS.tokenizer, generator)
    elif data.source != "codes":
        raise UserError("--tokenizer: expected a bundle or workdir, which encodes the images")
    return generation.evaluate_loss(generator, tokenizer, data, FLAGS.batch_size)
