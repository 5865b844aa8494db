"""Reading and writing PyTorch checkpoints: `.safetensors`, and `.pt`/`.pth` through PyTorch."""

from collections.abc import Callable, Iterator, Mapping
import functools
import pathlib
import re
from typing import Any
import warnings
import zipfile

import jax.numpy as jnp
import numpy as np
import safetensors

from gigatok_jax.errors import UserError
from gigatok_jax.files import (
    Path,
    as_path,
    damaged_member,
    local_copy,
    read_index,
    replacing,
    unwritable,
    write_safetensors,
)

WRAPPERS = ("model", "state_dict", "module")
AVERAGE = "model_ema."  # begins names of averages among the weights, which lack all other dots
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
ADVICE = 'where it was made, call torch.save({"model": model.state_dict()}, FILE)'


class Inert:
    """Stands for an object that is not needed; nothing of the object's own class is called."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def _names(module: str, names: str) -> list[str]:
    return [f"{module}.{name}" for name in names.split()]


# What people store beside the weights: settings, paths, dates, histories and random states. The
# file's names of these are given other meanings, so that nothing of the file is called.
PATHS = "PosixPath WindowsPath PurePosixPath PureWindowsPath Path PurePath"
NUMPY = "multiarray._reconstruct multiarray.scalar numeric._frombuffer"
DTYPES = " ".join(name for name in dir(np.dtypes) if name.endswith("DType"))
RANDOM = "_pickle.__randomstate_ctor _pickle.__bit_generator_ctor _pickle.__generator_ctor"
HARMLESS = [
    (lambda *_: {}, "collections.defaultdict"),  # torch fills only plain dictionaries and lists
    (lambda *_: [], "collections.deque"),
    *(
        (Inert, name)
        for name in (
            *_names("argparse", "Namespace"),
            *_names("builtins", "list dict tuple frozenset int float bool str slice range"),
            *_names("datetime", "datetime date time timedelta timezone"),
            *_names("decimal", "Decimal"),
            *_names("fractions", "Fraction"),
            *_names("numpy", "ndarray dtype"),
            *_names("numpy._core", NUMPY),
            *_names("numpy.core", NUMPY),  # NumPy 1
            *_names("numpy.dtypes", DTYPES),
            *_names("numpy.random", f"{RANDOM} _mt19937.MT19937 _pcg64.PCG64"),
            *_names("pathlib", PATHS),
            *_names("pathlib._local", PATHS),  # Python 3.13
            # Older Lightning keeps the state of a callback under its class.
            *_names("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
            *_names("types", "SimpleNamespace"),
            *_names("uuid", "UUID"),
        )
    ),
]


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a file by name, read on access; floating-point tensors become float32."""

    def __init__(self, stored: Mapping[str, Any]):
        """`stored` maps names to PyTorch tensors, or to functions that read a NumPy array."""
        self._stored = stored

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._stored[name]
        if callable(tensor):
            array = tensor()
            floating = jnp.issubdtype(array.dtype, jnp.floating)
            return array.astype(np.float32, copy=False) if floating else array
        tensor = tensor.detach()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def read(path: str | Path, weights: str = "auto") -> Tensors:
    """Opens a checkpoint.

    Code in `.pt` files never runs. Tensors may be nested under "model", "state_dict" or "module".
    The prefixes that `DistributedDataParallel` ("module.") and `torch.compile` ("_orig_mod.") add
    to names are removed. The EMA is nested under "ema", or, as latent diffusion's `LitEma` stores
    it, lies beside the weights under names such as "model_ema.encoderconv_inweight". Other content
    is ignored.

    Args:
      path: a `.safetensors` file, or one from `torch.save` (`.pt`, `.pth`, `.bin`, ...).
      weights: "auto": the EMA if the file has one, as in the reference, else the model; "model";
        or the key of other weights in the file, such as "ema" or "discriminator".

    Raises:
      UserError: the file is missing or unreadable, or does not hold these weights.
    """
    path = local_copy(as_path(path))
    if not path.is_file() or not path.stat().st_size:
        fault = "is empty" if path.is_file() else "no such file"
        fault = "is a directory" if path.is_dir() else fault
        raise UserError(f"{path}: {fault}; expected a .pt or .safetensors checkpoint")
    load = _load_safetensors if path.suffix == ".safetensors" else _load_torch
    content = _unwrap(load(path), weights, path)
    tensors = {
        name.replace("_orig_mod.", ""): tensor
        for name, tensor in content.items()
        if isinstance(name, str) and (callable(tensor) or hasattr(tensor, "is_floating_point"))
    }
    tensors = _without_averages(tensors, weights != "model", path)
    if not tensors:
        raise UserError(f"{path}: expected a model's tensors, {_describe(content)}")
    while all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return Tensors(tensors)


