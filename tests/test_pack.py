"""The same images as folder, tar, Parquet, TFDS and records; packing them, and what is refused."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import io
import itertools
import json
import os
from pathlib import Path
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import test_commands
import webdataset

from gigatok_jax import distributed, files, packing
from gigatok_jax.data import encoded, tars
from gigatok_jax.data.crops import BadImage
from gigatok_jax.data.pipeline import eval_batches, train_batches
from gigatok_jax.data.sources import DataConfig, missing_classes, open_source
from gigatok_jax.errors import UserError

import image_folders

gigatok, refused = test_commands.gigatok, test_commands.refused

COUNTS = {"ant": 7, "bee": 3, "cat": 5}
NAMES = tuple(COUNTS)
OPTIONS = {"to": "records", "holdout": 0, "shard_images": 4}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def images(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.glob("*/*"))}


def write_tar(path: Path, members: dict[str, bytes], **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def labelled(contents: dict[str, bytes]) -> dict[str, bytes]:
    """Members of a webdataset shard; the class is the folder."""
    members = {}
    for name, content in contents.items():
        label = NAMES.index(name.split("/")[0])
        members |= {name: content, name.rpartition(".")[0] + ".cls": str(label).encode()}
    return members


def write_shards(root: Path, contents: dict[str, bytes], name: str = "photos") -> None:
    """Three webdataset shards, and a list of the classes."""
    root.mkdir(parents=True, exist_ok=True)
    pattern = str(root / f"{name}-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=-(-len(contents) // 3), verbose=0) as writer:
        for key, content in contents.items():
            label = NAMES.index(key.split("/")[0])
            writer.write({"__key__": key.removesuffix(".png"), "png": content, "cls": label})
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")


def write_parquet(path: Path, rows: list[dict], names=NAMES, **options) -> None:
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    schema = pyarrow.schema({"image": image, "label": pyarrow.int64()})
    features = {"label": {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    table = pyarrow.Table.from_pylist(rows, schema).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, path, **options)


def rows(contents: dict[str, bytes]) -> list[dict]:
    return [
        {"image": {"bytes": content, "path": key}, "label": NAMES.index(key.split("/")[0])}
        for key, content in contents.items()
    ]


def config(source: str, path: Path, **fields) -> DataConfig:
    return DataConfig(source=source, path=str(path), **({"holdout": 0} | fields))


def opened(*args, train: bool = True, **fields):
    return open_source(config(*args, **fields), train=train, image_size=16)


def keys(source) -> list[str]:
    return [source[i]["key"] for i in range(len(source))]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name[0] != "."}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    image_folders.make(root, COUNTS)
    return root


@pytest.fixture(scope="module")
def forms(tmp_path_factory, photos) -> dict[str, DataConfig]:
    """The images of `photos` in every form that training reads."""
    root = tmp_path_factory.mktemp("forms")
    found = images(photos)
    write_shards(root / "tar", found)
    (root / "parquet").mkdir()
    halves = [rows(found)[:8], rows(found)[8:]]
    for i, some in enumerate(halves):
        write_parquet(root / "parquet" / f"train-0000{i}-of-00002.parquet", some, row_group_size=3)
    for name, source in (("folder", photos), ("tar", root / "tar"), ("parquet", root / "parquet")):
        packing.pack([str(source)], root / f"{name}_records", **OPTIONS)
    tfds = root / "tfds" / "photos" / "1.0.0"
    packing.pack([str(root / "tar" / "*.tar")], tfds, **OPTIONS | {"to": "tfds"})
    return {
        "folder": config("folder", photos),
        "tar": config("tar", root / "tar"),
        "tfds": config("tfds", root / "tfds", name="photos", eval_split="train"),
        "records": config("records", root / "folder_records"),
        "records of tar": config("records", root / "tar_records"),
        "records of parquet": config("records", root / "parquet_records"),
    }


@pytest.mark.parametrize("form", ["tar", "tfds", "records", "records of tar", "records of parquet"])
def test_every_form_gives_the_batches_of_the_folder(forms, form):
    def read(config):
        with train_batches(config, image_size=16, batch_size=5, seed=3) as stream:
            trained = [next(stream) for _ in range(6)]
        with eval_batches(config, image_size=16, batch_size=4) as stream:
            return stream.class_names, trained, list(stream)

    names, *batches = read(forms[form])
    expected_names, *expected = read(forms["folder"])
    assert names == expected_names == NAMES
    for found, wanted in zip(batches, expected, strict=True):
        for batch, other in zip(found, wanted, strict=True):
            assert batch.keys() == other.keys()
            for name, array in batch.items():
                np.testing.assert_array_equal(array, other[name])


@pytest.mark.parametrize("form", ["tar", "records", "tfds"])
def test_sources_of_files_pickle_and_give_labels_without_images(forms, form):
    source = open_source(forms[form], train=True, image_size=16)
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 2_000
    assert copy.version() == source.version() and keys(copy) == keys(source)
    assert [source.label(i) for i in range(15)] == [copy[i]["label"] for i in range(15)]
    assert missing_classes(source) == ()
    with pytest.raises(IndexError):
        source[15]


# Tar files.


def test_words_in_the_names_of_tar_files_tell_the_splits(photos, tmp_path):
    found = images(photos)
    train, held = dict(list(found.items())[:9]), dict(list(found.items())[9:])
    write_tar(tmp_path / "a" / "photos-train-000.tar", labelled(train))
    write_tar(tmp_path / "a" / "photos-val-000.tar", labelled(held))
    write_tar(tmp_path / "a" / "photos-test-000.tar", {"x.png": b"has no label"})
    write_tar(tmp_path / "b" / "train" / "0.tar", labelled(train))
    write_tar(tmp_path / "b" / "validation" / "0.tar", labelled(held))
    for path in ("a", "a/photos-{train,val}-{000..000}.tar", "b/*/0.tar"):
        assert keys(opened("tar", tmp_path / path, holdout=2)) == list(train)
        source = opened("tar", tmp_path / path, holdout=2, train=False)
        assert keys(source) == list(held) and source.class_names == ("0", "1", "2")
    (tmp_path / "a" / "photos-test-000.tar").rename(tmp_path / "a" / "more.tar")
    with pytest.raises(UserError, match=r"^more\.tar: expected one of train, .* found none$"):
        opened("tar", tmp_path / "a")
    (tmp_path / "a" / "more.tar").rename(tmp_path / "a" / "train-val-1.tar")
    with pytest.raises(UserError, match=r"^train-val-1\.tar: .* one, found train and val$"):
        opened("tar", tmp_path / "a")


def test_without_splits_the_images_that_a_folder_holds_out_are_held_out(forms, photos):
    for train in (True, False):
        wanted = keys(opened("folder", photos, holdout=4, train=train))
        tar = dataclasses.replace(forms["tar"], holdout=4)
        assert keys(open_source(tar, train=train, image_size=16)) == wanted
        assert 0 < len(wanted) < 15


def test_index_is_made_once_and_again_when_a_file_changes(photos, tmp_path, cache, monkeypatch):
    write_shards(tmp_path / "tar", images(photos))
    scanned = []
    scan = tars._scan
    monkeypatch.setattr(tars, "_scan", lambda part: scanned.append(part) or scan(part))
    before = opened("tar", tmp_path / "tar")
    assert len(scanned) == 3 and len(list((tmp_path / "tar").glob(".tar_index_*.npz"))) == 1
    assert opened("tar", tmp_path / "tar").version() == before.version() and len(scanned) == 3
    changed = dict(list(images(photos).items())[:2])
    write_tar(tmp_path / "tar" / "photos-0001.tar", labelled(changed))
    after = opened("tar", tmp_path / "tar")
    assert len(scanned) == 6 and after.version() != before.version() and len(after) == 12
    with pytest.raises(UserError, match="have changed since this run started"):
        pickle.loads(pickle.dumps(before))
    assert not list(cache.rglob("*.npz"))


def test_processes_at_once_make_the_index_once(photos, tmp_path, monkeypatch):
    """Threads stand for processes: each has its own lock."""
    write_shards(tmp_path / "tar", images(photos))
    scanned = []
    scan = tars._scan
    monkeypatch.setattr(tars, "_scan", lambda part: scanned.append(part) or scan(part))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: opened("tar", tmp_path / "tar"), range(4)))
    assert len(scanned) == 3 and {len(source) for source in found} == {15}


def test_index_needs_no_lock(photos, tmp_path, monkeypatch):
    write_shards(tmp_path / "tar", images(photos))
    (tmp_path / "file").touch()
    monkeypatch.setenv("GIGATOK_CACHE", str(tmp_path / "file" / "cache"))
    assert len(opened("tar", tmp_path / "tar")) == 15


class HttpError(Exception):
    """Like gcsfs's, which is no OSError."""


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), HttpError("401")])
def test_index_is_cached_where_the_folder_cannot_be_written_to(
    photos, tmp_path, cache, monkeypatch, error
):
    write_shards(tmp_path / "tar", images(photos))
    write = files.write_npz

    def refuse(path, arrays):
        if path.parent == tmp_path / "tar":
            raise error
        write(path, arrays)

    monkeypatch.setattr(files, "write_npz", refuse)
    source = opened("tar", tmp_path / "tar")
    assert len(source) == 15 and len(list(cache.rglob("tar_index_*.npz"))) == 1
    monkeypatch.setattr(tars, "_make_index", None)
    assert keys(opened("tar", tmp_path / "tar")) == keys(source)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_in_any_bytes_are_keys(photos, tmp_path, format):
    content = images(photos)["ant/ant_000.png"]
    names = ["ant/" + "n" * 200 + ".png", "ant/ü ß.png", os.fsdecode(b"ant/a\xf1o.png")]
    members = labelled(dict.fromkeys(names, content))
    write_tar(tmp_path / "a.tar", {f"./{k}": v for k, v in members.items()}, format=format)
    source = opened("tar", tmp_path)
    assert keys(source) == [*names[:2], "ant/a\\xf1o.png"]
    assert source[2]["image"].size == (40, 34)


