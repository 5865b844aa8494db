"""Codes on disk: whose crops they are, that a kill changes nothing, and what reading them gives."""

import collections
import dataclasses
import json
import os
from pathlib import Path
import pickle
import re
import shutil
import types
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import test_commands

from gigatok_jax import api, bundles, config, encoding
from gigatok_jax.data import codes, export, shards
from gigatok_jax.data import crops as cropping
from gigatok_jax.data.pipeline import Batches, eval_batches, train_batches
from gigatok_jax.data.sources import DataConfig, open_source
from gigatok_jax.errors import UserError
from gigatok_jax.models.generator import GeneratorConfig, param_shapes
from gigatok_jax.models.tokenizer import TransformerSize

import image_folders
import tiny
import train_config

gigatok, refused = test_commands.gigatok, test_commands.refused

GENERATOR_RUN = f"{config.CONFIGS / 'generator.py'}:b"
SIZE = 16
FACTORS = (1.25, 1.0625)
COUNTS = {"ant": 9, "bee": 7, "cat": 6}
BAD = "ant/ant_006.png"
# Four are held out. Eighteen are left, in shards of two batches of four.
HELD = {"ant/ant_003.png", "ant/ant_007.png", "cat/cat_000.png", "cat/cat_004.png"}
OPTIONS = {"crop_factors": FACTORS, "batch_size": 4, "shard_images": 8}
SHARDS = [f"train-0000{i}-of-00003.array_record" for i in range(3)]
FILES = {"codes.json", "validation-00000-of-00001.array_record", *SHARDS}
BLOCK = TransformerSize(1, 2, 16)
CONFIG = tiny.config(
    encoder=BLOCK,
    decoder=BLOCK,
    image_size=SIZE,
    latents=4,
    base_channels=8,
    channel_multipliers=(1,),
    z_channels=16,
    codebook_size=512,  # enough for images to differ in their codes
    semantic_dim=0,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    image_folders.make(root, COUNTS)
    image_folders.spoil(root / BAD)
    return root


@pytest.fixture(scope="module")
def data(root) -> DataConfig:
    return DataConfig(source="folder", path=str(root), holdout=4, max_bad_share=0.2)


@pytest.fixture(scope="module")
def bundle() -> bundles.Bundle:
    weights = tiny.weights(CONFIG)
    return bundles.Bundle(CONFIG, weights, {}, bundles.fingerprint(weights["params"]))


@pytest.fixture(scope="module")
def directory(tmp_path_factory, bundle) -> Path:
    """The bundle on disk."""
    directory = tmp_path_factory.mktemp("tokenizer")
    bundles.save(directory, "tokenizer", bundle.config, bundle.weights, {})
    return directory


@pytest.fixture(scope="module")
def tokenizer(bundle) -> api.PretrainedTokenizer:
    return api.PretrainedTokenizer(bundle.config, bundle.weights)


def always(tokenizer) -> type:
    """A class whose every instance is the tokenizer; annotations need a class."""
    return type("Always", (), {"__new__": lambda cls, *args, **kwargs: tokenizer})


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch, tokenizer):
    """Every command of this module uses the one tokenizer, instead of compiling its own."""
    monkeypatch.setattr(api, "PretrainedTokenizer", always(tokenizer))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data, tokenizer) -> Path:
    """The codes of an unbroken run."""
    out = tmp_path_factory.mktemp("whole") / "codes"
    encoding.encode(tokenizer, data, out, **OPTIONS)
    return out


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def examples(folder: Path, split: str) -> list[dict]:
    source = codes.CodesSource(folder, split)
    assert source.label(1) == source[1]["label"]
    return [source[i] for i in range(len(source))]


# Crops.


def ten_slices(large, size, end, middle):
    """Crops of a square image, in torchvision's order."""
    crops = [
        large[:size, :size],
        large[:size, end:],
        large[end:, :size],
        large[end:, end:],
        large[middle : middle + size, middle : middle + size],
    ]
    return [*crops, *(crop[:, ::-1] for crop in crops)]


