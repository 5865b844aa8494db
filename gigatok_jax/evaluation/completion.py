"""Completion of images: their first codes are kept, and a generator draws the others."""

import dataclasses

import jax
import numpy as np

from gigatok_jax import pictures
from gigatok_jax.api import AnyTokenizer, PretrainedGenerator
from gigatok_jax.data.folders import image_paths
from gigatok_jax.evaluation import reconstruction
from gigatok_jax.files import Path, printable, replacing, write_json
from gigatok_jax.sampling import SamplingConfig

SHOWN, ACROSS = 12, 6  # images in the grid, and completions of each
RECORD = "completion.json"  # in a folder of pictures: that, and how, this program made them


def complete(
    generator: PretrainedGenerator,
    tokenizer: AnyTokenizer,
    source: Path,
    settings: SamplingConfig,
    out: Path,
    *,
    label: int,
    share: float,
    count: int,
    seed: int,
    batch_size: int,
) -> None:
    """Completes image files.

    Args:
      generator, tokenizer: must match, see `generation.load_matching_tokenizer`.
      source: an image file, or a folder that is searched recursively. Unreadable images are
        skipped.
      settings: how codes are sampled.
      out: gets `images/`, with the completions of a.png as a.png/0.png, a.png/1.png, ... (instead
        of those of an earlier call), and `grid.png`, with a row for each of the first images: the
        image, its reconstruction, and completions.
      label: the class of the images, or `generator.config.null_class`.
      share: of the codes to keep, in [0, 1]; the number of codes is rounded.
      count: completions per image.
      seed: determines the completions, together with the images and `settings`.
      batch_size: images per call of the networks.

    Raises:
      UserError: no image can be read, or `out` has an `images/` with more than an earlier call's.
    """
    paths = image_paths(source)
    root = source if source.is_dir() else source.parent
    names = reconstruction.output_names([str(path.relative_to(root)) for path in paths])
    keep = round(share * tokenizer.config.latents)
    batch_size = min(batch_size, len(paths))  # batches are filled up
    key, rows, outputs = jax.random.key(seed), {}, []
    with replacing(out / "images", check_replaceable) as aside:
        size = tokenizer.config.image_size
        for batch in reconstruction.read_crops(source, paths, size, batch_size):
            codes = np.asarray(tokenizer.encode(batch["image"]))
            shown = _decode(tokenizer, codes)
            chosen = np.flatnonzero(batch["valid"]).tolist()
            for i in chosen[: SHOWN - len(rows)]:
                rows[batch["index"][i]] = [batch["image"][i], shown[i]]
            for number in range(count):
                keys = [
                    jax.random.fold_in(jax.random.fold_in(key, index), number)
                    for index in batch["index"].tolist()
                ]
                completed = generator.sample(
                    np.full(len(codes), label),
                    jax.numpy.stack(keys),
                    prefix=codes,
                    keep=keep,
                    **dataclasses.asdict(settings),
                )
                images = _decode(tokenizer, completed)
                for i in chosen:
                    outputs.append(f"{names[str(batch['key'][i])]}/{number}.png")
                    pictures.save_png(aside / outputs[-1], images[i])
                    if number < ACROSS and batch["index"][i] in rows:
                        rows[batch["index"][i]].append(images[i])
        described = {"images": printable(str(source)), "outputs": list(map(printable, outputs))}
        write_json(aside / RECORD, described)
    pictures.save_png(out / "grid.png", pictures.grid(np.array(list(rows.values()))))
    print(f"{len(outputs)} completions; {keep} of {tokenizer.config.latents} codes kept")
    print(out)


def check_replaceable(folder: Path) -> None:
    """Raises UserError if a folder has pictures that are not an earlier call's."""
    reconstruction.check_replaceable(folder, RECORD, "sample --from")


def _decode(tokenizer: AnyTokenizer, codes: np.ndarray) -> np.ndarray:
    return pictures.finite_uint8(tokenizer.decode(codes), "the decoded samples")
