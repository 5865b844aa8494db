"""`gigatok sample`: which images it samples, that a restart changes none, and what it rejects."""

import dataclasses
import functools
from importlib import resources
import json
import os
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import test_commands

from gigatok_jax import api, bundles, imagenet, pictures
from gigatok_jax.commands.images import class_numbers
from gigatok_jax.errors import UserError
from gigatok_jax.evaluation import generation
from gigatok_jax.models.generator import GeneratorConfig, param_shapes
from gigatok_jax.models.tokenizer import TransformerSize
from gigatok_jax.sampling import SamplingConfig
from gigatok_jax.weights import fetch

import tiny

gigatok, refused = test_commands.gigatok, test_commands.refused

BLOCK = TransformerSize(1, 2, 16)
TOKENIZER = tiny.config(
    encoder=BLOCK,
    decoder=BLOCK,
    image_size=16,
    latents=4,
    channel_multipliers=(1,),
    codebook_size=32,
    semantic_dim=0,
)
MODEL = GeneratorConfig(1, 2, 16, codes=4, codebook_size=32, classes=3, positions="rotary_2d")
SETTINGS = SamplingConfig(guidance=2.0, schedule="step", temperature=0.9)
CLASSES = np.array([0, 2, 1, 0, 2, 1, 0])
NAMES = [f"{i:06d}_class{c:04d}.png" for i, c in enumerate(CLASSES)]


@pytest.fixture(scope="module")
def tokenizer() -> api.PretrainedTokenizer:
    return api.PretrainedTokenizer(TOKENIZER, tiny.weights(TOKENIZER))


@pytest.fixture(scope="module")
def generator() -> api.PretrainedGenerator:
    params = tiny.fill(param_shapes(MODEL))
    return api.PretrainedGenerator(MODEL, {"params": params})


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer, generator) -> dict[str, Path]:
    """Bundles by what they hold; "other" is the tokenizer with other weights."""
    folder = tmp_path_factory.mktemp("bundles")
    paths = {name: folder / name for name in ("tokenizer", "other", "short", "large", "generator")}
    weights = tiny.weights(TOKENIZER)
    bundles.save(paths["tokenizer"], "tokenizer", TOKENIZER, weights, {})
    params = weights["params"] | {"codebook": weights["params"]["codebook"] + 1}
    bundles.save(paths["other"], "tokenizer", TOKENIZER, weights | {"params": params}, {})
    for name, changes in {"short": {"latents": 2}, "large": {"codebook_size": 48}}.items():
        changed = dataclasses.replace(TOKENIZER, **changes)
        bundles.save(paths[name], "tokenizer", changed, tiny.weights(changed), {})
    made_by = {"tokenizer": bundles.fingerprint(weights["params"])}
    bundles.save(paths["generator"], "generator", MODEL, generator.variables, made_by)
    return paths


@pytest.fixture(scope="module")
def draw(generator, tokenizer):
    def draw(out, classes=CLASSES, settings=SETTINGS, seed=5, batch_size=7, **others):
        models = {"generator": generator, "tokenizer": tokenizer} | others
        options = {"seed": seed, "batch_size": batch_size}
        generation.sample(*models.values(), classes, settings, out, **options)

    return draw


@pytest.fixture(scope="module")
def whole(tmp_path_factory, draw) -> Path:
    out = tmp_path_factory.mktemp("whole")
    draw(out)
    return out


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def drawn(out: Path) -> np.ndarray:
    return np.load(out / "samples.npz")["arr_0"]


def assert_same(images, others):
    """But for roundings, which may depend on an image's place in its batch."""
    assert images.shape == others.shape
    difference = np.abs(images.astype(int) - others)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "images").glob("*.png")}


def test_images_are_those_of_the_classes_and_settings(whole, generator, tokenizer):
    key = jax.random.key(5)
    keys = jnp.stack([jax.random.fold_in(key, i) for i in range(7)])
    codes = generator.sample(CLASSES, keys, **dataclasses.asdict(SETTINGS))
    assert len(np.unique(codes, axis=0)) == 7
    assert_same(drawn(whole), np.asarray(pictures.to_uint8(tokenizer.decode(codes))))


