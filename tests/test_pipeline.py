"""Batches depend on the seed and their number alone, whatever the files and processes do."""

import collections
import json
import multiprocessing
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import test_sources

from gigatok_jax.data import pipeline
from gigatok_jax.data.crops import center_crop
from gigatok_jax.data.pipeline import Batches, eval_batches, prefetch_to_device, train_batches
from gigatok_jax.data.sources import DataConfig
from gigatok_jax.errors import UserError

import image_folders

COUNTS = {"ant": 9, "bee": 8, "cat": 6}  # 23 images: no batch size divides an epoch
SIZE = 16


@pytest.fixture
def root(tmp_path) -> Path:
    image_folders.make(tmp_path / "photos", COUNTS)
    return tmp_path / "photos"


def _config(root, **fields) -> DataConfig:
    return DataConfig(source="folder", path=str(root), **({"holdout": 0} | fields))


def _train(root, batch_size=8, seed=3, place=(0, 1), **fields) -> Batches:
    return train_batches(
        _config(root, **fields),
        image_size=SIZE,
        batch_size=batch_size,
        seed=seed,
        process_index=place[0],
        process_count=place[1],
    )


def _take(batches, count=None) -> list[dict[str, np.ndarray]]:
    with batches:
        return list(batches) if count is None else [next(batches) for _ in range(count)]


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name])


