"""Bundles: directories that hold a network's weights and everything needed to use them.

`config.json` holds the kind of network, its architecture, where the weights come from, and a digest
of all this and the weights, which is compared when they are loaded.
`model.safetensors` holds each array under its path, such as "params/decoder/embed/kernel". Large
models are split as on Hugging Face: into `model-00001-of-00003.safetensors`, ..., with
`model.safetensors.index.json` mapping arrays to files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import hashlib
import json
import re
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from gigatok_jax import distributed, locate
from gigatok_jax.config import from_mapping
from gigatok_jax.errors import UserError, first_line
from gigatok_jax.files import (
    INDEX,
    Path,
    in_bucket,
    json_text,
    read_index,
    read_json,
    real_path,
    refuse_foreign,
    replacing,
    write_json,
    write_safetensors,
)
from gigatok_jax.models import families, generator, quantizer, titok, tokenizer, vit, vqgan

FORMAT = 3
FILES = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
FILE_BYTES = 5 * 10**9  # maximum, unless a single array is larger

# What a network of an architecture consists of: nested dictionaries of shapes and types.
CONTENT: dict[type, Callable[[Any], dict[str, Any]]] = {
    tokenizer.TokenizerConfig: lambda config: {
        "params": tokenizer.param_shapes(config),
        "history": jax.ShapeDtypeStruct((quantizer.HISTORY_LENGTH,), jnp.int32),
    },
    generator.GeneratorConfig: lambda config: {"params": generator.param_shapes(config)},
    titok.TitokConfig: lambda config: {"params": families.param_shapes(config)},
    vqgan.VqganConfig: lambda config: {"params": families.param_shapes(config)},
    vit.ViTConfig: lambda config: {"params": vit.param_shapes(config)},
}


class Bundle(NamedTuple):
    """A bundle's content."""

    config: Any  # the architecture
    weights: dict[str, Any]  # nested dictionaries of NumPy arrays: "params" and others
    made_by: dict[str, Any]  # provenance
    fingerprint: str  # of the parameters, see `fingerprint`

    @property
    def codes_of(self) -> str:
        """Fingerprint of the tokenizer that makes the same codes: the one before, or this one.

        Codes stay the same if only the decoder is fine-tuned.
        """
        return self.made_by.get("codes_of", self.fingerprint)


def fingerprint(params: Any) -> str:
    """Sixteen hex digits that identify nested dictionaries of parameters."""
    return _combine(_digests(flatten_dict(params, sep="/")))


def _digests(arrays: Mapping[str, Any]) -> dict[str, str]:
    """The digest of each array; several at a time, because hashing needs no Python lock."""

    def digest(array: Any) -> str:
        array = np.ascontiguousarray(array)
        found = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
        found.update(array.reshape(-1).view(np.uint8))
        return found.hexdigest()

    with ThreadPoolExecutor() as threads:
        return dict(zip(arrays, threads.map(digest, arrays.values()), strict=True))