def test_npz_has_the_layout_of_adm(whole):
    with np.load(whole / "samples.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        images, classes = file["arr_0"], file["arr_1"]
    assert images.shape == (7, 16, 16, 3) and images.dtype == np.uint8
    assert classes.dtype == np.int64
    np.testing.assert_array_equal(classes, CLASSES)
    assert sorted(times(whole)) == NAMES
    for name, image in zip(NAMES, images, strict=True):
        np.testing.assert_array_equal(Image.open(whole / "images" / name), image)


def test_grid_has_a_row_per_class(whole):
    grid = np.asarray(Image.open(whole / "grid.png"))
    # As many columns as each class has images; a margin of 40 for the class, gaps of 4.
    assert grid.shape == (3 * 100 + 4, 40 + 2 * 100 + 4, 3)
    images = drawn(whole)
    for c in range(3):
        for column, i in enumerate(np.flatnonzero(c == CLASSES)[:2]):
            place = grid[4 + c * 100 :, 44 + column * 100 :][:96:6, :96:6]
            np.testing.assert_array_equal(place, images[i])


def test_grid_names_classes_that_have_names(whole, tmp_path):
    def width(*class_names):
        paths = [whole / "images" / name for name in NAMES]
        generation._write_class_grid(tmp_path / "grid.png", paths, CLASSES, class_names)
        return Image.open(tmp_path / "grid.png").width

    assert width() == width("0", "1", "2") == Image.open(whole / "grid.png").width
    assert width() < width("cat", "albatross", "dog") < width(*["a name of many letters"] * 3)
    assert width("n" * 200) == width("n" * 300)


def test_batch_size_changes_no_image(whole, draw, tmp_path):
    draw(tmp_path, batch_size=3)
    assert_same(drawn(tmp_path), drawn(whole))


def test_restart_samples_what_is_missing_and_nothing_else(copy, whole, draw):
    missing = [NAMES[i] for i in (1, 4, 5)]
    for name in missing:
        (copy / "images" / name).unlink()
    (copy / "samples.npz").unlink()
    kept = times(copy)
    draw(copy)
    assert_same(drawn(copy), drawn(whole))
    after = times(copy)
    assert sorted(after) == NAMES
    assert {name: time for name, time in after.items() if name not in missing} == kept


def test_damaged_images_and_those_of_another_size_are_sampled_again(copy, whole, draw, caplog):
    cut, small, gray = (copy / "images" / NAMES[i] for i in (1, 4, 5))
    cut.write_bytes(cut.read_bytes()[:200])
    Image.open(small).resize((8, 8)).save(small)
    Image.open(gray).convert("L").save(gray)
    draw(copy)
    assert_same(drawn(copy), drawn(whole))
    for path in (cut, small, gray):
        assert f"{path}: damaged, or of other images; it is made again" in caplog.text
    assert caplog.text.count("made again") == 3


def test_more_images_leave_earlier_ones_unchanged(whole, draw, tmp_path):
    draw(tmp_path, CLASSES[:2])
    before = times(tmp_path)
    draw(tmp_path)
    assert_same(drawn(tmp_path), drawn(whole))
    assert before.items() <= times(tmp_path).items()


def test_another_seed_gives_other_images(whole, draw, tmp_path):
    draw(tmp_path, seed=6)
    same = (drawn(tmp_path) == drawn(whole)).all((1, 2, 3))
    assert same.sum() < 3


def shifted(model, name):
    """The model with one parameter moved."""
    params = model.variables["params"]
    return type(model)(model.config, {"params": params | {name: params[name] + 1}, "history": None})


@pytest.mark.parametrize(
    "field, change",
    [
        ("seed", lambda models: {"seed": 6}),
        ("sampling", lambda models: {"settings": dataclasses.replace(SETTINGS, top_k=3)}),
        ("generator", lambda models: {"generator": shifted(models[0], "embedding")}),
        ("tokenizer", lambda models: {"tokenizer": shifted(models[1], "codebook")}),
    ],
)
def test_folder_with_images_of_other_settings_is_rejected(
    copy, draw, generator, tokenizer, field, change
):
    (copy / "images" / NAMES[0]).unlink()
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        draw(copy, **change((generator, tokenizer)))
    assert str(caught.value).startswith(
        f"{copy / 'images'}: holds images made with another {field}: "
    )
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "text, expected",
    [("all", [0, 1, 2, 3, 4]), ("3", [3]), ("0,4,1-3", [0, 4, 1, 2, 3]), ("2-2,2", [2, 2])],
)
def test_classes_are_numbers_and_ranges(text, expected):
    np.testing.assert_array_equal(class_numbers(text.split(","), np.arange(5), ()), expected)


