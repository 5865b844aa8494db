"""Folders, TFDS and drawings give labelled images by index, and say what is wrong with them."""

import dataclasses
import pickle
import shutil
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from gigatok_jax.data import sources
from gigatok_jax.data.crops import BadImage
from gigatok_jax.data.sources import DataConfig, missing_classes, open_source
from gigatok_jax.errors import UserError

import image_folders

COUNTS = {"cat": 5, "ant": 7, "bee": 3}


class PhotosInFolder(tfds.core.GeneratorBasedBuilder):
    """The images of a folder in TFDS, in the folder's order."""

    VERSION = tfds.core.Version("1.0.0")
    root = None
    class_names = ()

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=self.class_names),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "validation": self._generate_examples()}

    def _generate_examples(self):
        for i, path in enumerate(sorted(self.root.glob("*/*.png"))):
            key = f"{path.parent.name}/{path.name}"
            yield i, {"image": path.read_bytes(), "label": path.parent.name, "file_name": key}


def prepare(root, data_dir, file_format="array_record"):
    PhotosInFolder.root = root
    PhotosInFolder.class_names = sorted(path.name for path in root.iterdir())
    builder = PhotosInFolder(data_dir=data_dir, file_format=file_format)
    builder.download_and_prepare()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with `photos`, a folder of images, and `tfds`, the same images in TFDS."""
    root = tmp_path_factory.mktemp("prepared")
    image_folders.make(root / "photos", COUNTS)
    prepare(root / "photos", root / "tfds")
    return root


def _folder(path, **fields) -> DataConfig:
    return DataConfig(source="folder", path=str(path), **({"holdout": 0} | fields))


def _open(config, train=True):
    return open_source(config, train=train, image_size=32)


def _keys(source) -> list[str]:
    return [source[i]["key"] for i in range(len(source))]


def test_folders_are_read_in_sorted_order_with_sorted_classes(tmp_path):
    keys = image_folders.make(tmp_path, COUNTS)
    source = _open(_folder(tmp_path))
    assert source.class_names == ("ant", "bee", "cat")
    assert _keys(source) == keys
    assert [source[i]["label"] for i in range(15)] == [0] * 7 + [1] * 3 + [2] * 5
    np.testing.assert_array_equal(source[8]["image"], Image.open(tmp_path / keys[8]))
    assert source[8]["image"].mode == "RGB"
    with pytest.raises(IndexError):
        source[15]


def test_sources_survive_pickling(prepared):
    drawings = DataConfig(source="embedded", length=9, eval_length=9)
    records = DataConfig(path=str(prepared / "tfds"), name="photos_in_folder", length=9)
    for config in (_folder(prepared / "photos", length=9), records, drawings):
        source = _open(config)
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == 9 and copy.class_names == source.class_names
        np.testing.assert_array_equal(copy[7]["image"], source[7]["image"])


def test_files_that_are_no_images_by_name_do_not_count(tmp_path):
    keys = image_folders.make(tmp_path, COUNTS)
    (tmp_path / "bee" / "notes.txt").write_text("words")
    (tmp_path / "bee" / "._bee_000.png").write_bytes(b"resource fork")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "empty").mkdir()
    source = _open(_folder(tmp_path))
    assert _keys(source) == keys and source.class_names == ("ant", "bee", "cat")


def test_images_in_deeper_folders_and_odd_names_count(tmp_path):
    names = ["a/x/2.PNG", "a/x/y/1.JPEG", "a/ü ß.png", "b/1.jpg"]
    for seed, name in enumerate(names):
        image_folders.save(tmp_path / name, seed)
    source = _open(_folder(tmp_path))
    assert _keys(source) == names and source.class_names == ("a", "b")


def test_links_are_followed_but_not_in_circles(tmp_path):
    keys = image_folders.make(tmp_path / "elsewhere", {"ant": 2, "bee": 1})
    root = tmp_path / "photos"
    for name in ("ant", "bee"):
        root.mkdir(exist_ok=True)
        (root / name).symlink_to(tmp_path / "elsewhere" / name)
    ant, bee = (tmp_path / "elsewhere" / name for name in ("ant", "bee"))
    (ant / "up").symlink_to(ant)
    (ant / "twice").symlink_to(bee)
    (bee / "back").symlink_to(ant)
    (bee / "nowhere").symlink_to("nowhere")
    source = _open(_folder(root))
    nested = ["ant/twice/bee_000.png", "bee/back/ant_000.png", "bee/back/ant_001.png"]
    assert _keys(source) == sorted(keys + nested)
    np.testing.assert_array_equal(source[2]["image"], source[5]["image"])


def test_a_broken_image_raises_with_its_name_and_spares_the_others(tmp_path):
    keys = image_folders.make(tmp_path, COUNTS)
    image_folders.spoil(tmp_path / keys[4])
    (tmp_path / keys[9]).write_text("words")
    source = _open(_folder(tmp_path))
    for i in (4, 9):
        with pytest.raises(BadImage, match=keys[i]):
            source[i]
    assert source[5]["key"] == keys[5]


def test_a_flat_folder_is_one_class(tmp_path):
    for seed, name in enumerate(("2.png", "1.png")):
        image_folders.save(tmp_path / "photos" / name, seed)
    source = _open(_folder(tmp_path / "photos"))
    assert source.class_names == ("photos",) and _keys(source) == ["1.png", "2.png"]


def test_held_out_images_are_chosen_by_name_and_never_trained_on(tmp_path):
    keys = image_folders.make(tmp_path, {"ant": 9, "bee": 9, "cat": 9})
    config = _folder(tmp_path, holdout=4)
    train, held = _open(config), _open(config, train=False)
    assert 3 <= len(held) <= 12
    image_folders.make(tmp_path, {"ant": 20, "bee": 20, "cat": 20})  # the folder grows
    assert not set(_keys(_open(config, train=False))) & set(_keys(train))
    assert not set(_keys(_open(config))) & set(_keys(held))
    assert sorted(_keys(train) + _keys(held)) == keys
    labels = {key: "abc".index(key[0]) for key in keys}
    for source in (train, held):
        assert source.class_names == ("ant", "bee", "cat")
        assert all(source[i]["label"] == labels[source[i]["key"]] for i in range(len(source)))


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_train_and_val_folders_are_the_splits_and_share_labels(tmp_path, validation):
    keys = image_folders.make(tmp_path / "train", COUNTS)
    image_folders.make(tmp_path / validation, {"cat": 2, "bee": 1})
    config = _folder(tmp_path, holdout=20)
    train, held = _open(config), _open(config, train=False)
    assert _keys(train) == [f"train/{key}" for key in keys]
    assert held.class_names == train.class_names
    assert [held[i]["label"] for i in range(3)] == [1, 2, 2]
    (tmp_path / "train" / "aardvark").mkdir()  # A class without images has no label.
    assert _open(config).class_names == _open(config, train=False).class_names == train.class_names
    image_folders.make(tmp_path / validation, {"dog": 1})
    with pytest.raises(UserError, match=rf"{validation}/dog.*no such class"):
        _open(config, train=False)


def test_a_class_whose_images_are_all_held_out_is_ignored(tmp_path, caplog):
    keys = image_folders.make(tmp_path, {f"class{i:02d}": 1 for i in range(40)})
    config = _folder(tmp_path, holdout=4)
    with pytest.raises(UserError, match="too few images to hold any out"):
        _open(config, train=False)
    image_folders.make(tmp_path, {"class00": 30})
    train, held = _open(config), _open(config, train=False)
    assert train.class_names == held.class_names and 20 < len(train.class_names) < 40
    assert {train[i]["label"] for i in range(len(train))} == set(range(len(train.class_names)))
    assert "ignored, because all its images are held out" in caplog.text
    assert len(keys) == 40


def test_length_takes_the_same_examples_of_all_classes(tmp_path):
    keys = image_folders.make(tmp_path, {"ant": 10, "bee": 10, "cat": 10})
    config = _folder(tmp_path, length=12, eval_length=6)
    source = _open(config)
    assert _keys(source) == _keys(_open(config)) != keys[:12]
    assert len(set(_keys(source))) == 12
    assert {source[i]["label"] for i in range(12)} == {0, 1, 2}
    assert missing_classes(source) == ()
    one = _open(_folder(tmp_path, length=1))
    assert sorted([*missing_classes(one), one[0]["label"]]) == [0, 1, 2]
    assert pickle.loads(pickle.dumps(source))[3]["key"] == source[3]["key"]
    with pytest.raises(UserError, match=r"data\.length: expected at most the 30 .*, got 31"):
        _open(_folder(tmp_path, length=31))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda root: root.rename(root.with_name("away")), "no such folder"),
        (lambda root: [path.unlink() for path in root.glob("*/*")], "no images"),
        (
            lambda root: image_folders.make(root / "train", COUNTS),
            r"has train/, expected train/",
        ),
    ],
)
def test_folders_that_cannot_serve_are_named(tmp_path, spoil, message):
    root = tmp_path / "photos"
    image_folders.make(root, COUNTS)
    spoil(root)
    with pytest.raises(UserError, match=message) as caught:
        _open(_folder(root))
    assert str(root) in str(caught.value) and "\n" not in str(caught.value)


def test_train_may_be_the_name_of_a_class(tmp_path):
    image_folders.make(tmp_path, {"car": 2, "train": 2})
    assert _open(_folder(tmp_path)).class_names == ("car", "train")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "list.txt").write_text("words")
    with pytest.raises(UserError, match=r"list\.txt: not a folder"):
        _open(_folder(tmp_path / "list.txt"))


def test_array_records_give_what_their_folder_gives(prepared):
    folder = _open(_folder(prepared / "photos"))
    keys = _keys(folder)
    config = DataConfig(path=str(prepared / "tfds"), name="photos_in_folder")
    for train in (True, False):
        records = _open(config, train)
        assert len(records) == len(folder) and records.class_names == folder.class_names
        for i, key in enumerate(keys):
            assert records[i]["key"] == key and records[i]["label"] == folder[i]["label"]
            np.testing.assert_array_equal(records[i]["image"], folder[i]["image"])
    sliced = dataclasses.replace(config, split="train[5:8]")
    some = _open(sliced)
    assert _keys(some) == keys[5:8]
    assert [some.label(i) for i in range(3)] == [some[i]["label"] for i in range(3)] == [0, 0, 1]
    assert missing_classes(some) == (2,)


def test_classes_count_as_there_if_there_are_too_many_examples_to_read(tmp_path, monkeypatch):
    image_folders.make(tmp_path, {"ant": 10, "bee": 10})
    source = _open(_folder(tmp_path))
    monkeypatch.setattr(sources, "MOST_LABELS", 1)
    assert missing_classes(source) == ()


def test_array_records_are_read_without_tensorflow_or_jax(prepared):
    program = f"""if True:
        import sys
        from gigatok_jax.data.sources import DataConfig, open_source
        config = DataConfig(path={str(prepared / "tfds")!r}, name="photos_in_folder")
        source = open_source(config, train=True, image_size=16)
        assert len(source) == 15 and source[3]["image"].size == (40, 34)
        print(sorted({{"tensorflow", "jax", "torch"}} & set(sys.modules)))
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stderr


