"""Means over held-out images, for every task."""

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from gigatok_jax.errors import UserError

ARRAYS = ("image", "codes", "label")  # what devices get of a batch


def held_out_means(
    measure: Callable[[dict[str, np.ndarray]], Mapping[str, jax.Array]],
    batches: Iterable[Mapping[str, Any]],
    images: int,
) -> dict[str, float]:
    """Means over the first so many readable images of an evaluation pass.

    Args:
      measure: arrays of a batch to values of each image, `[B]` each, by name.
      batches: see `pipeline.eval_batches`.
      images: how many at most.

    Raises:
      UserError: none can be read.
    """
    sums, count = collections.Counter(), 0
    for batch in batches:
        keep = np.flatnonzero(batch["valid"])[: images - count]
        values = measure({name: batch[name] for name in ARRAYS if name in batch})
        for name, value in values.items():
            sums[name] += float(np.asarray(value, np.float64)[keep].sum())
        count += len(keep)
        if count >= images:
            break
    if not count:
        raise UserError("none of the held-out images can be read")
    return {name: total / count for name, total in sums.items()}