def test_labels_come_from_json_too_and_may_be_names(photos, tmp_path):
    content = images(photos)["ant/ant_000.png"]
    members = {"b.json": b'{"label": 4, "width": 40}', "b.png": content, "b.txt": b"a caption"}
    members |= {"b.mask.png": content, "._b.png": b"resource fork"}
    members |= {"a.JPG": content, "a.json": b'{"label": 9}', "a.cls": b"1\n"}
    write_tar(tmp_path / "numbers.tar", members)
    source = opened("tar", tmp_path)
    assert keys(source) == ["b.png", "a.JPG"] and [source.label(i) for i in (0, 1)] == [4, 1]
    assert source.class_names == ("0", "1", "2", "3", "4")
    (tmp_path / "classes.json").write_text(json.dumps([*"vwxyz"]))
    assert opened("tar", tmp_path).class_names == (*"vwxyz",)
    write_tar(tmp_path / "names" / "a.tar", {"1.png": content, "1.cls": b"dog", **members})
    with pytest.raises(UserError, match="all numbers, or all names, found both"):
        opened("tar", tmp_path / "names")
    members = {"1.png": content, "1.cls": b"dog", "2.png": content, "2.json": b'{"label": "cat"}'}
    write_tar(tmp_path / "names" / "a.tar", members)
    source = opened("tar", tmp_path / "names")
    assert source.class_names == ("cat", "dog") and [source.label(i) for i in (0, 1)] == [1, 0]


