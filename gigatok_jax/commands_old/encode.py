"""gigatok encode --tokenizer=DIR --config=FILE --out=DIR [--config.data.FIELD=VALUE ...]

Stores the codes of the config's data set for training generators: of ten crops of each training
image, and of the centre crop of each validation image. A restart resumes. To train on the codes,
pass --config.data.source=codes --config.data.path=DIR.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from gigatok_jax import bundles, encoding
from gigatok_jax.data.sources import data_config
from gigatok_jax.errors import UserError
from gigatok_jax.models.tokenizer import TokenizerConfig

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "its `data` is encoded", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", None, "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the codes", flag_values=FLAGS)
flags.DEFINE_list(
    "crop_factors",
    ["1.1"],
    "for each factor, take ten crops out of a centre crop of so many times the image size: 1.1, or "
    "1.1,1.05 as in the reference's second set; empty: one centre crop",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "batch_size", 32, "images read, and crops encoded, at once", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_integer("shard_images", 4096, "images per shard", lower_bound=1, flag_values=FLAGS)
flags.mark_flags_as_required(["config", "tokenizer", "out"], flag_values=FLAGS)


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    try:
        crop_factors = tuple(float(factor) for factor in FLAGS.crop_factors)
    except ValueError:
        raise UserError(f"--crop_factors: expected numbers, got {FLAGS.crop_factors}") from None
    encoding.encode(
        bundles.load(FLAGS.tokenizer, "tokenizer", TokenizerConfig),
        data_config(FLAGS.config),
        Path(FLAGS.out),
        crop_factors=crop_factors,
        batch_size=FLAGS.batch_size,
        shard_images=FLAGS.shard_images,
    )
