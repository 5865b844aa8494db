"""Batches of crops that do not depend on the number of hosts, workers or restarts.

Batch n of a run is a pure function of (source, seed, n): position n·B + i determines the epoch and
the place in it, the epoch's permutation gives the example, and (seed, epoch, index) seeds the crop.
Grain prefetches whole batches, in threads or worker processes, so n is the only state to save.
"""

import atexit
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import functools
import logging
import math
from multiprocessing import connection, parent_process
import os
import signal
import threading
from typing import Any
import weakref

from absl import flags
import grain
import numpy as np

from gigatok_jax.data.crops import (
    BadImage,
    CenterResize,
    center_crop,
    is_turned,
    opencv,
    random_crop,
    ten_crops,
)
from gigatok_jax.data.sources import DataConfig, Shuffled, Source, open_source
from gigatok_jax.errors import UserError

logger = logging.getLogger(__name__)

EPOCHS = 10**9  # practically endless; Grain's endless repetition overflows for batches of one
BAD_RUN = 100  # unreadable images in a row after which the search for a substitute ends
MIN_READ = 200  # examples to read before checking the share of unreadable ones

TURNED = (
    "some photos are stored turned, with an EXIF orientation that is ignored, as in the reference; "
    "to turn them upright for good: mogrify -auto-orient, or jhead -autorot"
)

Batch = dict[str, Any]
State = dict[str, int]


