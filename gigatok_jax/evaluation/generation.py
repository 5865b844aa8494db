"""How well a generator draws: gFID and its kin, with a search for the best guidance (paper, B)."""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import shutil
from typing import Any

import numpy as np
from tqdm import tqdm

from gigatok_jax import api, distributed, pictures
from gigatok_jax.evaluation import fid
from gigatok_jax.evaluation.features import Extractor
from gigatok_jax.evaluation.fid import FeatureSet, Reference
from gigatok_jax.files import read_json, write_json, write_npz
from gigatok_jax.sampling import SamplingConfig

CHUNK = 512  # images between two savings of their features
GUIDANCE_STEP = 0.25
SHOWN, COLUMNS = 64, 8  # samples in the grid


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which images are drawn.

    Attributes:
      generator, tokenizer: belong together.
      count: number of images; classes are drawn uniformly.
      seed: of classes and codes; image n is the same in any batch.
      batch_size: images at once.
    """

    generator: api.PretrainedGenerator
    tokenizer: api.PretrainedTokenizer
    count: int = 50_000
    seed: int = 0
    batch_size: int = 64

    def images(
        self, settings: SamplingConfig, start: int, stop: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields what `api.draw` does of images `start` to `stop`."""
        classes = np.random.default_rng(self.seed).integers(
            self.generator.config.classes, size=self.count
        )
        return api.draw(
            self.generator,
            self.tokenizer,
            classes,
            np.arange(start, stop),
            settings,
            seed=self.seed,
            batch_size=self.batch_size,
        )


def evaluate(
    draw: Draw,
    extractor: Extractor,
    reference: Reference | None,
    settings: SamplingConfig,
    out: pathlib.Path,
) -> dict[str, float]:
    """Metrics of one setting; computed once, and resumed where a kill left it.

    Args:
      draw: which images.
      extractor: of the features.
      reference: what they are compared with, see `fid.load_reference`.
      settings: how codes are drawn.
      out: folder; gets `metrics.json` and `grid.png`, and holds features until they are there.

    Returns:
      See `fid.compare`; also "images" and "guidance".

    Raises:
      UserError: `out` holds results of something else.
    """
    record = {
        "sampling": dataclasses.asdict(settings),
        "count": draw.count,
        "seed": draw.seed,
        "generator": draw.generator.fingerprint,
        "tokenizer": draw.tokenizer.fingerprint,
        "features": extractor.fingerprint,
    }
    if reference is not None:
        record["reference"] = reference.name
    distributed.claim(out / "evaluation.json", record, "results")
    path = out / "metrics.json"
    if path.exists():
        return read_json(path, "the metrics")
    starts = range(0, draw.count, CHUNK)
    chunks = [out / "features" / f"{start:06d}.npz" for start in starts]
    process, processes = distributed.place()
    mine = slice(process, None, processes)
    bar = tqdm(
        total=sum(min(CHUNK, draw.count - start) for start in starts[mine]),
        unit="image",
        desc=f"guidance {settings.guidance:g}",
        disable=None,
    )
    with bar:
        for start, chunk in zip(starts[mine], chunks[mine], strict=True):
            stop = min(start + CHUNK, draw.count)
            if chunk.exists():
                bar.update(stop - start)
            else:
                _write_chunk(chunk, draw, extractor, settings, (start, stop), bar)
    distributed.barrier("samples", working=True)
    if distributed.is_main():
        samples = FeatureSet(extractor, members=reference.members is not None)
        for chunk in chunks:
            with np.load(chunk) as file:
                samples.add_features(dict(file))
        result = {"images": draw.count, "guidance": settings.guidance}
        write_json(path, result | fid.compare(samples, reference, extractor.distance))
        shutil.rmtree(out / "features")
    distributed.barrier("metrics", working=True)
    return read_json(path, "the metrics")


def _write_chunk(path, draw: Draw, extractor, settings, place: tuple[int, int], bar: tqdm) -> None:
    """Features of images `place[0]` to `place[1]`; of the first ones also a picture."""
    parts, shown = [], []
    for _, images in draw.images(settings, *place):
        parts.append(extractor(images))
        if place[0] == 0 and len(shown) < SHOWN:
            shown += list(images[: SHOWN - len(shown)])
        bar.update(len(images))
    if len(shown) >= COLUMNS:
        rows = np.stack(shown[: len(shown) // COLUMNS * COLUMNS])
        picture = pictures.grid(np.split(rows, len(rows) // COLUMNS))
        pictures.save_png(path.parents[1] / "grid.png", picture)
    write_npz(path, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def search_guidance(
    measure: Callable[[float], float], start: float, step: float = GUIDANCE_STEP
) -> dict[float, float]:
    """Walks from `start` while the measure falls, first up, then down to 1 (paper, B).

    Args:
      measure: guidance scale to a distance, called once for each scale.
      start: the first scale, at least 1.
      step: between scales.

    Returns:
      The distance at each scale that was tried; the least is the result.
    """
    found = {start: measure(start)}
    for direction in (step, -step):
        scale = start
        while (following := round(scale + direction, 6)) >= 1:
            if following not in found:
                found[following] = measure(following)
            if not found[following] < found[scale]:
                break
            scale = following
    return found


def evaluate_best(
    draw: Draw,
    extractor: Extractor,
    reference: Reference | None,
    settings: SamplingConfig,
    out: pathlib.Path,
) -> dict[str, Any]:
    """The metrics at the guidance that `search_guidance` finds best.

    "search" holds those of all scales tried, in order.  `out` gets a folder for each scale; none is
    sampled twice, whatever was killed between.  Arguments are those of `evaluate`, whose
    `settings.guidance` is where the search starts.
    """
    results = {}

    def measure(scale):
        chosen = dataclasses.replace(settings, guidance=scale)
        folder = out / f"guidance_{scale:.2f}"
        results[scale] = evaluate(draw, extractor, reference, chosen, folder)
        return results[scale][f"g{extractor.distance}"]

    found = search_guidance(measure, settings.guidance)
    best = min(found, key=found.get)
    return results[best] | {"search": [results[scale] for scale in sorted(results)]}
