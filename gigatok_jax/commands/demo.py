"""gigatok demo [--workdir=DIR] [--config.FIELD=VALUE ...]

The main job on drawings that the program makes itself, with the teacher that comes with it: trains
a tiny tokenizer with every loss (configs/demo.py), then reconstructs held-out drawings. Ten minutes
on two cores. DIR/tokenizer is the run, DIR/reconstructions shows what it can do.
"""

import pathlib

from absl import flags
from ml_collections import config_flags
from PIL import Image

from gigatok_jax import api
from gigatok_jax.commands import reconstruct, train
from gigatok_jax.data.sources import EmbeddedSource
from gigatok_jax.errors import UserError
from gigatok_jax.files import replacing

FLAGS = flags.FlagValues()
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "demo.py"

flags.DEFINE_string("workdir", "runs/demo", "where everything goes", flag_values=FLAGS)
config_flags.DEFINE_config_file("config", str(CONFIG), "what to train", flag_values=FLAGS)

HELD_OUT = 100  # drawings that are reconstructed


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    workdir = pathlib.Path(FLAGS.workdir)
    train.train(FLAGS.config.to_dict(), workdir / "tokenizer")
    tokenizer = api.load_tokenizer(workdir / "tokenizer")
    drawings = _draw(workdir / "drawings", tokenizer.config.image_size)
    reconstruct.reconstruct(tokenizer, drawings, workdir / "reconstructions", batch_size=20)


def _draw(folder: pathlib.Path, size: int) -> pathlib.Path:
    """Writes held-out drawings as PNGs in class folders, unless they are there."""
    source = EmbeddedSource(HELD_OUT, size, "validation")
    if not folder.exists():
        with replacing(folder) as aside:
            for example in (source[i] for i in range(HELD_OUT)):
                path = aside / source.class_names[example["label"]] / f"{example['key'][-8:]}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(example["image"]).save(path)
    return folder