def test_every_picture_of_a_tar_file_is_read_or_counted(photos, tmp_path, caplog, monkeypatch):
    content = images(photos)["ant/ant_000.png"]
    members = {f"{i}.cls": b"0" for i in range(1, 7)}
    members |= {"1.v2.png": content, "2.jxl": b"1", "3.jxl": b"1", "3.mask.png": content}
    members |= {"4.jxl": b"1", "4.PNG": content, "5.mask.png": content, "5.png": content}
    write_tar(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, kind in (("6.png", tarfile.LNKTYPE), ("7.png", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "5.png"
            tar.addfile(link)
    for _ in range(2):  # with a new index, and with the one that is kept
        caplog.clear()
        source = opened("tar", tmp_path)
        assert keys(source) == ["1.v2.png", "4.PNG", "5.png", "6.png"]
        np.testing.assert_array_equal(source[3]["image"], source[2]["image"])
        assert caplog.text.count("cannot be read: 2 .jxl, 1 .png (link)") == 1
    monkeypatch.setattr(tars, "READABLE", {*tars.READABLE, "jxl"})  # by a library installed since
    with pytest.raises(UserError, match=r"found 4\.jxl and 4\.PNG"):
        opened("tar", tmp_path)
    write_tar(tmp_path / "a.tar", {"1.v1.png": content, "1.v2.png": content, "1.cls": b"0"})
    with pytest.raises(UserError, match=r"one image of a name, up .* found 1\.v1\.png and 1\.v2"):
        opened("tar", tmp_path)
    write_tar(tmp_path / "a.tar", {"1.svg": b"1", "1.cls": b"0"})
    with pytest.raises(UserError, match=r"no images in a\.tar"):
        opened("tar", tmp_path)
    assert "cannot be read: 1 .svg" in caplog.text


def test_damaged_members_are_named_and_skipped(photos, tmp_path):
    found = images(photos)
    found["ant/ant_003.png"] = found["ant/ant_003.png"][:200]
    write_tar(tmp_path / "tar" / "a.tar", labelled(found))
    packing.pack([str(tmp_path / "tar")], tmp_path / "records", **OPTIONS)
    for source in ("tar", "records"):
        with pytest.raises(BadImage, match=r"^ant/ant_003\.png: "):
            opened(source, tmp_path / source)[3]
        data = config(source, tmp_path / source, max_bad_share=0.1)
        with train_batches(data, image_size=16, batch_size=15, seed=0) as stream:
            labels = next(stream)["label"]
        assert stream.bad_count == 1 and sorted(labels) == [0] * 7 + [1] * 3 + [2] * 5


def damage_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(b"bee/bee_001.png")
    content[place : place + 8] = b"xxxxxxxx"
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.read_bytes().index(b"bee/bee_001.png") + 600)


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_header, r"a\.tar: damaged at byte \d+$"),
        (cut, r"a\.tar: incomplete, at bee/bee_001\.png"),
        (lambda path: path.write_bytes(b""), r"a\.tar: expected an uncompressed tar .*empty file"),
        (lambda path: path.write_bytes(b"words" * 999), r"a\.tar: expected an uncompressed tar"),
        (lambda path: write_tar(path, {}), r"no images in a\.tar"),
        (lambda path: write_tar(path, {"notes.txt": b"words"}), r"no images in a\.tar"),
        (
            lambda path: write_tar(path, {"x.png": b"1"}),
            r"a\.tar: x\.png: expected a label in .cls",
        ),
        (
            lambda path: write_tar(path, {"x.png": b"1", "x.json": b'{"label": [1]}'}),
            r"a\.tar: x\.json: expected a number or name of a class, got ",
        ),
        (
            lambda path: write_tar(path, {"x.png": b"1", "x.cls": b"3"}),
            r"x\.png: expected a label from 0 to 2, as in classes\.txt, got 3",
        ),
        (
            lambda path: write_tar(path, {"x.png": b"1", "x.cls": b"-1"}),
            r"x\.png: expected a label from 0 to 2, as in classes\.txt, got -1",
        ),
        (
            lambda path: write_tar(path, {"x.png": b"1", "x.jpg": b"1", "x.cls": b"1"}),
            r"a\.tar: expected one image of a name, .* found x\.png and x\.jpg",
        ),
        (lambda path: path.unlink(), r"expected \.tar files, found none"),
        (
            lambda path: path.rename(path.with_name("a.tar.gz")),
            r"a\.tar\.gz: expected an uncompressed \.tar file",
        ),
    ],
)
def test_tar_files_that_cannot_serve_are_named(photos, tmp_path, damage, message):
    root = tmp_path / "tar"
    write_tar(root / "a.tar", labelled(images(photos)))
    (root / "classes.txt").write_text("\n".join(NAMES))
    damage(root / "a.tar")
    with pytest.raises(UserError, match=message) as caught:
        opened("tar", root)
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(root.glob(".tar_index_*")) or "label" in message or "no images" in message