def arguments(saved, out, *others) -> list[str]:
    models = [f"--{name}={saved[name]}" for name in ("generator", "tokenizer")]
    return ["sample", *models, f"--out={out}", *others]


def test_command_samples_the_classes_in_turn(gigatok, saved, tmp_path):
    settings = ("guidance", "schedule", "temperature")
    more = [f"--{name}={getattr(SETTINGS, name)}" for name in settings]
    more += ["--classes=2,0-1", "--count=4", "--batch_size=7"]
    code, text, _ = gigatok(*arguments(saved, tmp_path, *more))
    assert code == 0
    assert text.splitlines() == ["4 images (0 already existed)", str(tmp_path)]
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["arr_1"], [2, 0, 1, 2])
    record = json.loads((tmp_path / "images" / "sampling.json").read_text())
    assert SamplingConfig(**record["sampling"]) == SETTINGS and record["seed"] == 0
    # Nothing is sampled again.
    code, text, _ = gigatok(*arguments(saved, tmp_path, *more))
    assert (code, text.splitlines()[0]) == (0, "4 images (4 already existed)")


def test_random_classes_come_from_the_seed(gigatok, saved, tmp_path):
    def classes(name, seed):
        # Any image that may be requested is there, so that none is sampled.
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / "sampling.json").write_text("{}")
        for i in range(64):
            for c in (0, 2):
                path = tmp_path / name / "images" / f"{i:06d}_class{c:04d}.png"
                Image.new("RGB", (16, 16)).save(path)
        more = ["--random_classes", "--classes=0,2", "--count=64", f"--seed={seed}"]
        code, text, _ = gigatok(*arguments(saved, tmp_path / name, *more))
        assert (code, text.splitlines()[0]) == (0, "64 images (64 already existed)")
        return np.load(tmp_path / name / "samples.npz")["arr_1"]

    first, again, other = classes("a", 3), classes("b", 3), classes("c", 4)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert 16 < (first == 0).sum() < 48
    assert len(set(first[::2].tolist())) == 2  # not in turn


KINDS = "--classes: expected numbers, ranges and names of classes, such as 0,10-19, got "


def test_classes_of_imagenet_have_an_id_and_a_word(whole, tmp_path):
    ids = (resources.files("tensorflow_datasets") / "datasets/imagenet2012/labels.txt").read_text()
    assert list(imagenet.classes()) == ids.split()
    pairs = {0: "tench", 207: "golden retriever", 360: "otter", 387: "lesser panda"}
    pairs |= {517: "crane", 999: "toilet tissue"}
    words = imagenet.words(imagenet.classes())
    assert {label: words[label] for label in pairs} == pairs
    names = ("n02099601", "my dog", "n02444819")
    numbers = functools.partial(class_numbers, trained=[0, 1, 2], names=names)
    assert numbers(["Otter", "n02099601", "golden retriever", "my dog"]) == [2, 0, 0, 1]
    with pytest.raises(UserError, match="'goldn retriever'; is it 'golden retriever'\\?"):
        numbers(["goldn retriever"])
    paths = [whole / "images" / name for name in NAMES]
    for some in (names, imagenet.words(names)):
        generation._write_class_grid(tmp_path / f"{some[0]}.png", paths, CLASSES, some)
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 1
    published = fetch.PUBLISHED["gigatok_gpt_b_s_s"].class_names
    assert class_numbers(["golden retriever"], range(1000), published) == [207]


