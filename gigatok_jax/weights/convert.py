"""Converts reference checkpoints of every kind of network to bundles, and back.

Conversions preserve float32 values bit for bit.
"""

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
import dataclasses
import fnmatch
import functools
from typing import Any

import filelock
from flax.traverse_util import flatten_dict
import jax
import numpy as np

from gigatok_jax import bundles, locate, recipes
from gigatok_jax.errors import UserError, lookup
from gigatok_jax.files import Path, as_path, in_bucket, local_cache_dir, local_copy
from gigatok_jax.models import (
    families,
    generator,
    inception,
    layers,
    lpips,
    quantizer,
    titok,
    tokenizer,
    vit,
    vqgan,
)
from gigatok_jax.weights import fetch, layout, names, torch_files


@dataclasses.dataclass(frozen=True)
class Kind:
    """How to convert one kind of network; functions take the network's config."""

    entries: Callable[[Any], list[layout.Entry]]
    shapes: Callable[[Any], dict]  # of the parameters
    config: type | None = None  # None: only one architecture exists
    model: Callable[[str], Any] | None = None  # the config of a named architecture
    example: str = ""  # such a name


def _known(kind: str, known: Mapping[str, Any], entries: Callable, shapes: Callable) -> Kind:
    """A kind whose architectures are those of a table, by name."""
    return Kind(
        entries,
        shapes,
        config=type(next(iter(known.values()))),
        model=lambda name: lookup(name, known, f"{kind} model"),
        example=next(iter(known)),
    )


KINDS = {
    "tokenizer": Kind(
        names.tokenizer,
        tokenizer.param_shapes,
        config=tokenizer.TokenizerConfig,
        model=recipes.tokenizer_model,
        example="b_l",
    ),
    "generator": Kind(
        names.generator,
        generator.param_shapes,
        config=generator.GeneratorConfig,
        model=recipes.generator_model,
        example="b",
    ),
    "vqgan": _known("vqgan", vqgan.MODELS, names.vqgan, families.param_shapes),
    "titok": _known("titok", titok.MODELS, names.titok, families.param_shapes),
    "dino": _known("dino", vit.DINO, names.dino, vit.param_shapes),
    "dinov2": _known("dinov2", vit.DINOV2, names.dino, vit.param_shapes),
    "clip": _known("clip", vit.CLIP, names.clip, vit.param_shapes),
    "siglip": _known("siglip", vit.SIGLIP, names.siglip, vit.param_shapes),
    "lpips": Kind(lambda _: names.lpips_vgg16(), lambda _: lpips.param_shapes()),
    "inception": Kind(
        lambda _: names.inception_fid(),
        lambda _: layers.param_shapes(inception.Inception(), (1, 299, 299, 3)),
    ),
}


def from_torch(kind: str, tensors: Mapping[str, np.ndarray], config: Any = None) -> dict[str, Any]:
    """Converts a reference checkpoint.

    Args:
      kind: a key of `KINDS`.
      tensors: names to arrays, as from `torch_files.read`. For "lpips": those of a complete LPIPS
        module, or of torchvision's VGG-16 and the linear layers.
      config: the architecture; None if the kind has only one.

    Returns:
      `{"params": ...}`; for a tokenizer also "history", int32 `[65536]`.

    Raises:
      ValueError: a tensor is missing, unexpected, or of the wrong shape; the message names it.
    """
    rule = KINDS[kind]
    entries = names.lpips_vgg16(tensors) if kind == "lpips" else rule.entries(config)
    known = {entry.name for entry in entries}
    unknown = [
        name
        for name in tensors
        if name.startswith(names.TOWERS.get(kind, ""))
        and name not in known
        and not any(fnmatch.fnmatchcase(name, glob) for glob in names.IGNORED[kind])
    ]
    if unknown:
        raise ValueError(
            f"tensor {unknown[0]!r} of shape {list(np.shape(tensors[unknown[0]]))} does not "
            f"belong to this architecture (the first of {len(unknown)} such tensors)"
        )
    weights = {"params": layout.from_torch(tensors, entries, rule.shapes(config))}
    bundles.check_finite(flatten_dict(weights["params"], sep="/"))
    if kind == "tokenizer":
        weights["history"] = _history(tensors.get(names.USAGE))
    return weights


def _history(used: np.ndarray | None) -> np.ndarray:
    """Converts the reference's usage buffer, which stores codes as floats, to our history."""
    if used is None:
        return np.array(quantizer.empty_history())
    history = np.asarray(used).astype(np.int32)
    if used.shape != (quantizer.HISTORY_LENGTH,) or not np.array_equal(history, used):
        raise ValueError(
            f"tensor {names.USAGE!r}: expected the last {quantizer.HISTORY_LENGTH} codes assigned, "
            f"as whole numbers, got shape {list(used.shape)}"
        )
    return history


