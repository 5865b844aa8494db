"""The notebooks run from beginning to end, and are stored with what they showed."""

import pathlib

import nbclient
import nbformat
import pytest

from gigatok_jax.models.generator import GeneratorConfig

import tiny

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
NAMES = ("inspect_generator", "inspect_tokenizer")
TOKENIZER = tiny.config(image_size=16, latents=4, channel_multipliers=(1, 1))
GENERATOR = GeneratorConfig(1, 2, 16, codes=4, codebook_size=64, classes=10)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, tmp_path, monkeypatch):
    for kind, directory in tiny.save_networks(tmp_path, TOKENIZER, GENERATOR).items():
        monkeypatch.setenv(f"GIGATOK_{kind.upper()}", directory)
    assert pictures(name) > 0


def test_tokenizer_of_the_users_is_inspected(monkeypatch):
    tests = pathlib.Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{tests}:{tests.parent}")
    monkeypatch.setenv("GIGATOK_TOKENIZER", "python:own_tokenizer:Mean")
    assert pictures("inspect_tokenizer") == 3  # no feature maps


def pictures(name: str) -> int:
    """Runs a notebook, and counts the pictures that it shows."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_stored_with_its_outputs(name):
    cells = code_cells(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) - 1