def _combine(digests: Mapping[str, str]) -> str:
    lines = sorted(f"{name} {digest}" for name, digest in digests.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _digest(record: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """The digest of a bundle: of the content of `config.json`, and of all arrays."""
    described = {name: value for name, value in record.items() if name != "digest"}
    described = json.loads(json_text(described))  # as it is read back
    return _combine({**digests, "config.json": json.dumps(described, sort_keys=True)})


def check_finite(arrays: Mapping[str, Any]) -> None:
    """Raises ValueError for the first array with a value that is not finite."""
    for name, array in arrays.items():
        # A sum costs a fraction of a test of each element, and NaN and infinity survive it.
        if jnp.issubdtype(array.dtype, jnp.floating):
            with np.errstate(over="ignore", invalid="ignore"):
                finite = np.isfinite(np.sum(array)) or np.isfinite(array).all()
            if not finite:
                raise ValueError(f"{name}: expected finite values, found NaN or infinity")


def is_record(record: Mapping[str, Any]) -> bool:
    """Whether the content of a `config.json` is a bundle's."""
    return record.keys() >= {"kind", "config", "made_by"}


def check_replaceable(directory: Path) -> None:
    """Raises UserError if a folder has anything that is not a bundle's; `save` would remove it."""
    own = []
    with contextlib.suppress(OSError, UserError):
        record = read_json(directory / "config.json", "a bundle")
        if is_record(record):
            own = [path.name for path in directory.iterdir() if FILES.fullmatch(path.name)]
    refuse_foreign(directory, own, "a bundle to replace")


def save(
    directory: Path,
    kind: str,
    config: Any,
    weights: Mapping[str, Any],
    made_by: Mapping[str, Any],
    *,
    file_bytes: int = FILE_BYTES,
    alone: bool = False,
) -> None:
    """Writes a bundle; an existing one is replaced only once the new one is complete.

    All processes of a run must call this. Process 0 gathers sharded arrays one at a time and writes
    them, so it holds at most one file's arrays.

    Args:
      directory: path of the bundle.
      kind: "tokenizer", "dinov2", "lpips", ...
      config: the architecture, a dataclass; None if the kind has only one.
      weights: nested dictionaries of arrays.
      made_by: provenance, as JSON values.
      file_bytes: maximum size of a file.
      alone: this process writes NumPy arrays by itself, whatever the others do.

    Raises:
      UserError: `directory` holds other things than a bundle.
    """
    directory = real_path(directory)  # to replace what it links to, not the link
    flat = flatten_dict(weights, sep="/")
    parts: list[list[str]] = [[]]
    size = 0
    for name, array in flat.items():
        size += array.nbytes
        if parts[-1] and size > file_bytes:
            parts.append([])
            size = array.nbytes
        parts[-1].append(name)
    files = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        files = ["model.safetensors"]
    config = dataclasses.asdict(config) if config is not None else {}
    record = {"format": FORMAT, "kind": kind, "config": config, "made_by": dict(made_by)}
    digests = {}

    writes = alone or distributed.is_main()
    with (replacing if alone else distributed.replacing)(directory, check_replaceable) as aside:
        if writes:
            aside.mkdir()
            if len(parts) > 1:
                places = {
                    name: file for file, part in zip(files, parts, strict=True) for name in part
                }
                total = sum(array.nbytes for array in flat.values())
                index = {"metadata": {"total_size": total}, "weight_map": places}
                write_json(aside / INDEX, index)
        for file, part in zip(files, parts, strict=True):
            arrays = {name: _gather(flat[name], writes) for name in part}
            if writes:
                write_safetensors(aside / file, arrays)
                digests |= _digests(arrays)
        if writes:
            write_json(aside / "config.json", record | {"digest": _digest(record, digests)})


def _gather(array: Any, writes: bool) -> np.ndarray | None:
    """The full array in the process that writes it, None in the others."""
    if isinstance(array, jax.Array):
        # Read a copy or a shard: a JAX array caches its host value for as long as it lives.
        if array.is_fully_replicated:
            array = array.addressable_data(0)
        elif array.is_fully_addressable:
            array = array.copy()
        else:
            array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array, order="C") if writes else None


def load(
    name: str | Path,
    kind: str | Iterable[str],
    config_type: type | Mapping[str, type] | None = None,
    *,
    where: str = "",
) -> Bundle:
    """Reads a bundle; each process of a run reads it independently.

    Args:
      name: the bundle, or the workdir of the run that wrote it: a folder, or any other name that
        `locate.find` takes. Published weights and those of the Hub are downloaded if need be.
      kind: the expected kind, or several acceptable ones.
      config_type: the architecture's dataclass, or that of each kind; None leaves it as the mapping
        in the file.
      where: flag or field that holds the name, for messages.

    Returns:
      The bundle; floating-point arrays are float32.

    Raises:
      UserError: the bundle is missing, damaged, or of another kind, or its weights are not finite
        or not those of its architecture.
    """
    kinds = _several(kind)
    directory, config, record = _describe(locate.find(name, kinds, where=where), kinds, config_type)
    places, arrays = {}, {}
    try:
        if (directory / INDEX).exists():
            places = read_index(directory / INDEX)
        for file in sorted(set(places.values())) or [directory / "model.safetensors"]:
            arrays |= _read(file)
        if missing := places.keys() - arrays.keys():
            raise ValueError(f"{min(missing)} is missing")
        digests = _digests(arrays)
        if _digest(record, digests) != record["digest"]:
            raise ValueError("they, or config.json, are not those saved")
        check_finite(arrays)
        for name, array in arrays.items():
            if jnp.issubdtype(array.dtype, jnp.floating):
                arrays[name] = array.astype(np.float32, copy=False)
        weights = unflatten_dict(arrays, sep="/")
    except Exception as error:  # damaged files raise many types
        raise UserError(f"{directory}: unreadable weights ({first_line(error)})") from error
    if type(config) in CONTENT:
        _check_content(directory, CONTENT[type(config)](config), weights)
    params = {
        name.removeprefix("params/"): digest
        for name, digest in digests.items()
        if name.startswith("params/")
    }
    return Bundle(config, weights, record["made_by"], _combine(params))


def _read(file: Path) -> dict[str, np.ndarray]:
    if in_bucket(file):
        return safetensors.numpy.load(file.read_bytes())
    return safetensors.numpy.load_file(file)


def _check_content(directory: Path, expected: Any, weights: Any) -> None:
    """Rejects arrays that are missing, unknown, or of another shape or type."""
    expected, found = (
        {name: f"{x.dtype} {list(x.shape)}" for name, x in flatten_dict(tree, sep="/").items()}
        for tree in (expected, weights)
    )
    for name in sorted(expected.keys() | found.keys()):
        wanted, got = expected.get(name, "no such array"), found.get(name, "none")
        if wanted != got:
            raise UserError(f"{directory}: {name}: expected {wanted} by config.json, got {got}")


def load_config(
    name: str | Path,
    kind: str | Iterable[str],
    config_type: type | Mapping[str, type],
    *,
    where: str = "",
) -> Any:
    """Reads only a bundle's architecture, without downloading its weights.

    Arguments and errors are those of `load`.
    """
    kinds = _several(kind)
    config = locate.architecture(str(name), kinds)
    if config is None:
        folder = locate.find(name, kinds, where=where, weights=False)
        config = _describe(folder, kinds, config_type)[1]
    return config


def read_record(name: str | Path) -> tuple[Path, dict[str, Any]]:
    """A bundle's own folder, and the content of its `config.json`; `name` as for `load`."""
    directory, _, record = _describe(locate.find(name), (), None)
    return directory, record


def _several(kind: str | Iterable[str]) -> Sequence[str]:
    return [kind] if isinstance(kind, str) else list(kind)


def _describe(
    directory: Path, kinds: Sequence[str], config_type: type | Mapping[str, type] | None
) -> tuple[Path, Any, dict[str, Any]]:
    """The bundle's own directory, its architecture, and the content of its `config.json`."""
    if (directory / "bundle").is_dir():
        directory /= "bundle"
    elif (directory / "checkpoints").is_dir():
        raise UserError(
            f"{directory}: this run has not written a bundle yet; it does so when it finishes, or "
            "when SIGTERM stops it"
        )
    path = directory / "config.json"
    try:
        record = read_json(path, "a bundle")
    except OSError:
        fault = "not a bundle: it has no config.json" if directory.exists() else "no such folder"
        raise UserError(f"{directory}: {fault}") from None
    whole = record.keys() >= {"kind", "config", "made_by", "digest"}
    if not whole or record.get("format") != FORMAT:
        raise UserError(f"{path}: not the config of a bundle (format {FORMAT})")
    if kinds and record["kind"] not in kinds:
        raise UserError(f"{directory}: holds a {record['kind']}, expected a {locate.one_of(kinds)}")
    config = record["config"]
    if isinstance(config_type, Mapping):
        config_type = config_type[record["kind"]]
    if config_type is not None:
        config = from_mapping(config_type, config, f"{path}: config")
    return directory, config, record
