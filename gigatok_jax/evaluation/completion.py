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

SHOWN = 12  # images in the grid


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
      out: gets `images/`, with the completions of a.png as a_0.png, a_1.png, ... (instead of those
        of an earlier call), and `grid.png`, with a row per image: the image, its reconstruction,
        and its completions.
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
    key, rows, outputs = jax.random.key(seed), [], []
    with replacing(out / "images", reconstruction.check_replaceable) as aside:
        size = tokenizer.config.image_size
        for batch in reconstruction.read_crops(source, paths, size, batch_size):
            codes = np.asarray(tokenizer.encode(batch["image"]))
            drawn = [_decode(tokenizer, codes)]
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
                drawn.append(_decode(tokenizer, completed))
            for i in np.flatnonzero(batch["valid"]):
                name = names[str(batch["key"][i])].removesuffix(".png")
                for number, images in enumerate(drawn[1:]):
                    outputs.append(f"{name}_{number}.png")
                    pictures.save_png(aside / outputs[-1], images[i])
                if len(rows) < SHOWN:
                    rows.append([batch["image"][i], *(images[i] for images in drawn)])
        described = {"images": printable(str(source)), "outputs": list(map(printable, outputs))}
        write_json(aside / reconstruction.RECORD, described)
    pictures.save_png(out / "grid.png", pictures.grid(np.array(rows)))
    print(f"{len(outputs)} completions; {keep} of {tokenizer.config.latents} codes kept")
    print(out)


def _decode(tokenizer: AnyTokenizer, codes: np.ndarray) -> np.ndarray:
    return pictures.finite_uint8(tokenizer.decode(codes), "the decoded samples")
