"""gigatok reconstruct --tokenizer=DIR --images=PATH --out=DIR

Passes images (a file, or all below a folder) through a tokenizer. OUT gets grid.png (inputs over
outputs), images/ (one PNG each), and metrics.json: PSNR, SSIM, codebook usage, and LPIPS where its
weights are there (`gigatok weights fetch lpips_vgg16`).
"""

import pathlib

from absl import flags

from gigatok_jax import api
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import reconstruction

FLAGS = flags.FlagValues()
flags.DEFINE_string("tokenizer", None, "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("images", None, "image file, or folder of images", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the results", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 8, "images at once", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "ssim_range", 1, "data_range of SSIM; the reference passes 2", lower_bound=1, flag_values=FLAGS
)
flags.mark_flags_as_required(["tokenizer", "images", "out"], flag_values=FLAGS)


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    tokenizer, out = api.load_tokenizer(FLAGS.tokenizer), pathlib.Path(FLAGS.out)
    reconstruction.reconstruct(
        tokenizer,
        pathlib.Path(FLAGS.images),
        out,
        batch_size=FLAGS.batch_size,
        ssim_range=FLAGS.ssim_range,
    )
    print(out)