# ImageNet as it is published.

VALIDATION = ("n01751748", "n09193705", "n02105855")  # of the first three images


@pytest.fixture
def imagenet(tmp_path, photos) -> Path:
    """ImageNet's two tar files, with few images."""
    root, content = tmp_path / "imagenet", iter(images(photos).values())
    inner = {}
    for name in sorted({*VALIDATION, "n01440764"}, reverse=True):  # as in no order
        path = tmp_path / f"{name}.tar"
        write_tar(path, {f"{name}_{i}.JPEG": next(content) for i in (18, 7)})
        inner[path.name] = path.read_bytes()
    # One without its end, which a tar file may lack.
    whole = inner["n01751748.tar"].rstrip(b"\0")
    inner["n01751748.tar"] = whole + bytes(-len(whole) % tarfile.BLOCKSIZE)
    write_tar(root / "ILSVRC2012_img_train.tar", inner)
    validation = {f"ILSVRC2012_val_0000000{i}.JPEG": next(content) for i in (2, 3, 1)}
    write_tar(root / "ILSVRC2012_img_val.tar", validation)
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"")
    return root


def test_tar_files_of_imagenet_are_read_and_packed_as_they_are(imagenet, gigatok, tmp_path):
    names = ("n01440764", "n01751748", "n02105855", "n09193705")
    train, held = (opened("tar", imagenet, train=train) for train in (True, False))
    assert train.class_names == held.class_names == names
    assert [train.class_names[train.label(i)] for i in range(8)] == [
        key.split("_")[0] for key in keys(train)
    ]
    assert keys(held) == [f"ILSVRC2012_val_0000000{i}.JPEG" for i in (2, 3, 1)]
    assert [names[held.label(i)] for i in range(3)] == [VALIDATION[i] for i in (1, 2, 0)]
    out = tmp_path / "tfds" / "imagenet2012" / "5.1.0"
    code, text, lines = gigatok(
        *("pack", f"--from={imagenet / 'ILSVRC2012_img_train.tar'}"),
        *(f"--from={imagenet / 'ILSVRC2012_img_val.tar'}", f"--out={out}", "--to=tfds"),
    )
    assert code == 0, lines
    assert text.splitlines() == [
        "train: 8 images (0 could not be read) in 1 shards",
        "validation: 3 images (0 could not be read) in 1 shards",
        str(out),
    ]
    data = DataConfig(path=str(tmp_path / "tfds"))
    for source, is_train in ((train, True), (held, False)):
        found = open_source(data, train=is_train, image_size=16)
        assert found.class_names == names and keys(found) == keys(source)
        for i in range(len(source)):
            assert found.label(i) == source.label(i)
            np.testing.assert_array_equal(found[i]["image"], source[i]["image"])


