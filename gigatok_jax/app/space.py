"""Writes a Hugging Face Space: a folder that a Hub repository of the kind "space" serves."""

from collections.abc import Sequence
import importlib.metadata
import shutil

from gigatok_jax import bundles, locate
from gigatok_jax.app import explore
from gigatok_jax.errors import UserError
from gigatok_jax.files import Path, as_path, replacing
from gigatok_jax.weights import fetch

OWN = '"""The page of gigatok_jax, as `gigatok app --space` writes it."""'
GRADIO = "6.0.0"  # if none is installed here

APP = f"""{OWN}

from gigatok_jax.app import server

server.serve(
    tokenizers={{tokenizers}},
    generators={{generators}},
    reports="reports",
    host="0.0.0.0",
)
"""

README = """---
title: GigaTok
emoji: 🧩
colorFrom: indigo
colorTo: yellow
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
---

# Image tokenizers of gigatok_jax

Reconstruct photos, see what each code does, swap codes, sample and complete images.

To publish this folder: `hf upload OWNER/NAME . --repo-type=space`. The Space installs
`requirements.txt`; put a wheel beside it and name that there to serve a version of your own.
"""


def write(
    folder: Path, tokenizers: Sequence[str], generators: Sequence[str], reports: Path
) -> None:
    """Writes app.py, requirements.txt, README.md, models/ and reports/.

    Args:
      folder: is created; other files in it stay.
      tokenizers, generators: names, see `explore.load`. Folders are copied; what has another name
        is found when the Space starts, and downloaded unless the package includes it.
      reports: folder whose reports are copied.

    Raises:
      UserError: a model is not found or does not fit, or `folder` has an app.py of another program.
    """
    script = folder / "app.py"
    if script.exists() and not script.read_text().startswith(OWN):
        raise UserError(f"--space: {script} is not of this program: expected another folder")
    if own := [name for name in tokenizers if name.startswith(locate.OWN)]:
        raise UserError(f"--tokenizer: {own[0]}: expected a tokenizer that can be copied")
    models = explore.load(tokenizers, generators)  # to find what is wrong here, not in the Space
    taken: set[str] = set()
    copied = [[_copy(name, folder, taken) for name in names] for names in (tokenizers, generators)]
    if reports.is_dir():
        for name in explore.find_reports(reports):
            _write(folder / "reports" / name, explore.read_report(reports, name))
    names = filter(locate.is_name, [*models.tokenizers, *models.generators])
    # The authors' files are PyTorch's.
    extras = "app,torch" if fetch.PUBLISHED.keys() & {*names} else "app"
    version = importlib.metadata.version("gigatok_jax")
    _write(folder / "requirements.txt", f"gigatok_jax[{extras}]=={version}\n")
    _write(folder / "README.md", README.format(gradio=_gradio()))
    _write(script, APP.format(tokenizers=copied[0], generators=copied[1]))
    print(folder)


def _copy(name: str, folder: Path, taken: set[str]) -> str:
    """Copies a model that is a folder; returns the name that it has in the Space."""
    if locate.is_name(name):
        return name
    source, _ = bundles.read_record(name)
    path = as_path(name)
    stem = path.parent.name if path.name == "bundle" else path.name
    unique = next(n for n in [stem, *(f"{stem}-{i}" for i in range(2, 99))] if n not in taken)
    taken.add(unique)
    with replacing(folder / "models" / unique, bundles.check_replaceable) as aside:
        aside.mkdir()
        for file in source.iterdir():
            if bundles.FILES.fullmatch(file.name):
                shutil.copyfile(file, aside / file.name)
    return f"models/{unique}"


def _write(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text)


def _gradio() -> str:
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        return GRADIO