def train_batches(
    config: DataConfig,
    image_size: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Endless shuffled training batches; every epoch visits every example once.

    An unreadable image is replaced by the next readable one of the source.

    Args:
      config: what to read, and how.
      image_size: side S in pixels.
      batch_size: global batch size B, a multiple of `process_count`.
      seed: of order and crops, >= 0.
      process_index, process_count: the part of each batch that this process reads.

    Returns:
      Batches of {"image": uint8 [B/P, S, S, 3], "label": int32 [B/P]}. If the source has
      codes, "codes", int32 [B/P, N], replaces "image".

    Raises:
      UserError: the source cannot be opened, or the batch does not divide.
    """
    source = open_source(config, train=True, image_size=image_size)
    if config.resize == "linear" and not source.codes:
        opencv()  # if it is not installed, fail now rather than in a worker
    length = len(source)
    # Hashed, because Grain adds the epoch to the seed: otherwise epoch 1 of seed 0 would have the
    # same order as epoch 0 of seed 1.
    order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(length).shuffle(order_seed).repeat(EPOCHS)
    visits = order.map_with_index(lambda position, index: (position // length, index))
    read = functools.partial(_read_for_training, source, image_size, seed, config.resize)
    return Batches(source, visits, read, config, batch_size, process_index, process_count)


def eval_batches(
    config: DataConfig,
    image_size: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    train: bool = False,
    crop_factors: tuple[float, ...] = (),
    shuffled: bool = False,
) -> "Batches":
    """One pass over the evaluation examples, in order, as center crops.

    Every process gets the same number of batches. `valid` marks real examples; unreadable images
    and the padding of the last batch are zeros.

    Args:
      config: what to read, and how.
      image_size: side S in pixels.
      batch_size: global batch size B, a multiple of `process_count`.
      process_index, process_count: the part of each batch that this process reads.
      train: read the training examples instead.
      crop_factors: if given, take `crops.ten_crops` of each factor instead of the center crop.
      shuffled: in an order that is random, but always the same.

    Returns:
      Batches of {"image": uint8 [B/P, S, S, 3], "label": int32 [B/P], "valid": bool [B/P],
      "index": int32 [B/P], "key": str [B/P]}; "index" is the place in this pass, -1 for padding.
      With crop factors, a second axis of the images holds ten crops per factor. If the source has
      codes, "codes", int32 [B/P, N], replaces "image".

    Raises:
      UserError: the source cannot be opened, or the batch does not divide.
    """
    source = open_source(config, train=train, image_size=image_size)
    if shuffled:
        source = Shuffled(source)
    positions = grain.MapDataset.range(math.ceil(len(source) / batch_size) * batch_size)
    if config.eval_resize == "linear" and not source.codes:
        opencv()  # if it is not installed, fail now rather than in a worker
    read = functools.partial(
        _read_for_evaluation, source, image_size, crop_factors, config.eval_resize
    )
    return Batches(source, positions, read, config, batch_size, process_index, process_count)


def eval_images(config: DataConfig, *args, **kwargs) -> "Batches":
    """`eval_batches`, but raises UserError for a source of codes."""
    if config.source == "codes":
        raise UserError("config.data.source: expected images, got 'codes'")
    return eval_batches(config, *args, **kwargs)


def _read_for_training(
    source: Source, image_size: int, seed: int, resize: str, visit: tuple[int, int]
) -> tuple[Batch, list[str]]:
    """The example of a visit (epoch, index), and why any it replaces could not be read."""
    epoch, index = visit
    rng = np.random.default_rng([seed, epoch, index])
    bad = []
    for substitute in range(min(len(source), BAD_RUN)):
        try:
            example = source[(index + substitute) % len(source)]
        except BadImage as error:
            bad.append(str(error))
            continue
        if source.codes:  # each visit takes one of the stored crops
            seen = {"codes": example["codes"][rng.integers(len(example["codes"]))]}
        else:
            seen = {
                "image": random_crop(example["image"], image_size, rng, resize),
                "turned": is_turned(example["image"]),
            }
        return seen | {"label": np.int32(example["label"])}, bad
    raise UserError(f"{len(bad)} images in a row cannot be read; the last one: {bad[-1]}")


def _read_for_evaluation(
    source: Source,
    image_size: int,
    crop_factors: tuple[float, ...],
    resize: CenterResize,
    position: int,
) -> tuple[Batch, list[str]]:
    """The example at a position, or zeros and why it could not be read."""
    inside, bad, example = position < len(source), [], None
    if inside:
        try:
            example = source[position]
        except BadImage as error:
            bad.append(str(error))
    if source.codes:
        seen = {"codes": example["codes"][0] if example else np.zeros(source.codes, np.int32)}
    else:
        image = example["image"] if example else np.zeros((image_size, image_size, 3), np.uint8)
        if crop_factors:
            crops = [ten_crops(image, image_size, factor) for factor in crop_factors]
            seen = {"image": np.concatenate(crops)}
        else:
            seen = {"image": center_crop(image, image_size, resize)}
        seen["turned"] = is_turned(image)
    return seen | {
        "label": np.int32(example["label"] if example else 0),
        "key": example["key"] if example else "",
        "valid": example is not None,
        "index": np.int32(position if inside else -1),
    }, bad


def _read_batch(read: Callable, map_: Callable, positions: list) -> Batch:
    """Reads and stacks the examples of a batch.

    "bad" lists the reading errors, and "turned" counts images that EXIF orientation would turn.
    """
    examples, bad = zip(*map_(read, positions), strict=True)
    turned = sum(example.pop("turned", False) for example in examples)
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    return batch | {"bad": [message for messages in bad for message in messages], "turned": turned}


_open_batches: "weakref.WeakSet[Batches]" = weakref.WeakSet()


@atexit.register
def _close_all():
    # After modules are unloaded, Grain could no longer free its shared memory.
    for batches in list(_open_batches):
        batches.close()


class Batches(Iterator[Batch]):
    """Iterator over host batches whose only state is the number of the next batch.

    Logs each unreadable image once. Threads and worker processes end with `close`, at the end of a
    `with` block, or when this process ends, even if it is killed.

    Args:
      source: of the examples.
      positions: arguments of `read`, for every example of the global batches in order.
      read: returns an example, and the reasons why others could not be read.
      config: how to read.
      batch_size, process_index, process_count: see `train_batches`.

    Attributes:
      source: of the examples.
      class_names: by label.
      examples: number of distinct examples, over all processes.
      bad_count: number of distinct images that this process could not read so far.
    """

    def __init__(
        self,
        source: Source,
        positions: grain.MapDataset,
        read: Callable[[Any], tuple[Batch, list[str]]],
        config: DataConfig,
        batch_size: int,
        process_index: int,
        process_count: int,
    ):
        if batch_size % process_count:
            raise UserError(
                f"batch_size: expected a multiple of the {process_count} processes, "
                f"got {batch_size}"
            )
        self.source, self._read, self._config = source, read, config
        self.class_names, self.examples = source.class_names, len(source)
        self._local_size = batch_size // process_count
        # Each process takes a contiguous block of each global batch, in order of processes.
        blocks = positions.batch(self._local_size, batch_fn=list)
        self._positions = blocks[process_index::process_count]
        self._stream: grain.DatasetIterator | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._next_batch, self._examples_read, self._bad = 0, 0, set()
        self._turned = False  # whether an image with EXIF orientation has been seen

    def version(self) -> str:
        """See `Source`."""
        return self.source.version()

    @property
    def bad_count(self) -> int:
        return len(self._bad)

    def __next__(self) -> Batch:
        """The next batch of this process.

        Raises:
          StopIteration: the pass is over (evaluation only).
          UserError: too many images are unreadable.
        """
        if self._next_batch >= len(self._positions):
            raise StopIteration
        if self._stream is None:
            _open_batches.add(self)
            self._stream = self._open()
        batch = next(self._stream)
        self._next_batch += 1
        self._count_bad(batch.pop("bad"))
        if batch.pop("turned") and not self._turned:
            self._turned = True
            logger.warning(TURNED)
        # Copy from shared memory, which Grain frees late and with warnings.
        if self._config.workers:
            batch = {name: np.array(array) for name, array in batch.items()}
        return batch

    def _open(self) -> grain.DatasetIterator:
        workers, ahead = self._config.workers, self._config.prefetch
        positions = self._positions[self._next_batch :]
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which notebooks do not parse
                flags.FLAGS.mark_as_parsed()
            # Each worker keeps one core busy and needs no threads.
            batches = positions.map(functools.partial(_read_batch, self._read, map))
            stream = batches.to_iter_dataset(grain.ReadOptions(0, 0))
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)
            return iter(stream.mp_prefetch(options, _start_worker))
        # Threads share a batch, so that the first one is ready soon and few examples are in memory.
        # Two batches are read at once, so that no thread idles at the end of one.
        self._threads = ThreadPoolExecutor(cores(), thread_name_prefix="images")
        batches = positions.map(functools.partial(_read_batch, self._read, self._threads.map))
        return iter(batches.to_iter_dataset(grain.ReadOptions(2, ahead)))

    def _count_bad(self, messages: list[str]):
        for message in messages:
            if message not in self._bad:
                self._bad.add(message)
                logger.warning("skipped unreadable image #%d: %s", len(self._bad), message)
        self._examples_read = min(self._examples_read + self._local_size, self.examples)
        limit, read = self._config.max_bad_share, self._examples_read
        # One bad image never ends a run: it could be a third of a small evaluation set.
        if read >= min(MIN_READ, self.examples) and self.bad_count > max(1, limit * read):
            raise UserError(
                f"{self.bad_count} of {read} images cannot be read, more than "
                f"data.max_bad_share={limit:g} allows; for example: {min(self._bad)}"
            )

    def get_state(self) -> State:
        """The state, as JSON values; independent of the number of processes and workers."""
        return {"next_batch": self._next_batch}

    def set_state(self, state: State):
        """Continues from a state that `get_state` returned."""
        self.close()
        self._next_batch = state["next_batch"]

    def close(self):
        """Ends threads and worker processes; a further `next` starts new ones."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._threads is not None:
            # Grain's threads may still be reading; errors that this causes in them are ignored.
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception):
        self.close()


def _start_worker(index: int, count: int):
    """Makes a worker process end with its parent and ignore signals.

    Signals reach the whole process group, but the parent needs batches until it has saved its
    state.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def end_with_parent():
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class prefetch_to_device(Iterator[Any]):
    """Transfers the next batches to the devices while the current one is in use.

    Args:
      batches: host batches.
      put: starts the transfer of a host batch and returns device arrays.
      size: number of batches in flight.
    """

    def __init__(self, batches: Batches, put: Callable[[Batch], Any], size: int = 2):
        self._batches, self._put, self._size = batches, put, size
        self._in_flight: deque[tuple[Any, State]] = deque()
        self._state, self._error = batches.get_state(), None

    def __next__(self) -> Any:
        while len(self._in_flight) < self._size and self._error is None:
            try:
                batch = self._put(next(self._batches))
            except Exception as error:  # raised only once earlier batches have been returned
                self._error = error
            else:
                self._in_flight.append((batch, self._batches.get_state()))
        if not self._in_flight:
            raise self._error
        batch, self._state = self._in_flight.popleft()
        return batch

    def get_state(self) -> State:
        """The state after the last batch returned, regardless of batches in flight."""
        return self._state