# Packing.


def test_packed_bytes_are_those_of_the_files(forms, photos):
    records = open_source(forms["records"], train=True, image_size=16)
    found = {example["key"]: example["image"] for example in records.read(0, 15)}
    assert found == images(photos)


def test_killed_packing_resumes_to_the_same_files(tmp_path, photos):
    """Links are as many images as it takes for a kill to come in the middle."""
    root, out = tmp_path / "many", tmp_path / "out"
    for name in NAMES:
        (root / name).mkdir(parents=True)
        for i in range(700):
            os.link(photos / "ant" / "ant_000.png", root / name / f"{i:03d}.png")
    command = [sys.executable, "-m", "gigatok_jax", "pack", f"--from={root}", f"--out={out}"]
    process = subprocess.Popen([*command, "--shard_images=3"], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while len(list(out.glob("train-*"))) < 9 and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "validation-00000-of-00030.array_record" not in contents(out)
    with pytest.raises(UserError, match="not all images have been packed; the same `gigatok pack`"):
        opened("records", out)
    first = (out / sorted(contents(out))[1]).stat()
    options = {"to": "records", "holdout": 20, "shard_images": 3}
    packing.pack([str(root)], out, **options)
    packing.pack([str(root)], tmp_path / "whole", **options)
    assert contents(out) == contents(tmp_path / "whole") and len(contents(out)) > 600
    last = (out / sorted(contents(out))[1]).stat()
    assert (last.st_mtime_ns, last.st_ino) == (first.st_mtime_ns, first.st_ino)


@pytest.mark.parametrize("source", ["folder", "tar"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), HttpError("Busy, 503")])
def test_failed_reading_loses_no_image(photos, tmp_path, gigatok, monkeypatch, source, error):
    """The disk or the network fails once, in the second of four shards."""
    root = photos
    if source == "tar":
        root = tmp_path / "tar"
        write_shards(root, images(photos))
    reads = itertools.count()

    def failing(read):
        def run(*args):
            if next(reads) == 6:
                raise error
            return read(*args)

        return run

    for owner, name in ((Path, "read_bytes"), (files, "read_part")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    monkeypatch.setattr(encoded, "READERS", 1)
    command = ("pack", f"--from={root}", f"--out={tmp_path / 'out'}", "--shard_images=4")
    code, out, lines = gigatok(*command, "--holdout=0")
    assert code == 1 and not out and len([line for line in lines if "error" in line]) == 1
    assert re.search(rf"error: {root}.*: (Input/output error|Busy, 503)$", lines[-1])
    code, out, lines = gigatok(*command, "--holdout=0")
    assert code == 0 and out.startswith("train: 15 images (0 could not be read) in 4 shards\n")


@pytest.mark.parametrize("workers", [0, 1])
def test_failed_reading_ends_a_pass(photos, tmp_path, workers):
    """As in `encode`, which would store no codes of the image."""
    write_tar(tmp_path / "a.tar", labelled(images(photos)))
    with eval_batches(config("tar", tmp_path, workers=workers), 16, 3) as stream:
        (tmp_path / "a.tar").unlink()
        with pytest.raises(OSError, match=r"No such file or directory: .*a\.tar"):
            next(stream)


def test_images_that_are_missing_are_skipped(tmp_path, gigatok):
    image_folders.make(tmp_path / "in", COUNTS)
    (tmp_path / "in" / "ant" / "x.png").symlink_to("/nowhere.png")
    (tmp_path / "in" / "ant" / "y.png").symlink_to("y.png")
    code, out, _ = gigatok("pack", f"--from={tmp_path / 'in'}", f"--out={tmp_path / 'out'}")
    assert code == 0 and "(2 could not be read)" in out


@pytest.mark.parametrize("to", ["records", "tfds"])
def test_two_processes_write_what_one_does(photos, tmp_path, monkeypatch, to):
    options = OPTIONS | {"to": to}
    one, two = (tmp_path / name / "photos" / "1.0.0" for name in ("one", "two"))
    packing.pack([str(photos)], one, **options)
    monkeypatch.setattr(distributed, "place", lambda: (1, 2))
    with pytest.raises(UserError, match="missing or damaged shard of images"):  # of the other
        packing.pack([str(photos)], two, **options)
    assert len(list(two.glob("*00003-of-00004*"))) == 1 and not list(two.glob("*00000-of-*"))
    monkeypatch.setattr(distributed, "place", lambda: (0, 2))
    packing.pack([str(photos)], two, **options)
    assert contents(two) == contents(one)


def test_splits_of_a_folder_stay_and_others_are_held_out(tmp_path):
    image_folders.make(tmp_path / "split" / "train", COUNTS)
    image_folders.make(tmp_path / "split" / "val", {"cat": 2})
    image_folders.make(tmp_path / "whole", COUNTS)
    for name in ("split", "whole"):
        packing.pack([str(tmp_path / name)], tmp_path / f"{name}_out", **OPTIONS | {"holdout": 4})
        for train in (True, False):
            wanted = opened("folder", tmp_path / name, holdout=4, train=train)
            found = opened("records", tmp_path / f"{name}_out", train=train)
            assert keys(found) == keys(wanted) and found.class_names == wanted.class_names


def test_hidden_labels_and_test_files_of_parquet_do_not_count(tmp_path, photos):
    some = rows(images(photos))
    (tmp_path / "in").mkdir()
    some[2]["label"] = -1
    some[4]["image"]["path"] = None
    some[5]["image"]["bytes"] = None
    write_parquet(tmp_path / "in" / "train-00000-of-00001.parquet", some[:12])
    write_parquet(tmp_path / "in" / "validation-00000-of-00001.parquet", some[12:])
    write_parquet(tmp_path / "in" / "test-00000-of-00001.parquet", some[:1], names=("x",))
    packing.pack([str(tmp_path / "in")], tmp_path / "out", **OPTIONS)
    found = keys(opened("records", tmp_path / "out"))
    wanted = [row["image"]["path"] for i, row in enumerate(some[:12]) if i not in (2, 5)]
    wanted[3] = "train-00000-of-00001.parquet/0/4"
    assert found == wanted and len(opened("records", tmp_path / "out", train=False)) == 3


def test_damaged_row_groups_of_parquet_are_named(tmp_path, photos, monkeypatch):
    path, some = tmp_path / "a.parquet", rows(images(photos))
    write_parquet(path, some, row_group_size=4, use_dictionary=False)
    source = packing.open_files([str(tmp_path)], train=True, holdout=0)
    whole = path.read_bytes()

    def damage(column: int):
        place = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(column)
        start = place.data_page_offset
        path.write_bytes(whole[:start] + b"\xff" * 20 + whole[start + 20 :])

    damage(0)  # image.bytes
    found = list(source.read(0, 15))
    bad = [i for i, example in enumerate(found) if isinstance(example, BadImage)]
    assert bad == [4, 5, 6, 7]
    key = some[4]["image"]["path"]
    assert re.match(rf"{key}: {path}: row group 1 is damaged: .+$", str(found[4]))
    damage(2)  # label
    with pytest.raises(UserError, match=rf"^{path}: row group 1 is damaged: .+$"):
        packing.open_files([str(tmp_path)], train=True, holdout=0)
    for error in (OSError(5, "Input/output error"), HttpError("Busy, 503")):

        def fail(*args, error=error, **options):
            raise error

        monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", fail)
        path.write_bytes(whole)
        with pytest.raises(OSError, match=r"(Input/output error|Busy, 503): .*a\.parquet"):
            next(source.read(0, 15))


def test_changed_images_and_other_folders_are_rejected(tmp_path, photos):
    image_folders.make(tmp_path / "in", COUNTS)
    packing.pack([str(tmp_path / "in")], tmp_path / "out", **OPTIONS)
    before = contents(tmp_path / "out")
    image_folders.make(tmp_path / "in", {"dog": 2})

    def fails(match, source=tmp_path / "in", out=tmp_path / "out", **changes):
        with pytest.raises(UserError, match=match) as caught:
            packing.pack([str(source)], out, **OPTIONS | changes)
        assert "\n" not in str(caught.value)

    fails(r"out: the train images have changed .* \(17 images, were 15\); pack them into another")
    fails("holds images made with another shard_images: 4, not 5", shard_images=5)
    (tmp_path / "in" / "dog" / "dog_000.png").rename(tmp_path / "in" / "dog" / "x.png")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "info.json").unlink()
    fails(r"out: expected an empty folder, or one with info\.json, found train-00000")
    for out in (tmp_path / "Photos" / "1.0.0", tmp_path / "photos" / "1"):
        fails(r"^--out: expected DATA_DIR/NAME/VERSION with --to=tfds", out=out, to="tfds")
        assert not out.exists()


