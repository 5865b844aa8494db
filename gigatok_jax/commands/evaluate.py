"""gigatok evaluate loss --generator=DIR --config=FILE --out=DIR [--tokenizer=DIR]

The mean cross entropy of the codes of held-out images, their classes given: centre crops of the
images, or the stored codes, that the config's `data` names (paper, 3.1). Images need the tokenizer.
OUT gets metrics.json.
"""

import functools
import pathlib

from absl import flags
import jax
from ml_collections import config_flags
from tqdm import tqdm

from gigatok_jax import api
from gigatok_jax.commands.sample import load_matching_tokenizer
from gigatok_jax.data import codes, pipeline
from gigatok_jax.data.sources import DataConfig, data_config
from gigatok_jax.errors import UserError
from gigatok_jax.files import write_json
from gigatok_jax.training.evaluating import held_out_means
from gigatok_jax.training.generator import validation_loss

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file("config", None, "its `data` is evaluated on", flag_values=FLAGS)
flags.DEFINE_string("generator", None, "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", "", "bundle or workdir", flag_values=FLAGS)
flags.DEFINE_string("out", None, "folder for the result", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 32, "images at once", lower_bound=1, flag_values=FLAGS)
flags.mark_flags_as_required(["config", "generator", "out"], flag_values=FLAGS)

MEASURES = ("loss",)


def run(positional: list[str]) -> None:
    if len(positional) != 1 or positional[0] not in MEASURES:
        raise UserError(f"expected one of {', '.join(MEASURES)}, got {positional}")
    data = data_config(FLAGS.config)
    generator, tokenizer = api.load_generator(FLAGS.generator), None
    if FLAGS.tokenizer:
        tokenizer = load_matching_tokenizer(FLAGS.tokenizer, generator)
    elif data.source != "codes":
        raise UserError("--tokenizer: expected a bundle or workdir, which encodes the images")
    result = evaluate_loss(generator, tokenizer, data, FLAGS.batch_size)
    print(f"{result['images']} images, loss {result['loss']:.4f}")
    write_json(pathlib.Path(FLAGS.out) / "metrics.json", result)
    print(FLAGS.out)


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
    batches = pipeline.eval_batches(data, image_size=size, batch_size=batch_size)
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
    return {"images": batches.examples - batches.bad_count, **means}