def test_batches_have_the_promised_shapes(root):
    batch = _take(_train(root), 1)[0]
    assert batch.keys() == {"image", "label"}
    assert batch["image"].shape == (8, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32


def test_crops_are_resized_as_the_configuration_says(root):
    bicubic, linear = (_take(_train(root, resize=r), 1)[0]["image"] for r in ("bicubic", "linear"))
    difference = np.abs(bicubic.astype(int) - linear).mean((1, 2, 3))
    assert 0 < difference.max() < 2


@pytest.mark.parametrize("start", [0, 2, 3, 50])
def test_resume_continues_bit_for_bit(root, start):
    reference = _take(_train(root), start + 4)[start:]  # 23 images: an epoch ends within batch 2
    stopped = _train(root)
    _take(stopped, start)
    state = json.loads(json.dumps(stopped.get_state()))
    assert state == {"next_batch": start}
    resumed = _train(root)
    resumed.set_state(state)
    _assert_equal(_take(resumed, 4), reference)


def test_worker_processes_give_the_same_batches_and_resume(root):
    image_folders.spoil(root / "bee" / "bee_004.png")
    reference = _take(_train(root, max_bad_share=1), 9)
    resumed = _train(root, max_bad_share=1, workers=2)
    resumed.set_state({"next_batch": 3})
    _assert_equal(_take(resumed, 6), reference[3:])
    assert resumed.bad_count == 1
    assert not multiprocessing.active_children()


def test_running_iterator_can_be_set_back(root):
    with _train(root) as batches:
        first = [next(batches) for _ in range(5)]
        batches.set_state({"next_batch": 1})
        _assert_equal([next(batches) for _ in range(4)], first[1:])


@pytest.mark.parametrize("count", [2, 8])
def test_processes_share_the_global_batches(root, count):
    def evaluate(*place):
        return _take(eval_batches(_config(root), SIZE, 8, *place))

    for read in (lambda *place: _take(_train(root, place=place), 6), evaluate):
        parts = [read(p, count) for p in range(count)]
        _assert_equal([_join(batches) for batches in zip(*parts, strict=True)], read(0, 1))


def _visits(root, monkeypatch, epochs, **options) -> list[str]:
    """The images behind the examples of so many epochs: a crop is replaced by the image's hash."""
    monkeypatch.setattr(
        pipeline,
        "random_crop",
        lambda image, size, rng, resize: np.frombuffer(image.tobytes()[::50][:48], np.uint8),
    )
    count = sum(COUNTS.values())
    batches = _take(_train(root, batch_size=count, **options), epochs)
    return [[row.tobytes().hex() for row in batch["image"]] for batch in batches]


def test_every_epoch_visits_every_image_once_in_another_order(root, monkeypatch):
    epochs = _visits(root, monkeypatch, 4)
    assert len(set(epochs[0])) == 23
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert _visits(root, monkeypatch, 1, seed=4)[0] not in epochs


def test_shuffling_moves_images_anywhere():
    config = DataConfig(source="embedded", length=1000, eval_length=1)
    with train_batches(config, image_size=16, batch_size=1000, seed=5) as batches:
        (visits, next_visits) = batches._positions[0], batches._positions[1]
    for epoch, found in enumerate((visits, next_visits)):
        assert {visit[0] for visit in found} == {epoch}
        places = np.array([index for _, index in found])
        np.testing.assert_array_equal(np.sort(places), np.arange(1000))
        assert abs(np.corrcoef(places, np.arange(1000))[0, 1]) < 0.12
        assert np.abs(np.diff(places)).mean() > 250  # 333 when independent
    assert abs(np.corrcoef([v[1] for v in visits], [v[1] for v in next_visits])[0, 1]) < 0.12


def test_an_image_is_cropped_anew_each_epoch_and_by_each_seed(root):
    def crops(seed, epochs):
        batches = _take(_train(root, batch_size=23, seed=seed), epochs)
        return {image.tobytes() for batch in batches for image in batch["image"]}

    # Crops of such small images may coincide.
    assert len(crops(0, 3)) > 60
    assert len(crops(0, 1) | crops(1, 1)) > 40


def test_batches_larger_than_the_data_set_go_round(root):
    labels = _take(_train(root, batch_size=69), 1)[0]["label"]
    assert collections.Counter(labels.tolist()) == {0: 27, 1: 24, 2: 18}


def test_array_records_give_the_batches_of_their_folder(root, tmp_path):
    test_sources.prepare(root, tmp_path / "tfds")
    records = DataConfig(path=str(tmp_path / "tfds"), name="photos_in_folder")
    options = {"image_size": SIZE, "batch_size": 8}
    _assert_equal(_take(train_batches(records, seed=3, **options), 5), _take(_train(root), 5))
    folder = eval_batches(_config(root), **options)
    _assert_equal(_take(eval_batches(records, **options)), _take(folder))


def test_drawings_make_batches():
    config = DataConfig(source="embedded", length=40, eval_length=20)
    batches = train_batches(config, image_size=32, batch_size=40, seed=0)
    assert batches.examples == 40 and len(batches.class_names) == 10
    np.testing.assert_array_equal(np.sort(_take(batches, 1)[0]["label"]), np.arange(40) // 4)


def test_evaluation_is_one_ordered_pass_of_center_crops(root):
    batches = _take(eval_batches(_config(root), image_size=SIZE, batch_size=10))
    assert [batch["image"].shape[0] for batch in batches] == [10, 10, 10]
    joined = _join(batches)
    assert joined["valid"].dtype == bool and joined["index"].dtype == np.int32
    np.testing.assert_array_equal(joined["valid"], np.arange(30) < 23)
    np.testing.assert_array_equal(joined["index"], [*range(23), *[-1] * 7])
    source = test_sources._open(_config(root), train=False)
    for i in range(23):
        np.testing.assert_array_equal(joined["image"][i], center_crop(source[i]["image"], SIZE))
        assert joined["label"][i] == source[i]["label"]
    assert not joined["image"][23:].any()


def test_evaluation_resumes_and_ends(root):
    whole = _take(eval_batches(_config(root), image_size=SIZE, batch_size=16))
    assert len(whole) == 2
    for start, workers in ((0, 2), (1, 0), (2, 0)):
        batches = eval_batches(_config(root, workers=workers), image_size=SIZE, batch_size=16)
        batches.set_state({"next_batch": start})
        _assert_equal(_take(batches), whole[start:])


def test_a_bad_image_is_replaced_by_the_next_and_named_once(root, caplog):
    good = _take(_train(root, batch_size=23), 3)
    image_folders.spoil(root / "ant" / "ant_008.png")
    batches = _train(root, batch_size=23, max_bad_share=0.1)
    with caplog.at_level("WARNING"):
        bad = _take(batches, 3)
    for batch, other in zip(bad, good, strict=True):
        different = (batch["image"] != other["image"]).any((1, 2, 3))
        assert different.sum() == 1
        assert other["label"][different] == 0 and batch["label"][different] == 1
    assert batches.bad_count == 1
    named = [record for record in caplog.records if "ant_008.png" in record.getMessage()]
    assert len(named) == 1
    _assert_equal(_take(_train(root, batch_size=23, max_bad_share=0.1), 3), bad)


def test_a_bad_image_is_left_out_of_evaluation_and_named(root, caplog):
    (root / "cat" / "cat_002.png").write_text("words")
    batches = eval_batches(_config(root, max_bad_share=0.1), image_size=SIZE, batch_size=23)
    with caplog.at_level("WARNING"):
        batch = _take(batches)[0]
    np.testing.assert_array_equal(np.nonzero(~batch["valid"])[0], [19])
    np.testing.assert_array_equal(batch["index"], np.arange(23))
    assert "cat/cat_002.png" in caplog.text and batches.bad_count == 1


def test_too_many_bad_images_stop_the_run(root):
    for name in ("ant/ant_001.png", "bee/bee_003.png"):
        image_folders.spoil(root / name)
    # 2 of 23 are 8.7 %.
    _take(_train(root, max_bad_share=0.09), 12)
    with pytest.raises(UserError, match=r"2 of 23 images.*max_bad_share=0\.08.*ant/ant_001\.png"):
        _take(_train(root, max_bad_share=0.08), 12)


@pytest.mark.parametrize("workers", [0, 1])
def test_set_without_any_readable_image_stops_at_once(root, workers):
    for path in root.glob("*/*"):
        path.write_text("words")
    with pytest.raises(UserError, match="23 images in a row cannot be read; the last one: "):
        _take(_train(root, max_bad_share=1, workers=workers), 1)


def test_batch_that_cannot_be_divided_is_an_error(root):
    with pytest.raises(
        UserError, match="batch_size: expected a multiple of the 2 processes, got 9"
    ):
        _train(root, batch_size=9, place=(0, 2))


def test_prefetching_to_devices_saves_the_state_of_what_was_handed_out(root):
    reference = _take(_train(root), 8)
    put = []
    batches = _train(root)
    stream = prefetch_to_device(batches, lambda b: put.append(b) or b, size=3)
    assert stream.get_state() == {"next_batch": 0}
    got = [next(stream) for _ in range(4)]
    _assert_equal(got, reference[:4])
    assert len(put) == 6, "three in flight, one of them handed out"
    state = stream.get_state()
    assert state == {"next_batch": 4}
    batches.set_state(state)
    resumed = prefetch_to_device(batches, lambda batch: batch, size=3)
    assert resumed.get_state() == state
    _assert_equal([next(resumed) for _ in range(4)], reference[4:])
    batches.close()


def test_prefetching_hands_out_all_good_batches_before_an_error(root):
    class Failing:
        def __init__(self):
            self.count = 0

        def __next__(self):
            self.count += 1
            if self.count > 3:
                raise UserError("broken")
            return self.count

        def get_state(self):
            return {"next_batch": self.count}

    stream = prefetch_to_device(Failing(), lambda batch: batch, size=2)
    assert [next(stream) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(UserError, match="broken"):
        next(stream)
    with eval_batches(_config(root), image_size=SIZE, batch_size=8) as batches:
        assert len(list(prefetch_to_device(batches, lambda batch: batch))) == 3


RUN = """
import sys, time
from gigatok_jax.data.pipeline import train_batches
from gigatok_jax.data.sources import DataConfig

if __name__ == "__main__":
    config = DataConfig(source="folder", path=sys.argv[1], holdout=0, workers=2)
    batches = train_batches(config, image_size=16, batch_size=8, seed=0)
    first = next(batches)
    print("ready", flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.readline()
        for _ in range(9):  # more than were read ahead
            next(batches)
        print("read", flush=True)
        time.sleep(60)
"""


def _session(group: int) -> set[int]:
    """Living processes of a session (state Z has ended)."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == group and state != "Z":
                found.add(int(entry.name))
    return found


def _start(root, tmp_path, what) -> subprocess.Popen:
    program = tmp_path / "run.py"
    program.write_text(RUN)
    command = [sys.executable, str(program), str(root), what]
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen(command, **pipes, text=True, start_new_session=True)


def _all_end(group: int, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while _session(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not _session(group)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_outlive_signals_but_not_their_parent(root, tmp_path):
    run = _start(root, tmp_path, "wait")
    try:
        assert run.stdout.readline() == "ready\n"
        workers = _session(run.pid) - {run.pid}
        assert len(workers) >= 2
        time.sleep(1)  # until the workers have read ahead and wait
        for pid in workers:  # what Ctrl-C or a scheduler sends to all processes at once
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
        run.stdin.write("\n")
        run.stdin.flush()
        assert run.stdout.readline() == "read\n"
        run.kill()
        run.wait(20)
        assert _all_end(run.pid)
    finally:
        for pid in _session(run.pid):
            os.kill(pid, signal.SIGKILL)
        run.communicate()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_program_that_forgets_to_close_ends_cleanly(root, tmp_path):
    run = _start(root, tmp_path, "leave")
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0 and "Traceback" not in errors, errors
    assert _all_end(run.pid)
