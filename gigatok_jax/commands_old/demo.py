"""gigatok demo [--workdir=DIR] [--tokenizer.FIELD=VALUE ...] [--probe.FIELD=VALUE ...]

The main job on drawings that the program makes itself, with the teacher that comes with it: trains
a tiny tokenizer with every loss, reconstructs held-out drawings, and probes it: trains a small
generator on its codes, draws samples by class, and writes report.html (configs/demo.py). Minutes on
two cores. DIR gets tokenizer/ (the run), drawings/ (held out), reconstructions/, samples/, and
probe/, see `gigatok probe`.
"""

import dataclasses
import pathlib
import shutil

from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
from PIL import Image

from gigatok_jax import api, frozen, pictures
from gigatok_jax.commands import probe, reconstruct, sample, train
from gigatok_jax.config import from_mapping
from gigatok_jax.data.sources import EmbeddedSource
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation.probe import ProbeConfig
from gigatok_jax.files import read_json, replacing
from gigatok_jax.models import vit

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "demo.py"

FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", "runs/demo", "where everything goes", flag_values=FLAGS)
for name, text in (("tokenizer", "what to train"), ("probe", "how it is probed")):
    config_flags.DEFINE_config_file(name, f"{CONFIG}:{name}", text, flag_values=FLAGS)

HELD_OUT = 96  # drawings that are reconstructed
SAMPLES = 40  # a class
JUDGED_BY = 2_000  # real drawings that the classifier of the samples learns from


def run(positional: list[str]) -> None:
    if positional:
        raise UserError(f"{positional[0]!r}: unexpected argument")
    config = from_mapping(ProbeConfig, FLAGS.probe.to_dict(), "probe")
    demo(pathlib.Path(FLAGS.workdir), FLAGS.tokenizer.to_dict(), config)


def demo(workdir: pathlib.Path, tokenizer_config: dict, probe_config: ProbeConfig) -> None:
    """Runs all steps, each from what is there.

    Args:
      workdir: where everything goes.
      tokenizer_config: a whole configuration of a tokenizer's run.
      probe_config: how the tokenizer is probed.

    Raises:
      UserError: see `train.train` and `probe.probe`.
    """
    directory = workdir / "tokenizer"
    train.train(tokenizer_config, directory)
    tokenizer = api.load_tokenizer(directory)
    drawings = _draw(workdir / "drawings", tokenizer.config.image_size)
    reconstruct.reconstruct(tokenizer, drawings, workdir / "reconstructions", batch_size=32)

    probed = workdir / "probe"
    record = probed / "probe.json"
    if record.exists() and read_json(record, "a probe")["tokenizer"] != tokenizer.fingerprint:
        shutil.rmtree(probed)  # the tokenizer was trained on since
    results = probe.probe(str(directory), probe_config, probed)

    generator = api.load_generator(probed / "generator")
    classes = np.tile(np.arange(generator.config.classes), SAMPLES)
    settings = dataclasses.replace(probe_config.sampling, guidance=results["guidance"])
    out = workdir / "samples"
    shutil.rmtree(out, ignore_errors=True)
    place = {"seed": 0, "batch_size": 100}
    names = EmbeddedSource.class_names
    sample.sample(generator, tokenizer, classes, settings, out, class_names=names, **place)
    images = np.load(out / "samples.npz")["arr_0"]
    share = np.mean(_classify(images) == classes)
    print(f"a classifier of real drawings finds the intended class in {share:.1%} of the samples")
    print(probed / "report.html")


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
    config, params = frozen.load_teacher("embedded")
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
