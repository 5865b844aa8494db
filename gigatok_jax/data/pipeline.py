"""Batches of crops: the same for any number of hosts, workers and restarts.

Batch n of a run is a pure function of (source, seed, n): position n·B + i is an epoch and a place
in it, a permutation gives the example, and (seed, epoch, index) seeds its crop. Grain reads ahead,
in threads or worker processes, whole batches each, so no state but n has to be saved.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import functools
import gc
import logging
from multiprocessing import connection, parent_process
import os
import signal
import threading
from typing import Any, Protocol
import weakref

from absl import flags
import grain
import numpy as np

from gigatok_jax.data.crops import BadImage, center_crop, opencv, random_crop, ten_crops
from gigatok_jax.data.sources import DataConfig, Source, open_source
from gigatok_jax.errors import UserError

logger = logging.getLogger(__name__)

BAD_RUN = 100  # unreadable images in a row that end the search for a substitute
JUDGED_AFTER = 200  # examples read before their share of bad ones means something

Batch = dict[str, Any]
State = dict[str, int]


@functools.lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> grain.MapDataset:
    """The permutation of one epoch, in constant memory."""
    seed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    order = grain.MapDataset.range(length).shuffle(seed=seed)
    order[0]  # Grain sets up its statistics on first use, which is not thread-safe.
    return order


class _Reader:
    """Random access to one process' part of the global batches; travels to worker processes.

    Args:
        source: of the examples.
        image_size: side S of the crops.
        batch_size: of all processes together.
        process_index, process_count: this process takes the `process_index`-th block of each.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        batch_size: int,
        process_index: int,
        process_count: int,
    ):
        if batch_size <= 0 or batch_size % process_count:
            raise UserError(
                f"batch_size is {batch_size}, expected a multiple of the {process_count} processes"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index is {process_index} of {process_count}")
        self.source, self.image_size = source, image_size
        self.batch_size, self.local_size = batch_size, batch_size // process_count
        self._offset = process_index * self.local_size
        self.threads: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"threads": None}

    def __getitem__(self, n: int) -> Batch:
        """Batch n: arrays stacked over examples, and `bad`, what could not be read."""
        start = int(n) * self.batch_size + self._offset
        read = self.threads.map if self.threads else map
        examples, bad = zip(*read(self._read, range(start, start + self.local_size)), strict=True)
        batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
        return batch | {"bad": tuple(message for messages in bad for message in messages)}

    def _read(self, position: int) -> tuple[Batch, list[str]]:
        """The example at a global position, and the reasons why others could not be read."""
        raise NotImplementedError


class _TrainReader(_Reader):
    def __init__(self, *args, seed: int, resize: str):
        super().__init__(*args)
        self._seed, self._resize = seed, resize
        if resize == "linear" and not self.source.codes:
            opencv()  # refused now if it is not there

    def __len__(self) -> int:
        return 2**40  # without end: epochs follow each other

    def _read(self, position: int) -> tuple[Batch, list[str]]:
        length = len(self.source)
        epoch, place = divmod(position, length)
        index = int(_order(length, self._seed, epoch)[place])
        rng = np.random.default_rng([self._seed, epoch, index])
        bad = []
        while len(bad) < min(length, BAD_RUN):
            try:
                example = self.source[(index + len(bad)) % length]
            except BadImage as error:
                bad.append(str(error))
                continue
            label = {"label": np.int32(example["label"])}
            if self.source.codes:
                # Of several crops, one at each visit.
                return {"codes": example["codes"][rng.integers(len(example["codes"]))]} | label, bad
            crop = random_crop(example["image"], self.image_size, rng, self._resize)
            return {"image": crop} | label, bad
        raise UserError(f"{len(bad)} images in a row cannot be read, the last: {bad[-1]}")


