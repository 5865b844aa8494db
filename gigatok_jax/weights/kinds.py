"""Reference checkpoints to bundles and back, by kind."""

from collections.abc import Callable, Iterable, Mapping
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from gigatok_jax import bundles, recipes
from gigatok_jax.config import from_mapping
from gigatok_jax.errors import UserError
from gigatok_jax.files import cache_dir
from gigatok_jax.models import vit
from gigatok_jax.models.generator import GeneratorConfig
from gigatok_jax.models.tokenizer import TokenizerConfig
from gigatok_jax.weights import convert, fetch, torch_files


class Kind(NamedTuple):
    """How one kind of network is converted.

    Attributes:
      architecture: name of an architecture to its config, or None where there is only one.
      config: the config's dataclass, or None.
      from_torch, to_torch: functions of (tensors or weights, config).
    """

    architecture: Callable[[str], Any] | None
    config: type | None
    from_torch: Callable[[Any, Any], Any]
    to_torch: Callable[[Any, Any], dict[str, np.ndarray]]


def _vit(
    family: str, known: Mapping[str, vit.ViTConfig], from_torch: Callable, to_torch: Callable
) -> Kind:
    def architecture(name: str) -> vit.ViTConfig:
        if name not in known:
            raise UserError(f"{name!r}: no such {family} model; known: {', '.join(known)}")
        return known[name]

    return Kind(architecture, vit.ViTConfig, from_torch, to_torch)


KINDS = {
    "tokenizer": Kind(
        recipes.tokenizer_model,
        TokenizerConfig,
        convert.tokenizer_from_torch,
        convert.tokenizer_to_torch,
    ),
    "generator": Kind(
        recipes.generator_model,
        GeneratorConfig,
        convert.generator_from_torch,
        convert.generator_to_torch,
    ),
    "dino": _vit("dino", vit.DINO, convert.dino_from_torch, convert.dino_to_torch),
    "dinov2": _vit("dinov2", vit.DINOV2, convert.dino_from_torch, convert.dino_to_torch),
    "clip": _vit("clip", vit.CLIP, convert.clip_from_torch, convert.clip_to_torch),
    "siglip": _vit("siglip", vit.SIGLIP, convert.siglip_from_torch, convert.siglip_to_torch),
    "lpips": Kind(
        None,
        None,
        lambda tensors, _: convert.lpips_from_torch(tensors),
        lambda weights, _: convert.lpips_to_torch(weights),
    ),
    "inception": Kind(
        None,
        None,
        lambda tensors, _: convert.inception_from_torch(tensors),
        lambda weights, _: convert.inception_to_torch(weights),
    ),
}


def find(kind: str) -> Kind:
    """Raises UserError for a kind that there is not."""
    if kind not in KINDS:
        raise UserError(f"{kind!r}: no such kind of weights; known: {', '.join(KINDS)}")
    return KINDS[kind]


def to_bundle(
    kind: str,
    files: Iterable[str | pathlib.Path],
    directory: str | pathlib.Path,
    *,
    architecture: str = "",
    weights: str = "auto",
) -> None:
    """Converts a reference checkpoint.

    Args:
      kind: a key of `KINDS`.
      files: `.pt` or `.safetensors` files that together hold the tensors.
      directory: the bundle.
      architecture: which one of its kind: a name, or a bundle of the same one.
      weights: see `torch_files.read`.

    Raises:
      UserError: a file cannot be read, or does not fit the architecture.
    """
    files = [pathlib.Path(file) for file in files]
    functions = find(kind)
    config = _architecture(kind, architecture) if functions.architecture else None
    tensors = {name: t for file in files for name, t in torch_files.read(file, weights).items()}
    where = ", ".join(map(str, files))
    try:
        converted = functions.from_torch(tensors, config)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    made_by = {"converted_from": [file.name for file in files], "architecture": architecture}
    bundles.save(pathlib.Path(directory), kind, config, converted, made_by)


def _architecture(kind: str, name: str) -> Any:
    functions = find(kind)
    if not (pathlib.Path(name) / "config.json").is_file():
        return functions.architecture(name)
    record = bundles.read_config(pathlib.Path(name))
    if record["kind"] != kind:
        raise UserError(f"{name}: holds a {record['kind']}, expected a {kind}")
    return from_mapping(functions.config, record["config"], f"{name}/config.json: config")


def to_torch(kind: str, directory: str | pathlib.Path, file: str | pathlib.Path) -> None:
    """Writes a bundle's weights under the reference's names, as the file's suffix says.

    Raises:
      UserError: there is no such bundle, or the suffix is unknown.
    """
    functions = find(kind)
    bundle = bundles.load(directory, kind, functions.config)
    weights = jax.tree.map(np.asarray, bundle.weights)
    torch_files.write(file, functions.to_torch(weights, bundle.config))


def fetched(name: str) -> pathlib.Path:
    """Where the bundle of published weights lies once they are fetched."""
    return cache_dir() / "bundles" / name


def fetched_or_refuse(name: str) -> pathlib.Path:
    """`fetched`, or a UserError that says how to get there."""
    directory = fetched(name)
    if not directory.exists():
        published = fetch.PUBLISHED[name]
        model = f" --model={published.architecture}" if published.architecture else ""
        sources = " ".join(f"--from={file.name}" for file in published.files)
        raise UserError(
            f"{name}: its weights are not in {directory}; get them with: gigatok weights fetch "
            f"{name}, or from files with: gigatok convert {published.kind} {sources}{model} "
            f"--out={directory}"
        )
    return directory


def fetch_bundle(name: str) -> pathlib.Path:
    """Downloads published weights, unless they are there, and converts them.

    Raises:
      UserError: see `fetch.fetch`; or PyTorch, which reads the files, is missing.
    """
    published = fetch.find(name)
    directory = fetched(name)
    if not directory.exists():
        for file in published.files:
            torch_files.check_readable(file.name)
        files = fetch.fetch(name)
        to_bundle(published.kind, files, directory, architecture=published.architecture)
    return directory