def test_names_of_several_classes_are_refused():
    names = ("crane", "heron", "Crane", "crane")
    with pytest.raises(UserError, match=r"got 'crane', which is that of 0, 2, 3; give the number$"):
        class_numbers(["crane"], range(4), names)
    assert class_numbers(["heron", "2"], range(4), names) == [1, 2]


def test_classes_may_be_named():
    names = ("tench", "golden retriever", "11")
    numbers = functools.partial(class_numbers, trained=[0, 1, 2], names=names)
    assert numbers(["Golden Retriever", "0", "1-2"]) == [1, 0, 1, 2]
    with pytest.raises(UserError, match=r"trained classes, 0\.\.2, got \[11\]"):
        numbers(["11"])  # a number before a name
    with pytest.raises(UserError, match="got 'goldn retriever'; is it 'golden retriever'\\?"):
        numbers(["goldn retriever"])
    with pytest.raises(UserError, match=r"trained classes, 0, 2, got \[1\]"):
        class_numbers(["golden retriever"], [0, 2], names)


@pytest.mark.parametrize(
    "others, message",
    [
        (["--classes=3"], "--classes: expected trained classes, 0..2, got [3]"),
        (["--classes=1-4"], "--classes: expected trained classes, 0..2, got [3, 4]"),
        (
            ["--classes=0-99999999999"],
            "--classes: expected trained classes, 0..2, got [3, 4, 5, 6, 7] and more",
        ),
        (["--classes=cat"], KINDS + "'cat'"),
        (["--classes=-1"], KINDS + "'-1'"),
        (["--classes=2-1"], KINDS + "'2-1'"),
        (["--classes=0-1-2"], KINDS + "'0-1-"),
        (["--classes="], "--classes: expected "),
        (["--classes=all,1"], KINDS + "'all'"),
        (["--guidance=0.5"], "--guidance: expected greater than or equal to 1, got 0.5"),
        (["--guidance=nan"], "--guidance: expected a finite number, got nan"),
        (["--schedule=step"], "--guidance: expected more than 1 with schedule=step, got 1"),
        (["--top_p=0"], "--top_p: expected greater than 0, got 0.0"),
        (["--top_p=1.5"], "--top_p: expected less than or equal to 1, got 1.5"),
        (["--temperature=-1"], "--temperature: expected greater than or equal to 0, got -1.0"),
        (["--top_k=-1"], "--top_k: expected greater than or equal to 0, got -1"),
        (
            ["--guidance=2", "--schedule=step", "--schedule_start=2"],
            "--schedule_start: expected less than or equal to 1, got 2.0",
        ),
        (["0,1"], "'0,1': unexpected argument"),
    ],
)
def test_command_rejects_a_wrong_value_in_one_line(gigatok, saved, tmp_path, others, message):
    out = tmp_path / "out"
    assert refused(gigatok(*arguments(saved, out, *others))).startswith(message)
    assert not out.exists()


@pytest.mark.parametrize(
    "others, culprit",
    [
        (["--schedule=square"], "--schedule"),
        (["--batch_size=0"], "--batch_size"),
        (["--count=-1"], "--count"),
        (["--seed=-1"], "--seed"),
        (["--topp=0.5"], "topp"),
    ],
)
def test_flag_out_of_range_is_named(gigatok, saved, tmp_path, others, culprit):
    assert culprit in refused(gigatok(*arguments(saved, tmp_path / "out", *others)))


@pytest.mark.parametrize(
    "flag, name, message",
    [
        ("tokenizer", "other", "expected tokenizer="),
        ("tokenizer", "short", "expected codes=4, as in the generator's model.codes, got 2"),
        (
            *("tokenizer", "large"),
            "expected codebook_size=32, as in the generator's model.codebook_size, got 48",
        ),
        ("tokenizer", "generator", "holds a generator, expected a tokenizer"),
        ("generator", "tokenizer", "holds a tokenizer, expected a generator"),
    ],
)
def test_bundles_that_do_not_match_are_rejected(gigatok, saved, tmp_path, flag, name, message):
    out = tmp_path / "out"
    result = gigatok(*arguments(saved | {flag: saved[name]}, out))
    assert refused(result).startswith(f"{saved[name]}: {message}")
    assert not out.exists()


