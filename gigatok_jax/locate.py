"""Models by name: the one place that knows what `--tokenizer` and its like may hold."""

from collections.abc import Sequence
import difflib
import logging
import os
import pathlib
from typing import Any

from gigatok_jax import distributed
from gigatok_jax.errors import UserError
from gigatok_jax.files import Path, as_path, in_bucket
from gigatok_jax.weights import fetch, hub

logger = logging.getLogger(__name__)

OWN = "python:"  # begins names of tokenizers of the user's, see `api.OwnTokenizer`

# Bundles that the package includes: kind and folder by name. The teacher of drawings comes from
# tools/train_embedded_teacher.py, their tokenizer and generator from tools/train_drawings.py.
ASSETS = pathlib.Path(__file__).parent / "assets"
INCLUDED = {
    "embedded": ("dinov2", ASSETS / "teacher"),
    "drawings": ("tokenizer", ASSETS / "drawings"),
    "drawings_gpt": ("generator", ASSETS / "drawings_gpt"),
}


def find(
    name: str | Path,
    kinds: Sequence[str] = (),
    *,
    where: str = "",
    others: Sequence[str] = (),
    weights: bool = True,
) -> Path:
    """The local folder of a model: a bundle, or the workdir of the run that wrote one.

    Args:
      name: a folder; the name of published weights (`fetch.PUBLISHED`), which are downloaded and
        converted unless they are in the cache; that of a model in this package (`INCLUDED`); or
        hf://OWNER/REPO[/FOLDER][@REVISION], downloaded to the Hub's cache. A folder with a model
        precedes a model of the same name.
      kinds: acceptable kinds of networks, such as "tokenizer"; empty: any.
      where: flag or field that holds the name, for messages.
      others: what the flag or field takes besides models, for messages.
      weights: False does not download the weights of models on the Hub.

    All processes of a run must call this, unless the name is a folder's. One process of each
    machine downloads.

    Raises:
      UserError: no model has this name, or it cannot be downloaded.
    """
    name = str(name)
    if name.startswith(hub.SCHEME):
        hub.parse(name, where)
        return _together(hub.download(name, weights=weights))
    folder = as_path(name, where or "bundle")
    if name in _kinds():
        if not _holds_model(folder):
            _check_kind(name, kinds, where)
            return _together(_fetch(name))
        kind = "published weights" if name in fetch.PUBLISHED else "included model"
        logger.info("%s: taking the folder of this name, not the %s", name, kind)
    elif not folder.exists() and (where or not os.path.dirname(name)):
        fitting = [model for model, kind in _kinds().items() if not kinds or kind in kinds]
        known = ", ".join([*others, *fitting])
        culprit = f"{where}: {name!r}" if where else repr(name)
        hints = [f"is it {near!r}" for near in difflib.get_close_matches(name, fitting, 1)]
        hints += [f"known: {known}"] if known else []
        listed = "".join(f"; {hint}" for hint in hints)
        raise UserError(f"{culprit}: no such folder{listed}; or give {hub.FORM}")
    return folder


def is_name(name: str) -> bool:
    """Whether a name means published weights, an included model, or one on the Hub."""
    return name.startswith(hub.SCHEME) or (name in _kinds() and not _holds_model(as_path(name)))


def architecture(name: str, kinds: Sequence[str]) -> Any:
    """The config of published weights that are not in the cache; None for all other models."""
    from gigatok_jax.weights import convert  # imports `bundles`, which imports this module

    published = fetch.PUBLISHED.get(name)
    if not published or _holds_model(as_path(name)) or fetch.is_there(name):
        return None
    _check_kind(name, kinds, "")
    model = convert.KINDS[published.kind].model
    return model(published.model) if model else None


def _fetch(name: str) -> Path:
    from gigatok_jax.weights import convert

    if name in INCLUDED:
        return INCLUDED[name][1]
    if in_bucket(fetch.bundle_path(name)):
        distributed.in_main(lambda: convert.fetch_bundle(name))
        return fetch.bundle_path(name)
    return convert.fetch_bundle(name)


def _together(folder: Path) -> Path:
    """Waits until the other processes of a run have the model: each machine may download it."""
    distributed.barrier("the download of a model", working=True)
    return folder


def one_of(kinds: Sequence[str]) -> str:
    """Kinds of networks, for messages; those of all families of tokenizers are tokenizers."""
    return "tokenizer" if "tokenizer" in kinds else " or ".join(kinds)


def _kinds() -> dict[str, str]:
    """The kind of every model that has a name."""
    included = {name: kind for name, (kind, _) in INCLUDED.items()}
    return included | {name: published.kind for name, published in fetch.PUBLISHED.items()}


def _check_kind(name: str, kinds: Sequence[str], where: str) -> None:
    kind = _kinds()[name]
    if kinds and kind not in kinds:
        culprit = f"{where}: {name}" if where else name
        raise UserError(f"{culprit}: holds a {kind}, expected a {one_of(kinds)}")


def _holds_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "bundle", "checkpoints"))
