"""gigatok demo [--workdir=DIR] [--tokenizer.FIELD=VALUE ...] [--generator.FIELD=VALUE ...]

The main job on drawings that the program makes itself, with the teacher that comes with it: trains
a tiny tokenizer with every loss, reconstructs held-out drawings, stores the codes of 6,000 of the
drawings, trains a small generator on them, and draws samples by class (configs/demo.py). Minutes on
two cores. DIR gets tokenizer/ and generator/ (the runs), drawings/ (held out), reconstructions/,
codes/ and samples/.
"""

import dataclasses
import pathlib
import shutil

from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_flags
import numpy as np
from PIL import Image

from gigatok_jax import api, bundles, pictures, teachers
from gigatok_jax.commands import encode, reconstruct, sample, train
from gigatok_jax.config import from_mapping
from gigatok_jax.data import codes
from gigatok_jax.data.sources import DataConfig, EmbeddedSource
from gigatok_jax.errors import UserError
from gigatok_jax.files import replacing
from gigatok_jax.models import vit
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.sampling import SamplingConfig

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "demo.py"

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "runs/demo", "where everything goes", flag_values=FLAGS)
for task in ("tokenizer", "generator"):
    config_flags.DEFINE_config_file(task, f"{CONFIG}:{task}", "what to train", flag_values=FLAGS)

HELD_OUT = 96  # drawings that are reconstructed
ENCODED = 6_000  # drawings that the generator learns from
SAMPLES = 40  # a class
JUDGED_BY = 2_000  # real drawings that the classifier of the samples learns from


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    demo(pathlib.Path(FLAGS.workdir), FLAGS.tokenizer, FLAGS.generator)


def demo(workdir: pathlib.Path, tokenizer_config: ConfigDict, generator_config: ConfigDict) -> None:
    """Runs all steps, each from what is there; the generator's model and data fit the tokenizer.

    Raises:
      UserError: see `train.train`.
    """
    directory = workdir / "tokenizer"
    train.train(tokenizer_config.to_dict(), directory)
    bundle = bundles.load(directory, "tokenizer", TokenizerConfig)
    tokenizer = api.PretrainedTokenizer(bundle.config, bundle.weights)
    drawings = _draw(workdir / "drawings", bundle.config.image_size)
    reconstruct.reconstruct(tokenizer, drawings, workdir / "reconstructions", batch_size=32)

    info = codes.read_info(workdir / "codes")
    if info is not None and info.tokenizer != bundle.fingerprint:  # it was trained on since
        shutil.rmtree(workdir / "codes")
        shutil.rmtree(workdir / "generator", ignore_errors=True)
    data = from_mapping(DataConfig, tokenizer_config.data.to_dict())
    encode.encode(
        bundle,
        dataclasses.replace(data, length=min(data.length, ENCODED)),
        workdir / "codes",
        crop_factors=(),
        batch_size=100,
        shard_images=4_000,
    )
    config = generator_config.to_dict()
    config["tokenizer"] = str(directory)
    config["data"] |= {"source": "codes", "path": str(workdir / "codes")}
    config["model"] |= {
        "codes": bundle.config.latents,
        "codebook_size": bundle.config.codebook_size,
        "classes": len(EmbeddedSource.class_names),
    }
    train.train(config, workdir / "generator")
    generator = api.load_generator(workdir / "generator")
    classes = np.tile(np.arange(generator.config.classes), SAMPLES)
    settings = from_mapping(SamplingConfig, config["sampling"])
    out = workdir / "samples"
    shutil.rmtree(out, ignore_errors=True)
    sample.sample(generator, tokenizer, classes, settings, out, seed=0, batch_size=100)
    images = np.load(out / "samples.npz")["arr_0"]
    share = np.mean(_classify(images) == classes)
    print(f"a classifier of real drawings finds the intended class in {share:.1%} of the samples")


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


def _classify(images: np.ndarray) -> np.ndarray:
    """Classes that images `[n, S, S, 3]` look like to a ridge regression on the teacher's tokens.

    It learns from real drawings that neither tokenizer nor generator have seen.
    """
    config, params = teachers.load_teacher("embedded")
    source = EmbeddedSource(JUDGED_BY, images.shape[1], "validation")
    real = [source[i] for i in range(JUDGED_BY)]

    @jax.jit
    def features(images):
        inputs = vit.preprocess(pictures.to_float(images), config, config.grid)
        token, patches, _ = vit.ViT(config).apply({"params": params}, inputs)
        return jnp.concatenate([token, patches.mean(1), jnp.ones((len(token), 1))], axis=1)

    def all_features(images):
        parts = [features(images[i : i + 100]) for i in range(0, len(images), 100)]
        return np.concatenate(parts).astype(np.float64)

    x = all_features(np.stack([example["image"] for example in real]))
    y = np.eye(len(source.class_names))[[example["label"] for example in real]]
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
    return np.argmax(all_features(images) @ weights, axis=1)
