"""Means over held-out images, for every task."""

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from gigatok_jax import distributed
from gigatok_jax.errors import UserError

ARRAYS = ("image", "codes", "label")  # what devices get of a batch


def held_out_means(
    measure: Callable[[dict[str, np.ndarray]], Mapping[str, jax.Array]],
    batches: Iterable[Mapping[str, Any]],
    images: int,
) -> dict[str, float]:
    """Means over the first so many readable images of an evaluation pass, of all processes.

    Args:
      measure: arrays of this process's part of a batch to values of each image, `[B/P]` each, by
        name.
      batches: this process's, see `pipeline.eval_batches`.
      images: how many at most.

    Raises:
      UserError: none can be read.
    """
    sums, count = collections.Counter(), 0
    for batch in batches:
        values = measure({name: batch[name] for name in ARRAYS if name in batch})
        rows = {name: np.asarray(value, np.float64) for name, value in values.items()}
        place = {"index": batch["index"], "valid": batch["valid"]}
        gathered = distributed.gather_rows(rows | place)
        # In the order of the source; processes that share a block have the same rows.
        index, first = np.unique(gathered["index"], return_index=True)
        keep = first[gathered["valid"][first] & (index >= 0)][: images - count]
        for name in rows:
            sums[name] += float(gathered[name][keep].sum())
        count += len(keep)
        if count >= images:
            break
    if not count:
        raise UserError("none of the held-out images can be read")
    return {name: total / count for name, total in sums.items()}