def to_torch(kind: str, weights: Mapping[str, Any], config: Any = None) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`, without the tensors that it ignores.

    A tokenizer's usage buffer is omitted if the history is missing or empty (all -1), as in a
    reference model that does not measure usage.
    """
    tensors = layout.to_torch(weights["params"], KINDS[kind].entries(config))
    history = np.asarray(weights.get("history", -1))
    if np.any(history != -1):
        tensors[names.USAGE] = history.astype(np.float32)
    return tensors


def to_bundle(
    kind: str,
    files: Iterable[str | Path],
    directory: str | Path,
    *,
    model: str = "",
    weights: str = "auto",
    made_by: Mapping[str, Any] | None = None,
) -> None:
    """Converts checkpoint files to a bundle.

    Args:
      kind: a key of `KINDS`.
      files: `.pt` or `.safetensors` files that together hold the tensors, or an index of them.
      directory: path of the bundle.
      model: name of the architecture, or a model of the same architecture, see `locate.find`.
      weights: see `torch_files.read`.
      made_by: more provenance.

    Raises:
      UserError: a file cannot be read or does not fit the architecture; or `directory` holds other
        things than a bundle.
    """
    directory = as_path(directory)
    bundles.check_replaceable(directory)
    files, rule, config = [local_copy(as_path(file)) for file in files], find(kind), None
    if rule.model and not model:
        raise UserError(
            f"--model: expected the architecture of this {kind}, such as {rule.example}"
        )
    if rule.model:
        is_model = locate.is_name(model) or as_path(model, "--model").is_dir()
        config = bundles.load_config(model, kind, rule.config) if is_model else rule.model(model)
    files = [shard for file in files for shard in torch_files.shards(file)]
    tensors = ChainMap(*[torch_files.read(file, weights) for file in files])
    try:
        converted = from_torch(kind, tensors, config)
    except ValueError as error:
        raise UserError(f"{', '.join(map(str, files))}: {error}") from error
    origin = {"converted_from": [file.name for file in files], "model": model}
    bundles.save(directory, kind, config, converted, origin | dict(made_by or {}), alone=True)


def to_file(kind: str, name: str | Path, file: str | Path) -> None:
    """Writes a model's weights under the reference's names; the suffix of `file` sets the format.

    Raises:
      UserError: there is no such model (see `locate.find`), or the suffix is unknown.
    """
    bundle = bundles.load(name, kind, find(kind).config, where="--from")
    torch_files.write(file, to_torch(kind, bundle.weights, bundle.config))


def find(kind: str) -> Kind:
    """`KINDS[kind]`, or a UserError that lists the kinds."""
    return lookup(kind, KINDS, "kind of weights")


@functools.cache
def parameter_count(kind: str, model: str) -> int:
    """Exact number of parameters of a named architecture."""
    rule = find(kind)
    shapes = rule.shapes(rule.model(model) if rule.model else None)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def fetch_bundle(name: str) -> Path:
    """Downloads and converts published weights, unless their bundle exists.

    A generator comes with its tokenizer, whose fingerprint its bundle records. If several processes
    of a machine, or of machines that share the cache, need the same weights, one does the work.

    Raises:
      UserError: see `fetch.download`; or PyTorch, which reads the files, is missing.
    """
    published = lookup(name, fetch.PUBLISHED, "weights")
    directory = fetch.bundle_path(name)
    if fetch.is_there(name):
        return directory
    for file in published.files:
        if not file.name.endswith(".safetensors"):
            torch_files.import_torch(f"{name}: {file.name}")  # raises before any download
    made_by = {"published": name}
    if published.tokenizer:
        tokenizer = bundles.load(fetch_bundle(published.tokenizer), families.KINDS)
        made_by["tokenizer"] = tokenizer.fingerprint
        made_by["published_tokenizer"] = published.tokenizer
        made_by["sampling"] = dict(published.sampling)
        made_by["data"] = {"class_names": list(published.class_names)}
        del tokenizer  # it can be larger than the generator
    # A bucket has no such locks, so there process 0 of a run does the work, see `locate`.
    beside = local_cache_dir() / "bundles" if in_bucket(directory) else directory.parent
    beside.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(beside / f".{name}.lock"):
        if not fetch.is_there(name):  # another process may have been faster
            files = fetch.download(name)
            to_bundle(published.kind, files, directory, model=published.model, made_by=made_by)
    return directory