class _EvalReader(_Reader):
    def __init__(self, *args, crop_factors: tuple[float, ...]):
        super().__init__(*args)
        self._crop_factors = crop_factors
        self._blank = np.zeros((self.image_size,) * 2 + (3,), np.uint8)
        if crop_factors:
            self._blank = np.stack([self._blank] * (10 * len(crop_factors)))

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def _read(self, position: int) -> tuple[Batch, list[str]]:
        inside, bad, example = position < len(self.source), [], None
        if inside:
            try:
                example = self.source[position]
            except BadImage as error:
                bad.append(str(error))
        if codes := self.source.codes:
            seen = {"codes": example["codes"][0] if example else np.zeros(codes, np.int32)}
        else:
            seen = {"image": self._view(example["image"]) if example else self._blank}
        return seen | {
            "label": np.int32(example["label"] if example else 0),
            "key": example["key"] if example else "",
            "valid": example is not None,
            "index": np.int32(position if inside else -1),
        }, bad

    def _view(self, image) -> np.ndarray:
        if not self._crop_factors:
            return center_crop(image, self.image_size)
        crops = [ten_crops(image, self.image_size, factor) for factor in self._crop_factors]
        return np.concatenate(crops)


def _start_worker(index: int, count: int):
    """Makes a worker process end with its parent, and only then.

    Signals reach whole process groups; the parent may want batches until it has saved its state.
    """
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def end_with_parent():
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class Batches(Iterator[Batch]):
    """Iterator over host batches, whose state is the number of the next one.

    Each unreadable image is logged once. `close` ends threads and worker processes; leaving a
    `with` block, and the end of this process in whichever way, do too.

    Attributes:
        class_names: by label.
        examples: number of different examples, all processes together.
        bad_count: different images that this process could not read so far.
    """

    def __init__(self, reader: _Reader, config: DataConfig):
        self._reader, self._config = reader, config
        self._stream: list[grain.DatasetIterator] = []  # at most one; shared with `_end`
        self._end: Callable[[], None] = lambda: None
        self._next_batch, self._read, self._bad = 0, 0, set()

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._reader.source.class_names

    @property
    def examples(self) -> int:
        return len(self._reader.source)

    def version(self) -> str:
        """See `Source`."""
        return self._reader.source.version()

    @property
    def bad_count(self) -> int:
        return len(self._bad)

    def __next__(self) -> Batch:
        """The next batch of this process.

        Raises:
            StopIteration: the pass is over (evaluation only).
            UserError: too many images cannot be read.
        """
        if self._next_batch >= len(self._reader):
            raise StopIteration
        if not self._stream:
            self._stream.append(self._open())
            # Also at the end of the program, while Grain can still free shared memory.
            self._end = weakref.finalize(self, _end, self._stream, self._reader.threads)
        batch = next(self._stream[0])
        self._next_batch += 1
        self._judge(batch.pop("bad"))
        if self._config.workers:  # Out of shared memory, which Grain frees late and noisily.
            batch = {name: np.array(array) for name, array in batch.items()}
        return batch

    def _open(self) -> grain.DatasetIterator:
        workers, ahead = self._config.workers, self._config.prefetch
        batches = grain.MapDataset.source(self._reader)[self._next_batch :]
        if workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its own; a notebook has parsed none.
                flags.FLAGS.mark_as_parsed()
            # A worker is one busy process: it reads batch after batch, without threads.
            read = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=ahead)
            stream = batches.to_iter_dataset(read).mp_prefetch(options, _start_worker)
        else:
            self._reader.threads = ThreadPoolExecutor(_cores(), thread_name_prefix="images")
            # Two batches at once, so that threads do not idle at the end of each.
            read = grain.ReadOptions(num_threads=2, prefetch_buffer_size=ahead)
            stream = batches.to_iter_dataset(read)
        return iter(stream)

    def _judge(self, messages: tuple[str, ...]):
        for message in messages:
            if message not in self._bad:
                self._bad.add(message)
                logger.warning("unreadable image, the %d., skipped: %s", len(self._bad), message)
        self._read = min(self._read + self._reader.local_size, self.examples)
        limit = self._config.max_bad_share
        enough = self._read >= min(JUDGED_AFTER, self.examples)
        # A single one is no share: of a few held-out images it may be a third.
        if enough and self.bad_count > max(1, limit * self._read):
            raise UserError(
                f"{self.bad_count} of {self._read} images cannot be read, more than "
                f"data.max_bad_share={limit:g} allows, for example: {min(self._bad)}"
            )

    def get_state(self) -> State:
        """JSON-able; the same for any number of processes and workers."""
        return {"next_batch": self._next_batch}

    def set_state(self, state: State):
        """Continues with the batch that followed when `get_state` gave `state`."""
        self.close()
        self._next_batch = state["next_batch"]

    def close(self):
        """Ends threads and worker processes; a further `next` starts new ones."""
        self._end()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception):
        self.close()