def _without_averages(tensors: dict[str, Any], used: bool, path: Path) -> dict[str, Any]:
    """Removes what `LitEma` stores; if `used`, averages replace the tensors that they are of."""
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(AVERAGE)}
    if not used or len(own) == len(tensors):
        return own
    averages = {name: tensors.get(AVERAGE + name.replace(".", "")) for name in own}
    if all(average is None for average in averages.values()):
        first = next(name for name in tensors if name.startswith(AVERAGE))
        raise UserError(f"{path}: expected {first!r} and others to be averages of its tensors")
    # What is not trained, such as a count, has no average.
    return {name: own[name] if average is None else average for name, average in averages.items()}


def shards(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that a Hugging Face index lists; any other file stands alone."""
    return sorted(set(read_index(path).values())) if path.name.endswith(".index.json") else [path]


def _load_safetensors(path: pathlib.Path) -> dict[str, Callable[[], np.ndarray]]:
    try:
        file = safetensors.safe_open(path, "np")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file, or truncated ({error})") from error

    def get(name: str) -> np.ndarray:
        try:
            return file.get_tensor(name)
        except AttributeError as error:  # an 8-bit float
            raise UserError(f"{path}: tensor {name!r} cannot be read ({error})") from error

    return {name: functools.partial(get, name) for name in file.keys()}  # noqa: SIM118


def _load_torch(path: pathlib.Path) -> Any:
    torch = import_torch(path)
    _check_sums(path)
    # Mapping avoids reading optimizer states, which are twice the size of the weights. The format
    # before PyTorch 1.6, which VGG-16 was published in, cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the protocol: the error says it
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch raises many types for files of other kinds
        code = re.search(r"nsupported (?:global: GLOBAL|GLOBAL|class) (\S+)", str(error))
        fault = "another format, or truncated"
        if code:
            fault = f"it would run code of {code[1]}; {ADVICE}"
        elif mapped and "Unsupported operand" in str(error):  # the file is whole
            fault = f"its pickle protocol is not 2; {ADVICE}"
        raise UserError(f"{path}: not a PyTorch checkpoint of plain tensors ({fault})") from error


def _check_sums(path: pathlib.Path) -> None:
    """Rejects a damaged file; PyTorch writes checksums, but does not compare them."""
    if zipfile.is_zipfile(path) and (damaged := damaged_member(path)):
        raise UserError(f"{path}: not a PyTorch checkpoint of plain tensors ({damaged} is damaged)")


def import_torch(path: str | pathlib.Path) -> Any:
    """Imports PyTorch, or raises UserError: the file at `path` needs it."""
    try:
        import torch
    except ImportError as error:
        suffix = pathlib.Path(path).suffix
        raise UserError(
            f"{path}: reading and writing {suffix} files needs PyTorch: pip install torch"
        ) from error
    return torch


def _unwrap(content: Any, weights: str, path: pathlib.Path) -> Mapping:
    """The mapping of tensors that `weights` selects; see `read`."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a state_dict")
    if weights == "auto":
        weights = "ema" if isinstance(content.get("ema"), Mapping) else "model"
    if weights != "model" and isinstance(content.get(weights), Mapping):
        content = content[weights]
    elif weights != "model":
        own = _unwrap(content, "model", path)
        if weights != "ema" or not any(str(name).startswith(AVERAGE) for name in own):
            raise UserError(f"{path}: has no {weights!r} weights, {_describe(content)}")
    for key in WRAPPERS:
        if isinstance(content.get(key), Mapping):
            return _unwrap(content[key], "model", path)
    return content


def _describe(content: Mapping) -> str:
    keys = ", ".join(map(str, list(content)[:6]))
    return f"found {keys}{', ...' if len(content) > 6 else ''}" if content else "found nothing"


def write(path: str | Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a `.safetensors` file, or a `.pt` file with the tensors under "model".

    The write is atomic.

    Raises:
      UserError: the suffix is unknown.
      OSError: the file cannot be written.
    """
    path = as_path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: expected a file name that ends in {', '.join(SUFFIXES)}")
    torch = None if path.suffix == ".safetensors" else import_torch(path)
    # Copies read-only arrays, such as JAX's, which torch would warn about.
    tensors = {name: np.require(t, requirements=("C", "W")) for name, t in tensors.items()}
    with replacing(path) as aside:
        if torch is None:
            return write_safetensors(aside, tensors)
        try:
            torch.save({"model": {k: torch.from_numpy(v) for k, v in tensors.items()}}, aside)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise unwritable(aside, error, size) from error
