"""The demo: a tokenizer and a generator of embedded drawings, in minutes on two cores.

`demo` trains both. `quick` uses those that the package includes, in less than a minute.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from gigatok_jax import api, frozen_networks, pictures
from gigatok_jax.data.sources import DataConfig, Source, open_source
from gigatok_jax.evaluation import generation, probing
from gigatok_jax.evaluation.reconstruction import reconstruct
from gigatok_jax.files import Path, local_copy, read_json, remove_folder, replacing
from gigatok_jax.models import vit
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.training.loop import train
from gigatok_jax.training.tokenizer import TokenizerRun

TOKENIZER, GENERATOR = "drawings", "drawings_gpt"  # included, see `locate.INCLUDED`
# In the workdir.
FOLDERS = ("tokenizer", "drawings", "reconstructions", "probe", "samples")
HELD_OUT = 96  # drawings to reconstruct
COMPLETIONS = 4  # of each drawing
PER_CLASS, QUICK_PER_CLASS = 40, 10  # samples per class
REAL = 1_000  # drawings to train the classifier of samples on
BATCH_SIZE = 100  # in sampling


def demo(workdir: Path, run: TokenizerRun, config: probing.ProbeConfig) -> None:
    """Trains a tokenizer, reconstructs held-out drawings, probes the tokenizer, and samples.

    A second call resumes where the first one stopped.

    Args:
      workdir: directory for `tokenizer/` (the run), `drawings/`, `reconstructions/`, `probe/`,
        `samples/` and `completions.png`.
      run: how to train the tokenizer.
      config: how to probe it.
    """
    train(run, workdir / "tokenizer")
    tokenizer = api.load_tokenizer(workdir / "tokenizer")
    _reconstruct(tokenizer, workdir)

    record = workdir / "probe" / "probe.json"
    if record.exists() and read_json(record, "a probe")["tokenizer"] != tokenizer.fingerprint:
        remove_folder(workdir / "probe")  # the tokenizer has been trained further
    results = probing.probe(str(workdir / "tokenizer"), config, workdir / "probe")

    generator = api.load_generator(workdir / "probe" / "generator")
    settings = dataclasses.replace(config.sampling, guidance=results["guidance"])
    _sample(generator, tokenizer, settings, workdir, PER_CLASS)
    _complete(generator, tokenizer, settings, workdir)
    print(workdir / "probe" / "report.html")


def quick(workdir: Path) -> None:
    """Reconstructs held-out drawings and samples, with the included models.

    Args:
      workdir: directory for `drawings/`, `reconstructions/`, `samples/` and `completions.png`.
    """
    generator = api.load_generator(GENERATOR)
    tokenizer = generation.load_matching_tokenizer("", generator)
    _reconstruct(tokenizer, workdir)
    settings = SamplingConfig(**generator.made_by["sampling"])
    _sample(generator, tokenizer, settings, workdir, QUICK_PER_CLASS)
    _complete(generator, tokenizer, settings, workdir)


def _reconstruct(tokenizer: api.AnyTokenizer, workdir: Path) -> None:
    drawings = workdir / "drawings"
    if not drawings.exists():
        _write(_real_drawings(HELD_OUT, tokenizer.config.image_size), drawings)
    reconstruct(tokenizer, drawings, workdir / "reconstructions", batch_size=32)
    print(workdir / "reconstructions" / "grid.png")


def _sample(
    generator: api.PretrainedGenerator,
    tokenizer: api.AnyTokenizer,
    settings: SamplingConfig,
    workdir: Path,
    per_class: int,
) -> None:
    """Samples by class, and counts the samples that show their class."""
    classes = np.tile(np.arange(generator.config.classes), per_class)
    real = _real_drawings(REAL, tokenizer.config.image_size)
    out = workdir / "samples"
    print(f"{len(classes)} samples ...", flush=True)
    if (out / "images" / generation.RECORD).exists():  # of an earlier call
        remove_folder(out / "images")
    generation.sample(
        generator,
        tokenizer,
        classes,
        settings,
        out,
        class_names=real.class_names,
        seed=0,
        batch_size=BATCH_SIZE,
    )
    share = np.mean(_classify(np.load(local_copy(out / "samples.npz"))["arr_0"], real) == classes)
    print(f"a classifier of real drawings finds the intended class in {share:.1%} of the samples")
    print(out / "grid.png")


def _complete(
    generator: api.PretrainedGenerator,
    tokenizer: api.AnyTokenizer,
    settings: SamplingConfig,
    workdir: Path,
) -> None:
    """Shows drawings, their reconstructions, and what follows from half of their codes."""
    images, classes = _all(_real_drawings(generator.config.classes, tokenizer.config.image_size))
    codes = np.asarray(tokenizer.encode(images))
    continued = [
        generator.sample(
            classes,
            jax.random.key(seed),
            prefix=codes,
            keep=codes.shape[1] // 2,
            **dataclasses.asdict(settings),
        )
        for seed in range(COMPLETIONS)
    ]
    rows = [images]
    for each in (codes, *continued):
        rows.append(pictures.finite_uint8(tokenizer.decode(each), "the completions"))
    pictures.save_png(workdir / "completions.png", pictures.grid(rows))
    print(f"drawings, their reconstructions, and {COMPLETIONS} completions of half of their codes")
    print(workdir / "completions.png")


def _real_drawings(count: int, size: int) -> Source:
    """Drawings that neither the tokenizer nor the generator was trained on; classes alternate."""
    data = DataConfig(source="embedded", length=1, eval_length=count)
    return open_source(data, train=False, image_size=size)


def _write(source: Source, folder: Path) -> None:
    """Writes PNG files, in one sub-folder per class."""
    with replacing(folder) as aside:
        for example in (source[i] for i in range(len(source))):
            path = aside / source.class_names[example["label"]] / f"{example['key'][-8:]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(example["image"]).save(path)


def _all(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 `[n, S, S, 3]`, and labels `[n]`."""
    examples = [source[i] for i in range(len(source))]
    return tuple(np.array([example[name] for example in examples]) for name in ("image", "label"))


def _classify(images: np.ndarray, real: Source) -> np.ndarray:
    """Classifies images `[n, S, S, 3]` by ridge regression on the teacher's features."""
    config, params = frozen_networks.load_teacher("embedded")

    @jax.jit
    def features(images):
        inputs = vit.preprocess(pictures.to_float(images), config, config.grid)
        token, patches, _ = vit.ViT(config).apply({"params": params}, inputs)
        return jnp.concatenate([token, patches.mean(1), jnp.ones((len(token), 1))], axis=1)

    def design(images):
        parts = [features(images[i : i + 100]) for i in range(0, len(images), 100)]
        return np.concatenate(parts).astype(np.float64)

    drawn, labels = _all(real)
    x = design(drawn)
    y = np.eye(len(real.class_names))[labels]
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)
    return np.argmax(design(images) @ weights, axis=1)