def _end(stream: list[grain.DatasetIterator], threads: ThreadPoolExecutor | None):
    stream.pop().close()
    gc.collect()  # Grain's iterators refer to themselves, and hold what they read ahead.
    if threads is not None:
        # What Grain's own threads are at fails thereby, unseen.
        threads.shutdown(wait=True, cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def train_batches(
    config: DataConfig,
    image_size: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Batches:
    """Endless shuffled training batches; every epoch visits every example once.

    An unreadable image is replaced by the next readable one of the source.

    Args:
        config: what to read, and how.
        image_size: side S in pixels.
        batch_size: B of all processes together, a multiple of `process_count`.
        seed: of order and crops, >= 0.
        process_index, process_count: the part of each batch that this process reads.

    Returns:
        Batches of {"image": uint8 [B/P, S, S, 3], "label": int32 [B/P]}; "codes", int32
        [B/P, N], for "image" where the source has them.

    Raises:
        UserError: the source cannot be opened, or the batch not be divided.
    """
    source = open_source(config, train=True, image_size=image_size)
    place = (process_index, process_count)
    reader = _TrainReader(source, image_size, batch_size, *place, seed=seed, resize=config.resize)
    return Batches(reader, config)


def eval_batches(
    config: DataConfig,
    image_size: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    train: bool = False,
    crop_factors: tuple[float, ...] = (),
) -> Batches:
    """One pass over the evaluation examples, in order, centre crops.

    Every process gets equally many batches. What fills the last one, and unreadable images, are
    zeros that `valid` marks.

    Args:
        config: what to read, and how.
        image_size: side S in pixels.
        batch_size: B of all processes together, a multiple of `process_count`.
        process_index, process_count: the part of each batch that this process reads.
        train: read the training examples instead.
        crop_factors: see the crops of `crops.ten_crops` for each of them instead.

    Returns:
        Batches of {"image": uint8 [B/P, S, S, 3], "label": int32 [B/P], "valid": bool [B/P],
        "index": int32 [B/P], "key": str [B/P]}, index in the source, -1 after its end. Ten images
        for each crop factor stand in a second axis; "codes", int32 [B/P, N], for an image where
        the source has them.

    Raises:
        UserError: the source cannot be opened, or the batch not be divided.
    """
    source = open_source(config, train=train, image_size=image_size)
    place = (process_index, process_count)
    reader = _EvalReader(source, image_size, batch_size, *place, crop_factors=crop_factors)
    return Batches(reader, config)


def eval_images(config: DataConfig, *args, **kwargs) -> Batches:
    """`eval_batches` of a source that must have images.

    Raises:
        UserError: it has codes; and see `eval_batches`.
    """
    if config.source == "codes":
        raise UserError("config.data.source: expected images, got 'codes'")
    return eval_batches(config, *args, **kwargs)


class _Resumable(Protocol):
    def __next__(self) -> Batch: ...
    def get_state(self) -> State: ...
    def set_state(self, state: State) -> None: ...
    def close(self) -> None: ...


class prefetch_to_device(Iterator[Any]):
    """Keeps batches on their way to the devices while the current one is in use.

    Args:
        batches: what to read.
        put: makes device arrays of a host batch; should return before the copy is done.
        size: batches in flight, at least 1.
    """

    def __init__(self, batches: _Resumable, put: Callable[[Batch], Any], size: int = 2):
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1")
        self._batches, self._put, self._size = batches, put, size
        self._flying: deque[tuple[Any, State]] = deque()
        self._state, self._ended = batches.get_state(), None

    def __next__(self) -> Any:
        while len(self._flying) < self._size and self._ended is None:
            try:
                batch = self._put(next(self._batches))
            except Exception as error:  # Belongs to a later batch: raised in its turn.
                self._ended = error
            else:
                self._flying.append((batch, self._batches.get_state()))
        if not self._flying:
            raise self._ended
        batch, self._state = self._flying.popleft()
        return batch

    def get_state(self) -> State:
        """That of the batch last handed out, not of those in flight."""
        return self._state

    def set_state(self, state: State):
        """Drops what is in flight and continues from `state`."""
        self._batches.set_state(state)
        self._flying.clear()
        self._state, self._ended = state, None

    def close(self):
        """Drops what is in flight and closes `batches`."""
        self._flying.clear()
        self._batches.close()