@pytest.mark.parametrize(
    "size, factor, large, end, middle",
    [
        (256, 1.1, 281, 25, 12),  # 281.6 rounds down, 12.5 to even
        (256, 1.05, 268, 12, 6),
        (16, 1.2, 19, 3, 2),  # 1.5 to even
        (16, 1.0, 16, 0, 0),
    ],
)
def test_ten_crops_are_corners_and_centre_and_their_flips(size, factor, large, end, middle):
    image = np.random.default_rng(0).integers(0, 256, (large, large, 3), np.uint8)
    crops = cropping.ten_crops(image, size, factor)
    assert crops.shape == (10, size, size, 3) and crops.dtype == np.uint8
    np.testing.assert_array_equal(crops, ten_slices(image, size, end, middle))


def test_ten_crops_lie_in_the_centre_crop():
    image = np.random.default_rng(0).integers(0, 256, (61, 45, 3), np.uint8)
    crops = cropping.ten_crops(image, 16, 1.25)
    np.testing.assert_array_equal(crops, ten_slices(cropping.center_crop(image, 20), 16, 4, 2))


# What is stored.


def test_stored_codes_are_those_of_the_crops(whole, root, tokenizer):
    def check(split, crops_of, size):
        found = examples(whole, split)
        stored = np.concatenate([example["codes"] for example in found])
        assert stored.dtype == np.int32
        crops = [crops_of(cropping.load(root / example["key"])) for example in found]
        crops = np.resize(crops, (-(-len(stored) // size) * size, SIZE, SIZE, 3))
        # As many at once as the command takes, for which it is compiled.
        parts = [tokenizer.encode(crops[i : i + size]) for i in range(0, len(crops), size)]
        np.testing.assert_array_equal(stored, np.concatenate(parts)[: len(stored)])
        return len(np.unique(stored, axis=0))

    def twenty(image):
        return np.concatenate([cropping.ten_crops(image, SIZE, factor) for factor in FACTORS])

    assert check("train", twenty, 80) > 50
    assert check("validation", lambda image: cropping.center_crop(image, SIZE), 4) > 2


@pytest.mark.parametrize("split, crops", [("train", 20), ("validation", 1)])
def test_each_readable_image_is_stored_once_with_its_label(whole, split, crops):
    keys = [f"{name}/{name}_{i:03d}.png" for name in COUNTS for i in range(COUNTS[name])]
    keys = [k for k in keys if (k in HELD) == (split == "validation") and k != BAD]
    found = examples(whole, split)
    assert [example["key"] for example in found] == keys
    names = codes.CodesSource(whole, split).class_names
    assert [names[example["label"]] for example in found] == [key[:3] for key in keys]
    assert {example["codes"].shape for example in found} == {(crops, 4)}


def test_folder_holds_what_its_description_says(whole, bundle, data):
    assert set(contents(whole)) == FILES
    info = codes.STORE.read_info(whole)
    assert (info.codes, info.codebook_size, info.crop_factors) == (4, 512, FACTORS)
    assert info.tokenizer == bundle.fingerprint and info.class_names == tuple(COUNTS)
    assert DataConfig(**info.data) == dataclasses.replace(data, max_bad_share=0.05)
    assert info.shard_images == 8
    # The first shard has lost the unreadable image.
    assert info.images == {"train": (8 - 1, 8, 2), "validation": (4,)}
    assert info.examples == {"train": 18, "validation": 4}


def test_command_writes_the_same_and_counts_what_it_skips(
    gigatok, whole, directory, data, tmp_path
):
    out = tmp_path / "codes"
    fields = dataclasses.asdict(data)
    code, text, lines = gigatok(
        *("encode", f"--config={train_config.__file__}"),
        *(f"--config.data.{name}={value}" for name, value in fields.items()),
        *(f"--tokenizer={directory}", f"--out={out}"),
        *("--crop_factors=1.25,1.0625", "--batch_size=4", "--shard_images=8"),
    )
    assert code == 0
    assert text.splitlines() == [
        "train: 17 images (1 could not be read) in 3 shards",
        "validation: 4 images (0 could not be read) in 1 shards",
        str(out),
    ]
    assert any(BAD in line for line in lines)
    assert contents(out) == contents(whole)


def test_loss_of_stored_codes_is_that_of_encoding_the_images(
    gigatok, whole, bundle, directory, data, tmp_path
):
    model = GeneratorConfig(1, 2, 16, codes=4, codebook_size=512, classes=3)
    weights = {"params": tiny.fill(param_shapes(model))}
    made_by = {"tokenizer": bundle.fingerprint}
    bundles.save(tmp_path / "generator", "generator", model, weights, made_by)

    def measure(*arguments):
        code, _, lines = gigatok(
            *("evaluate", "loss", f"--config={GENERATOR_RUN}", *arguments),
            *(f"--generator={tmp_path / 'generator'}", "--batch_size=4", f"--out={tmp_path}"),
        )
        assert code == 0, lines
        return json.loads((tmp_path / "metrics.json").read_text())

    stored = measure(
        *("--config.data.source=codes", f"--config.data.path={whole}"),
        *("--config.data.length=0", "--config.data.eval_length=0"),
    )
    fields = dataclasses.asdict(data)
    overrides = (f"--config.data.{name}={value}" for name, value in fields.items())
    encoded = measure(*overrides, f"--tokenizer={directory}")
    assert stored["images"] == encoded["images"] == 4
    assert encoded["loss"] == pytest.approx(stored["loss"], rel=1e-6)
    assert abs(stored["loss"] - np.log(512)) > 1e-3  # the weights matter


@pytest.mark.parametrize("field, ours, theirs", [("codes", 9, 4), ("codebook_size", 64, 512)])
@pytest.mark.parametrize("encoded", [False, True])
def test_loss_of_a_generator_of_other_sizes_is_refused(
    gigatok, whole, directory, root, tmp_path, field, ours, theirs, encoded
):
    sizes = {"codes": 4, "codebook_size": 512} | {field: ours}
    model = GeneratorConfig(1, 2, 16, classes=3, **sizes)
    weights = {"params": tiny.fill(param_shapes(model))}
    bundles.save(tmp_path / "generator", "generator", model, weights, {})
    place = directory if encoded else whole
    result = gigatok(
        *("evaluate", "loss", f"--config={GENERATOR_RUN}", f"--out={tmp_path / 'out'}"),
        *(f"--generator={tmp_path / 'generator'}", "--config.data.length=0"),
        *([f"--tokenizer={directory}"] if encoded else []),
        *(f"--config.data.source={'folder' if encoded else 'codes'}", "--config.data.holdout=4"),
        *(f"--config.data.path={root if encoded else whole}", "--config.data.eval_length=0"),
    )
    message = f"{place}: expected {field}={ours}, as in the generator's model.{field}, got {theirs}"
    assert refused(result) == message


def test_codes_past_16_bits_are_stored_and_exported(tokenizer, data, whole, tmp_path):
    large = mock.Mock(
        config=dataclasses.replace(CONFIG, codebook_size=2**18),
        encode=lambda images: tokenizer.encode(images) + 2**18 - 512,
        codes_of=tokenizer.codes_of,
    )
    encoding.encode(large, data, tmp_path / "codes", **OPTIONS)
    export.export(tmp_path / "codes", "npz")
    for split in ("train", "validation"):
        expected = np.stack([each["codes"] for each in examples(whole, split)]) + 2**18 - 512
        stored = np.stack([each["codes"] for each in examples(tmp_path / "codes", split)])
        np.testing.assert_array_equal(stored, expected)
        with np.load(tmp_path / "codes" / f"{split}.npz") as found:
            np.testing.assert_array_equal(found["codes"], expected)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--crop_factors=many", "--crop_factors: expected numbers, got ['many']"),
        ("--crop_factors=0.9", "--crop_factors: expected numbers in [1, 2], got (0.9,)"),
        ("--crop_factors=1.1,2.5", "--crop_factors: expected numbers in [1, 2], got (1.1, 2.5)"),
        ("--crop_factors=nan", "--crop_factors: expected numbers in [1, 2], got (nan,)"),
        ("--shard_images=12", "--shard_images: expected a multiple of --batch_size=8, got 12"),
        ("--config.data.source=codes", "config.data.source: expected images, got 'codes'"),
        ("more", "'more': unexpected argument"),
    ],
)
def test_encode_rejects_a_wrong_value_in_one_line(gigatok, directory, tmp_path, argument, message):
    out = tmp_path / "codes"
    result = gigatok(
        *("encode", f"--config={GENERATOR_RUN}", "--config.data.path=X"),
        *(f"--tokenizer={directory}", f"--out={out}", "--batch_size=8", argument),
    )
    assert refused(result) == message
    assert not out.exists()


class Killed(Exception):
    pass


class Mortal:
    """A tokenizer that dies when it is asked for codes the `last` time."""

    def __init__(self, tokenizer: api.PretrainedTokenizer, last: int):
        self.config, self.codes_of = tokenizer.config, tokenizer.codes_of
        self._tokenizer, self._left = tokenizer, last

    def encode(self, images):
        self._left -= 1
        if not self._left:
            raise Killed
        return self._tokenizer.encode(images)


def test_killed_encoding_resumes_to_the_same_files(whole, data, tokenizer, tmp_path):
    out = tmp_path / "codes"
    after = 3 * 10 * len(FACTORS) + 1  # as a fourth batch of training images begins

    def run(tokenizer):
        encoding.encode(tokenizer, data, out, **OPTIONS)

    with pytest.raises(Killed):
        run(Mortal(tokenizer, after))  # half-way through the second shard
    assert set(contents(out)) == {"codes.json", SHARDS[0]}
    first = (out / SHARDS[0]).stat()
    with pytest.raises(UserError, match="not all images have been encoded"):
        codes.CodesSource(out, "train")
    # What a process leaves that has no time to tidy up.
    stale = out / f".{SHARDS[1]}.4194305.partial"
    stale.write_bytes((out / SHARDS[0]).read_bytes()[:1_000])
    with pytest.raises(Killed):
        run(Mortal(tokenizer, after))  # as it starts on the validation images
    assert set(contents(out)) == {"codes.json", *SHARDS}
    run(tokenizer)
    assert contents(out) == contents(whole)
    last = (out / SHARDS[0]).stat()
    assert (last.st_mtime_ns, last.st_ino) == (first.st_mtime_ns, first.st_ino)


def test_finished_codes_stay_unchanged(copy, whole, data, tokenizer):
    paths = sorted(copy.glob("*.array_record"))
    before = [path.stat().st_mtime_ns for path in paths]
    encoding.encode(Mortal(tokenizer, 1), data, copy, **OPTIONS)
    assert contents(copy) == contents(whole)
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_options_that_change_no_code_may_change(copy, whole, tokenizer, data):
    other = dataclasses.replace(data, workers=1, prefetch=1, max_bad_share=0.5)
    encoding.encode(tokenizer, other, copy, **OPTIONS)
    assert contents(copy) == contents(whole)


def other_weights(tokenizer):
    return types.SimpleNamespace(config=tokenizer.config, codes_of="0123456789abcdef")


@pytest.mark.parametrize(
    "field, changes",
    [
        ("tokenizer", {"tokenizer": other_weights}),
        ("crop_factors", {"crop_factors": (1.25,)}),
        ("crop_factors", {"crop_factors": ()}),
        ("shard_images", {"shard_images": 12}),
        ("data", {"data": lambda data: dataclasses.replace(data, length=8)}),
    ],
)
def test_folder_with_other_codes_is_rejected(copy, whole, tokenizer, data, field, changes):
    inputs = [
        changes.get(name, lambda value: value)(value)
        for name, value in (("tokenizer", tokenizer), ("data", data))
    ]
    options = {name: changes.get(name, value) for name, value in OPTIONS.items()}
    message = rf"^{re.escape(str(copy))}: holds codes made with another {field}: "
    with pytest.raises(UserError, match=message):
        encoding.encode(*inputs, copy, **options)
    assert contents(copy) == contents(whole)


def test_images_that_have_changed_are_rejected_or_encoded_anew(tokenizer, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "codes"
    image_folders.make(photos, {"ant": 3, "bee": 3})
    data = DataConfig(source="folder", path=str(photos), holdout=0)
    encoding.encode(tokenizer, data, out, **OPTIONS)
    before = contents(out)
    image_folders.make(photos, {"ant": 6, "bee": 2})  # three more, two of them written again
    message = rf"^{re.escape(str(out))}: the train images have changed .* \(9 images, were 6\)"
    with pytest.raises(UserError, match=message):
        encoding.encode(tokenizer, data, out, **OPTIONS)
    assert contents(out) == before
    encoding.encode(tokenizer, data, out, **OPTIONS, overwrite=True)
    assert len(codes.CodesSource(out, "train")) == 9
    (photos / "ant" / "ant_000.png").touch()
    with pytest.raises(UserError, match=r"have changed .* \(other files, as many\)"):
        encoding.encode(tokenizer, data, out, **OPTIONS)


def test_resuming_over_a_damaged_shard_is_rejected(copy, tokenizer, data):
    path = copy / SHARDS[1]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: missing or damaged shard"):
        encoding.encode(tokenizer, data, copy, **OPTIONS)


@pytest.mark.parametrize("format", ["parquet", "npz"])
def test_other_programs_get_the_codes_as_one_file_per_split(
    copy, tokenizer, data, monkeypatch, format
):
    monkeypatch.setattr(export, "ROWS", 5)
    encoding.encode(tokenizer, data, copy, **OPTIONS, format=format)
    for split in ("train", "validation"):
        expected = examples(copy, split)
        all_codes = np.stack([example["codes"] for example in expected])
        path = copy / f"{split}.{format}"
        if format == "npz":
            with np.load(path) as found:
                assert sorted(found) == ["codes", "keys", "labels"]
                assert found["codes"].dtype == np.uint16
                np.testing.assert_array_equal(found["codes"], all_codes)
                assert found["keys"].tolist() == [example["key"] for example in expected]
                assert found["labels"].tolist() == [example["label"] for example in expected]
            continue
        found = pyarrow.parquet.read_table(path)
        assert found.schema.field("codes").type.value_type == pyarrow.int32()
        rows = found.to_pylist()
        assert [row["codes"] for row in rows] == all_codes.reshape(-1, 4).tolist()
        assert [(row["key"], row["label"], row["crop"]) for row in rows] == [
            (example["key"], example["label"], crop)
            for example in expected
            for crop in range(len(example["codes"]))
        ]
    encoding.remove(copy)
    assert not list(copy.iterdir())


# Reading.


def half(path):
    os.truncate(path, path.stat().st_size // 2)


def unfinished(path):
    codes.STORE.write_info(
        path.parent, dataclasses.replace(codes.STORE.read_info(path.parent), images={})
    )


def change(**fields):
    def write(path):
        record = json.loads(path.read_text()) | fields
        path.write_text(json.dumps({k: v for k, v in record.items() if v is not None}))

    return write


@pytest.mark.parametrize(
    "name, damage, message",
    [
        (SHARDS[1], half, "{path}: missing or damaged shard of codes"),
        (SHARDS[1], lambda path: path.write_bytes(b""), "{path}: missing or damaged shard"),
        (SHARDS[1], Path.unlink, "{path}: missing or damaged shard of codes"),
        (
            SHARDS[0],
            lambda path: shutil.copy(path.parent / SHARDS[2], path),
            "{path}: holds 2 records, expected 7",
        ),
        (
            "codes.json",
            Path.unlink,
            "{folder}: no codes.json, expected the output of `gigatok encode`",
        ),
        ("codes.json", unfinished, "{folder}: not all images have been encoded; the same"),
        ("codes.json", half, "{path}: expected JSON"),
        ("codes.json", change(codes=None), "{path}: info.codes: missing"),
        ("codes.json", change(codes="4"), "{path}: info.codes: expected integer, got '4'"),
        ("codes.json", change(color=1), "{path}: info.color: no such field; known: class_names, "),
    ],
)
def test_damaged_codes_raise_one_line_that_names_the_file(copy, name, damage, message):
    damage(copy / name)
    with pytest.raises(UserError) as caught:
        open_source(DataConfig(source="codes", path=str(copy)), train=True, image_size=0)
    expected = message.format(path=copy / name, folder=copy)
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


def test_split_that_was_not_encoded_is_an_error(copy):
    info = codes.STORE.read_info(copy)
    only = dataclasses.replace(info, images={"train": info.images["train"]})
    codes.STORE.write_info(copy, only)
    with pytest.raises(UserError, match=r"^\S+: no codes of split 'validation'$"):
        codes.CodesSource(copy, "validation")


IMAGES, CROPS = 60, 10


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> DataConfig:
    """Codes that say whose they are: crop c of image i has [i, c]. Some shards are empty."""
    folder = tmp_path_factory.mktemp("numbered")
    counts = {"train": (0, 20, 0, 40, 0), "validation": (3, 0)}
    for split, sizes in counts.items():
        ends = np.cumsum(sizes)
        for shard, end in enumerate(ends):
            path = shards.shard_path(folder, split, shard, len(ends))
            records = [
                {
                    "codes": np.stack([np.full(CROPS, i), np.arange(CROPS)], 1).astype(np.uint16),
                    "label": i % 3,
                    "key": f"image {i}",
                }
                for i in range(end - sizes[shard], end)
            ]
            codes.write_shard(path, records)
    info = codes.CodesInfo("0123456789abcdef", 2, 64, ("a", "b", "c"), {}, (1.1,), 8, counts)
    codes.STORE.write_info(folder, info)
    return DataConfig(source="codes", path=str(folder))


def batches(data, batch_size=IMAGES, seed=0, **fields) -> Batches:
    data = dataclasses.replace(data, **fields)
    return train_batches(data, image_size=0, batch_size=batch_size, seed=seed)


def visits(data, epochs, batch_size=IMAGES, **options) -> list[tuple[int, int]]:
    """Image and crop of each visit."""
    with batches(data, batch_size, **options) as stream:
        count = epochs * stream.examples // batch_size
        found = np.concatenate([next(stream)["codes"] for _ in range(count)])
    return [(int(image), int(crop)) for image, crop in found]


def test_batches_hold_codes_and_their_labels(numbered):
    with batches(numbered, 8) as stream:
        batch = next(stream)
    assert batch.keys() == {"codes", "label"}
    assert batch["codes"].shape == (8, 2)
    assert batch["codes"].dtype == batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["label"], batch["codes"][:, 0] % 3)


def test_every_visit_draws_one_of_the_crops(numbered):
    epochs = 20
    found = np.array(visits(numbered, epochs)).reshape(epochs, IMAGES, 2)
    np.testing.assert_array_equal(np.sort(found[..., 0]), [range(IMAGES)] * epochs)
    crops = collections.Counter(found[..., 1].ravel().tolist())
    # 120 visits each are expected; 5 standard deviations are 52.
    assert sorted(crops) == list(range(CROPS))
    assert all(abs(count - epochs * IMAGES / CROPS) < 52 for count in crops.values())
    # And of each image, not of each epoch.
    assert all(len({c for j, c in found.reshape(-1, 2) if j == i}) > 5 for i in range(IMAGES))
    assert all(len(set(epoch[:, 1].tolist())) > 5 for epoch in found)


def test_crops_depend_on_seed_epoch_and_image_alone(numbered):
    def crops(**options):
        found = visits(numbered, 4, **options)
        length = len(found) // 4
        return {(n // length, image): crop for n, (image, crop) in enumerate(found)}

    reference = crops()
    assert crops(batch_size=30) == crops(batch_size=120) == reference
    other = crops(seed=1)
    assert sum(other[place] == crop for place, crop in reference.items()) < 4 * IMAGES / 3


def test_codes_survive_pickling_to_workers(numbered):
    source = codes.CodesSource(numbered.path, "train")
    before = [source[i] for i in (0, 19, 20, 59)]
    copy = pickle.loads(pickle.dumps(source))
    for i, example in zip((0, 19, 20, 59), before, strict=True):
        assert copy[np.int64(i)]["key"] == example["key"] == f"image {i}"
        np.testing.assert_array_equal(copy[i]["codes"], example["codes"])
    with pytest.raises(IndexError):
        copy[60]


def test_evaluation_reads_the_first_crop_in_order(numbered):
    with eval_batches(numbered, image_size=0, batch_size=2) as stream:
        first, second = stream
    assert first.keys() == {"codes", "label", "key", "valid", "index"}
    np.testing.assert_array_equal(first["codes"], [[0, 0], [1, 0]])
    np.testing.assert_array_equal(second["codes"], [[2, 0], [0, 0]])
    assert second["codes"].dtype == np.int32
    np.testing.assert_array_equal(second["valid"], [True, False])
    np.testing.assert_array_equal(second["label"], [2, 0])
    assert second["key"].tolist() == ["image 2", ""]
    with eval_batches(numbered, image_size=0, batch_size=IMAGES, train=True) as stream:
        (batch,) = stream
    np.testing.assert_array_equal(batch["codes"], [[i, 0] for i in range(IMAGES)])