def write_other_parquet(folder: Path) -> None:
    table = pyarrow.table({"label": [0], "picture": [b"1"]})
    pyarrow.parquet.write_table(table, folder / "a.parquet")


@pytest.mark.parametrize(
    "name, make, message",
    [
        (
            "",
            write_other_parquet,
            r"a\.parquet: expected the columns image, .*found label: int64, ",
        ),
        (
            "",
            lambda f: (f / "a.parquet").write_text("words"),
            r"a\.parquet: expected a Parquet file",
        ),
        ("", lambda f: write_parquet(f / "a.parquet", []), "no labelled images of split 'all'"),
        (
            "",
            lambda f: write_parquet(f / "a.parquet", [{"image": {"bytes": b"1"}, "label": 3}]),
            "expected labels from 0 to 2, got 3",
        ),
        (
            "",
            lambda f: [write_parquet(f / f"{n}.parquet", [], names=n) for n in "ab"],
            r"b\.parquet: expected the classes of a\.parquet",
        ),
        ("", lambda f: None, "no images"),
        ("nothing", lambda f: None, "no such folder"),
        (
            "",
            lambda f: [image_folders.make(f, {"ant": 1}), write_tar(f / "x.tar", {})],
            r"--from: expected a folder of images, or of \.tar files, but .* has x\.tar and ant/;",
        ),
        (
            "",
            lambda f: [(f / "a.png").touch(), write_parquet(f / "x.parquet", [])],
            r"of \.parquet files, but .* has x\.parquet and a\.png; move one kind, or give a pat",
        ),
        ("*.tar", lambda f: None, r"expected \.tar files, found none"),
    ],
)
def test_pack_rejects_what_it_cannot_read_in_one_line(gigatok, tmp_path, name, make, message):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    make(source)
    text = refused(gigatok("pack", f"--from={source / name}", f"--out={out}"))
    assert re.search(message, text) and str(source) in text
    assert not out.exists()


def test_records_that_cannot_be_read_now_are_no_bad_images(forms):
    source = open_source(forms["records"], train=True, image_size=16)

    class Failing:
        def __len__(self):
            return 15

        def __getitem__(self, index):
            raise RuntimeError(message)

    source._records = Failing()
    message = "Corrupted Riegeli/records file: chunk data hash mismatch"
    with pytest.raises(BadImage, match="record 3 is damaged: Corrupted"):
        source[3]
    message = "pread() failed: Input/output error"
    with pytest.raises(OSError, match=r"pread\(\) failed"):
        source[3]


def test_records_that_are_incomplete_or_elsewhere_are_named(tmp_path, forms):
    with pytest.raises(UserError, match=r"no info\.json, expected the output of `gigatok pack`"):
        opened("records", tmp_path)
    tfds = Path(forms["tfds"].path) / "photos" / "1.0.0"
    with pytest.raises(UserError, match="expected packed records, found a TFDS data set"):
        opened("records", tfds)
    with pytest.raises(ValueError, match=r"^path: expected a value with source='tar', got ''"):
        DataConfig(source="tar")
