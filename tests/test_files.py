"""Files and directories that are whole or not there."""

import json
import pathlib

import pytest

from gigatok_jax import files
from gigatok_jax.errors import UserError

import image_folders


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_file_appears_whole_and_only_at_the_end(tmp_path):
    path = tmp_path / "deep" / "file"
    with files.replacing(path) as aside:
        aside.write_text("new")
        assert aside.parent == path.parent and not path.exists()
    assert path.read_text() == "new" and names(path.parent) == ["file"]


@pytest.mark.parametrize("old", [None, "old"])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path, old):
    path = tmp_path / "file"
    if old:
        path.write_text(old)
    with pytest.raises(RuntimeError), files.replacing(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == (["file"] if old else [])
    assert not old or path.read_text() == old


def test_directory_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "directory"
    for name in ("first", "second"):
        with files.replacing(path, lambda path: None) as aside:
            aside.mkdir()
            (aside / name).write_text(name)
        assert names(path) == [name]
    assert names(tmp_path) == ["directory"]


def test_failure_leaves_the_old_directory_and_nothing_else(tmp_path):
    path = tmp_path / "directory"
    path.mkdir()
    (path / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path, lambda path: None) as aside:
        aside.mkdir()
        (aside / "half").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["directory"] and names(path) == ["old"]


@pytest.mark.parametrize("when", ["before", "while it is written"])
def test_a_folder_is_never_replaced_by_a_file(tmp_path, when):
    path = tmp_path / "photos"
    if when == "before":
        image_folders.save(path / "a.png", seed=1)
    message = "photos: expected a file to write, found a folder"
    with pytest.raises(UserError, match=message), files.replacing(path) as aside:
        aside.write_text("report")
        image_folders.save(path / "a.png", seed=1)
    assert names(tmp_path) == ["photos"] and names(path) == ["a.png"]


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
    path = tmp_path / "value.json"
    files.write_json(path, {"a": [1, None]})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    assert names(tmp_path) == ["value.json"]


def test_cache_directory_follows_the_environment(monkeypatch):
    for name in ("GIGATOK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert files.cache_dir() == pathlib.Path("/home/someone/.cache/gigatok_jax")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert files.cache_dir() == pathlib.Path("/xdg/gigatok_jax")
    monkeypatch.setenv("GIGATOK_CACHE", "~/mine")
    assert files.cache_dir() == pathlib.Path("/home/someone/mine")


def test_patterns_name_files_as_in_a_shell(tmp_path):
    for name in ("a-07.tar", "a-08.tar", "a-09.tar", "b.tar", "c{x}.tar", "d.tar.gz", "notes.txt"):
        (tmp_path / name).touch()
    whole = ["a-07.tar", "a-08.tar", "a-09.tar", "b.tar", "c{x}.tar"]
    expected = {
        "": whole,
        "*.tar": whole,
        "a-{07..08}.tar": whole[:2],
        "{b,a-0{9..9}}.tar": ["a-09.tar", "b.tar"],
        "a-0[89].tar": whole[1:3],
        "c{x}.tar": ["c{x}.tar"],
    }
    for pattern, found in expected.items():
        root, names = files.find([str(tmp_path / pattern)], (".tar", ".tar.gz"))
        assert (root, names) == (tmp_path, found)
    for pattern in ("a-{07..10}.tar", "{b,x}.tar", "x"):
        with pytest.raises(
            UserError, match=r"(a-10\.tar|x\.tar|x): expected \.tar files, found none"
        ):
            files.find([str(tmp_path / pattern)], (".tar",))
