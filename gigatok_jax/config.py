"""Configurations: frozen dataclasses that check their own fields, and how to load them.

A configuration is declared once, as a dataclass under `@configclass`. Its types are its checks:

    @configclass
    class SamplingConfig:
        temperature: NonNegativeFloat = 1.0  # divides the logits; 0 takes the arg-max
        schedule: Literal["constant", "step"] = "constant"

Rules that involve several fields are Pydantic validators. A file in `configs/` composes these
dataclasses, and `--config.a.b=c` overrides single fields.
"""

from collections.abc import Mapping
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
import types
import typing
from typing import Annotated, Any, TypeVar, dataclass_transform

from ml_collections import ConfigDict, config_dict
import numpy as np
import pydantic
import pydantic.dataclasses

from gigatok_jax.errors import UserError

T = TypeVar("T")

PACKAGE = pathlib.Path(__file__).parent
# In a wheel, configs/ is inside the package; in a checkout, beside it.
CONFIGS = next(p for p in (PACKAGE / "configs", PACKAGE.parent / "configs") if p.is_dir())


def _split(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.strip() for text in names for name in text.split(",") if name.strip())


# The parser of flags takes `--config.a=x,y` for one text, and `--config.a='("x", "y")'` for two.
Names = Annotated[tuple[str, ...], pydantic.AfterValidator(_split)]


@dataclass_transform(frozen_default=True)
def configclass(cls: type[T] | None = None, *, kw_only: bool = False):
    """Makes a frozen dataclass whose constructor raises a one-line ValueError for a wrong value.

    Instances share the default values of fields, which is safe because configurations are frozen.
    """
    if cls is None:
        return functools.partial(configclass, kw_only=kw_only)
    settings = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    cls = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=kw_only, config=settings)
    initialize = cls.__init__
    names = [field.name for field in dataclasses.fields(cls)]

    def __init__(self, *args, **kwargs):
        if len(args) > len(names):
            raise TypeError(f"{cls.__name__} takes {len(names)} values, got {len(args)}")
        # Pass all values by name, so that errors name the field. Strict mode would reject NumPy
        # scalars.
        values = dict(zip(names, args, strict=False)) | kwargs
        for name, value in values.items():
            values[name] = value.item() if isinstance(value, np.generic) else value
        try:
            initialize(self, **values)
        except pydantic.ValidationError as error:
            raise ValueError(_first_line(error, cls)) from None

    cls.__init__ = __init__
    return cls


def from_mapping(cls: type[T], mapping: Mapping[str, Any], path: str = "config") -> T:
    """Builds a configuration from nested mappings, such as parsed JSON or `--config` flags.

    Args:
      cls: a `configclass`.
      mapping: field names to values; fields with defaults may be omitted.
      path: origin of the mapping, for messages.

    Raises:
      UserError: a field is unknown, missing, of the wrong type or out of range.
    """
    _check_json(mapping, path)
    try:
        # Through JSON, because strict mode accepts lists as tuples only from JSON.
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(mapping))
    except pydantic.ValidationError as error:
        raise UserError(f"{path}.{_first_line(error, cls)}") from None


def _check_json(mapping: Mapping[str, Any], path: str) -> None:
    """Raises UserError for numbers that floats cannot represent, and text that is not Unicode."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            _check_json(value, f"{path}.{name}")
        elif isinstance(value, int) and abs(value) > 2**53:
            raise UserError(f"{path}.{name}: expected at most {2**53}, got {value}")
        elif re.search("[\ud800-\udfff]", json.dumps([name, value], ensure_ascii=False)):
            raise UserError(f"{path}.{name}: expected UTF-8, got {value!r}; a link may rename it")


def _first_line(error: pydantic.ValidationError, cls: type) -> str:
    """The first error as `FIELD: expected ..., got ...`."""
    fault = error.errors(include_url=False)[0]
    path = [str(part) for part in fault["loc"]]
    name, kind = ".".join(path), fault["type"]
    if kind == "value_error":  # a validator's own message begins with the field's name
        return ".".join([*path, str(fault["ctx"]["error"])])
    if kind == "missing":
        return f"{name}: missing"
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        for part in path[:-1]:
            cls = typing.get_type_hints(cls).get(part, cls)
        known = ", ".join(sorted(field.name for field in dataclasses.fields(cls)))
        return f"{name}: no such field; known: {known}"
    expected = fault["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"{name}: expected {expected}, got {fault['input']!r}"


def to_config_dict(config: Any) -> ConfigDict:
    """Converts a configuration to a `ConfigDict`, which `--config.a.b=c` can override."""
    values = {}
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            value = to_config_dict(value)
        elif value is None:  # the flag parser needs to know the type of the missing value
            (kind,) = (t for t in typing.get_args(hints[field.name]) if t is not types.NoneType)
            value = config_dict.placeholder(kind)
        values[field.name] = value
    return ConfigDict(values)


def installed() -> dict[str, types.ModuleType]:
    """The modules of the installed configurations, by name."""
    return {name: _import(path) for name, path in _installed().items()}


def _installed() -> dict[str, pathlib.Path]:
    return {path.stem: path for path in sorted(CONFIGS.glob("*.py")) if path.stem[0] != "_"}


def _import(path: pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(name: str) -> Any:
    """Calls `get_config` of a config file and returns the result.

    Args:
      name: `FILE.py` or `FILE.py:ARGUMENT`, such as "configs/tokenizer.py:b_l". If the file does
        not exist, or `name` is bare ("tokenizer:b_l"), the installed configs are searched.

    Raises:
      UserError: the file does not exist, has no `get_config`, or rejects the argument.
    """
    file, colon, argument = name.partition(":")
    path = pathlib.Path(file).expanduser()
    if not path.is_file():
        installed = CONFIGS / f"{path.stem}.py"
        if path.parent not in (pathlib.Path(), pathlib.Path("configs")) or not installed.is_file():
            known = ", ".join(_installed())
            raise UserError(f"--config: {file}: no such file; installed configs: {known}")
        path = installed
    if path.suffix != ".py":
        raise UserError(
            f"--config: {path}: expected a Python file, got {path.suffix or 'no suffix'}"
        )
    module = _import(path)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config: {path}: expected a function get_config, found none")
    try:
        return module.get_config(argument) if colon else module.get_config()
    except ValueError as error:
        raise UserError(f"--config: {name}: {error}") from error
