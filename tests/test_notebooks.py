"""The notebooks run in an empty folder from beginning to end, and are stored without outputs."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "notebooks"
README = NOTEBOOKS.parent / "README.md"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
COLAB = "https://colab.research.google.com/github/gigatok-jax/gigatok_jax/blob/main/notebooks"

SHORT = [
    *("--config.data.length=200", "--config.data.eval_length=20", "--config.samples=20"),
    *("--config.sample_batch_size=20", "--config.batch_size=20"),
    *("--config.generator.steps=4", "--config.generator.optimizer.warmup_steps=1"),
    *("--config.generator.batch_size=8", "--config.generator.evaluation_images=20"),
    *("--config.linear_probe.steps=4", "--config.linear_probe.batch_size=20"),
    "--config.linear_probe.evaluation_images=20",
]
# In place of cells of constants, by their first word: makes the long notebooks quick.
QUICKER = {
    "TOKENIZER": 'TOKENIZER, CONFIG, PHOTOS = "drawings", "demo:tokenizer", ""\n'
    "STEPS, BATCH_SIZE, RATE, ADVERSARIAL = 12, 4, 1e-3, 0.0",
    "TOKENIZERS": f"TOKENIZERS, SHORT = {{'squares': 'python:__main__:Squares'}}, {SHORT}",
}


def read(name: str):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a notebook in an empty folder; returns its outputs of each MIME type."""
    tests = pathlib.Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{tests}:{tests.parent}")

    def run(name: str, **constants: str) -> dict[str, list]:
        notebook = read(name)
        for cell in code_cells(notebook):
            first = cell.source.split()[0].rstrip(",")
            cell.source = constants.get(first, cell.source)
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
        outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
        shown = {"printed": [output.text for output in outputs if output.output_type == "stream"]}
        for output in outputs:
            for kind, content in output.get("data", {}).items():
                shown.setdefault(kind, []).append(content)
        return shown

    return run


@pytest.mark.parametrize("name", NAMES)
def test_notebook_begins_with_a_badge_and_installs_what_is_missing(name):
    first, second, *others = read(name).cells
    assert first.cell_type == "markdown" and f"({COLAB}/{name}.ipynb)\n\n# " in first.source
    assert 'if importlib.util.find_spec("gigatok_jax") is None:' in second.source
    assert second.source == read(NAMES[0]).cells[1].source
    assert not any("%pip" in cell.source for cell in others)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_stored_without_outputs(name):
    for cell in code_cells(read(name)):
        assert not cell.outputs and cell.execution_count is None


def test_readme_has_every_notebook():
    for name in NAMES:
        assert f"(notebooks/{name}.ipynb)" in README.read_text()


@pytest.mark.parametrize(
    "name, pictures", [("quickstart", 4), ("inspect_generator", 3), ("inspect_tokenizer", 4)]
)
def test_notebook_runs_as_it_is(run, name, pictures):
    assert len(run(name)["image/png"]) == pictures


def test_tokenizer_of_the_users_is_inspected(run):
    shown = run("inspect_tokenizer", TOKENIZER='TOKENIZER = "python:own_tokenizer:Mean"')
    assert len(shown["image/png"]) == 3  # no feature maps


def test_tokenizer_is_trained_on_photos(run, tmp_path):
    shown = run("train_on_your_photos", **QUICKER)
    assert len(shown["image/png"]) == 2
    assert any("dB before, " in text for text in shown["printed"])
    assert (tmp_path / "tuned" / "bundle" / "config.json").exists()


def test_tokenizers_are_judged(run):
    shown = run("judge_a_tokenizer", **QUICKER)
    assert any(text.startswith("psnr ") for text in shown["printed"])
    assert "&lt;title&gt;" in shown["text/html"][-1]
