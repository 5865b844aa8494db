"""gigatok sample --generator=DIR --tokenizer=DIR --classes=0,1,207 --out=DIR

Samples images by class. OUT gets grid.png (a row per class), images/ (a PNG per image) and
samples.npz (`arr_0`, uint8 [n, H, W, 3], and `arr_1`, the classes: the layout of ADM's evaluator).
A restart resumes; image n is the same whatever else is sampled.
"""

from pathlib import Path

from absl import flags
import numpy as np

from gigatok_jax import api
from gigatok_jax.commands import sampling_flags
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import generation

FLAGS = flags.FlagValues()
flags.DEFINE_string("generator", None, "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", None, "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the images", flag_values=FLAGS)
flags.DEFINE_list(
    "classes", ["all"], "numbers or ranges such as 0,7,10-19, or all", flag_values=FLAGS
)
flags.DEFINE_integer(
    "count",
    0,
    "number of images, the classes in turn; 0: 8 per class",
    lower_bound=0,
    flag_values=FLAGS,
)
flags.DEFINE_boolean(
    "random_classes", False, "draw the classes uniformly, not in turn", flag_values=FLAGS
)
flags.DEFINE_integer("batch_size", 32, "images at once", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "of codes and classes", lower_bound=0, flag_values=FLAGS)
sampling_flags.define(FLAGS)
flags.mark_flags_as_required(["generator", "tokenizer", "out"], flag_values=FLAGS)


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    settings = sampling_flags.settings(FLAGS)
    generator = api.load_generator(FLAGS.generator)
    classes = _classes(FLAGS.classes, generator.config.classes)
    count = FLAGS.count or generation.COLUMNS * len(classes)
    if FLAGS.random_classes:
        order = np.random.default_rng(FLAGS.seed).choice(classes, count)
    else:
        order = np.resize(classes, count)
    generation.sample(
        generator,
        generation.load_matching_tokenizer(FLAGS.tokenizer, generator),
        order,
        settings,
        Path(FLAGS.out),
        seed=FLAGS.seed,
        batch_size=FLAGS.batch_size,
    )


def _classes(items: list[str], count: int) -> np.ndarray:
    """Class numbers of "all", or of numbers and ranges."""
    if items == ["all"]:
        return np.arange(count)
    classes = []
    for item in items:
        first, dash, last = item.partition("-")
        last = last if dash else first
        digits = first.isdecimal() and last.isdecimal()
        if not digits or int(last) < int(first):
            raise UserError(f"--classes: expected numbers and ranges such as 0,10-19, got {item!r}")
        classes += range(int(first), int(last) + 1)
    bad = [c for c in classes if c >= count]
    if bad or not classes:
        raise UserError(f"--classes: expected numbers in 0..{count - 1}, got {bad or items}")
    return np.array(classes)