def test_data_sets_that_are_not_ready_are_named(prepared, tmp_path):
    def fails(match, data_dir=prepared / "tfds", **fields):
        with pytest.raises(UserError, match=match) as caught:
            _open(DataConfig(path=str(data_dir), **fields))
        assert "\n" not in str(caught.value)

    fails("config.data.name: expected a TFDS data set, got 'no_such_set'", name="no_such_set")
    fails(r"imagenet2012 is not prepared.*docs/data.md", name="imagenet2012")
    name = "photos_in_folder"
    fails(r"not prepared.*tfds\.builder\(.photos_in_folder.*download", tmp_path, name=name)
    fails("no split 'test', expected train, validation", name=name, split="test")
    shutil.copytree(prepared / "tfds", tmp_path / "tfds")
    for path in (tmp_path / "tfds").rglob("*.json"):
        path.write_text(path.read_text().replace("array_record", "tfrecord"))
    fails(r"prepared as tfrecord, expected array_record", tmp_path / "tfds", name=name)


def test_drawings_are_as_many_as_asked_and_split():
    config = DataConfig(source="embedded", length=30, eval_length=20)
    train, held = _open(config), _open(config, train=False)
    assert (len(train), len(held)) == (30, 20) and len(train.class_names) == 10
    assert train[0]["image"].shape == (40, 40, 3), "crops of training enlarge up to 5/4"
    assert held[0]["image"].shape == (32, 32, 3)
    assert not set(_keys(train)) & set(_keys(held))
    assert [train.label(i) for i in range(12)] == [train[i]["label"] for i in range(12)]


@pytest.mark.parametrize(
    "field, value",
    [
        ("source", "folders"),
        ("holdout", 1),
        ("holdout", -2),
        ("length", -1),
        ("eval_length", "all"),
        ("workers", -1),
        ("workers", 1.5),
        ("prefetch", 0),
        ("resize", "cubic"),
        ("max_bad_share", 1.5),
        ("name", ""),
        ("split", ""),
        ("path", None),
    ],
)
def test_impossible_fields_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected .*, got ") as caught:
        DataConfig(**{field: value})
    assert repr(value) in str(caught.value) and "\n" not in str(caught.value)


def test_fields_that_a_source_needs_are_asked_for():
    with pytest.raises(ValueError, match=r"^path: expected a value with source='folder', got ''"):
        DataConfig(source="folder")
    with pytest.raises(ValueError, match=r"^length: expected at least 1 .*'embedded', got 0"):
        DataConfig(source="embedded", eval_length=10)