@pytest.mark.parametrize("flag", ["generator", "tokenizer", "out"])
def test_missing_flag_is_named(gigatok, saved, tmp_path, flag):
    given = [a for a in arguments(saved, tmp_path / "out") if not a.startswith(f"--{flag}=")]
    assert f"--{flag}" in refused(gigatok(*given))


def test_damaged_record_of_settings_is_named(copy, draw):
    path = copy / "images" / "sampling.json"
    os.truncate(path, 20)
    with pytest.raises(UserError) as caught:
        draw(copy)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name)
    return folder


def completions(out: Path) -> dict[str, np.ndarray]:
    images = out / "images"
    return {
        str(path.relative_to(images)): np.asarray(Image.open(path))
        for path in sorted(images.rglob("[0-9].png"))
    }


def names_of(saved) -> list[str]:
    return [f"--{kind}={saved[kind]}" for kind in ("generator", "tokenizer")]


def test_images_are_completed(gigatok, saved, photos, tokenizer, generator, tmp_path):
    (photos / "broken.png").write_bytes(b"no image")
    flags = [*names_of(saved), f"--from={photos}", "--count=2", "--classes=1", "--batch_size=2"]
    assert gigatok("sample", *flags, "--keep=1", f"--out={tmp_path / 'all'}")[0] == 0
    found = completions(tmp_path / "all")
    assert [*found] == [f"{name}/{i}.png" for name in ("a.png", "b.jpg.png") for i in range(2)]
    for name in ("a.png", "b.jpg"):
        pixels = np.asarray(Image.open(photos / name))
        shown = pictures.to_uint8(tokenizer.decode(tokenizer.encode(pixels[None])))[0]
        image = found[f"{name if name == 'a.png' else name + '.png'}/1.png"]
        assert np.abs(image.astype(int) - np.asarray(shown)).max() <= 1

    out = tmp_path / "half"
    assert gigatok("sample", *flags, "--keep=0.5", "--seed=3", f"--out={out}")[0] == 0
    codes = np.asarray(tokenizer.encode(np.asarray(Image.open(photos / "a.png"))[None]))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 1)
    expected = generator.sample([1], key[None], prefix=codes, keep=2)
    shown = np.asarray(pictures.to_uint8(tokenizer.decode(expected))[0])
    assert np.abs(completions(out)["a.png/1.png"].astype(int) - shown).max() <= 1
    assert np.asarray(Image.open(out / "grid.png")).shape == (204, 404, 3)  # 2 rows of 4, enlarged
    # A second call replaces what the first one wrote, and nothing else.
    assert gigatok("sample", *flags[:-3], "--count=1", f"--out={out}")[0] == 0
    assert [*completions(out)] == ["a.png/0.png", "b.jpg.png/0.png"]
    (out / "images" / "mine.png").write_bytes(b"")
    found = refused(gigatok("sample", *flags, f"--out={out}"))
    assert "expected the pictures of an earlier call of sample --from" in found


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--guidance=2"], "--guidance: expected 1 with --from and without --classes"),
        (["--classes=0,1"], "--classes: expected one class with --from, got ['0', '1']"),
        (["--random_classes"], "--from: expected no --random_classes when images are completed"),
        (["--from="], "--keep: expected --from, the images to complete"),
    ],
)
def test_completions_that_make_no_sense_are_rejected(
    gigatok, saved, photos, tmp_path, flags, message
):
    given = [
        *names_of(saved),
        f"--from={photos}",
        "--keep=0.5",
        f"--out={tmp_path / 'out'}",
        *flags,
    ]
    assert refused(gigatok("sample", *given)) == message
    assert not (tmp_path / "out").exists()


def test_completions_are_not_written_among_the_images(gigatok, saved, photos):
    found = refused(gigatok("sample", *names_of(saved), f"--from={photos}", f"--out={photos}"))
    assert found.startswith("--out: expected a folder outside of the images'")
