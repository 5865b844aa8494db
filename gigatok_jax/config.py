"""Frozen dataclasses to `ConfigDict`s for the command line, and back with every field checked."""

from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any, TypeVar

from ml_collections import ConfigDict

from gigatok_jax.errors import UserError

T = TypeVar("T")


def to_config_dict(value: Any) -> ConfigDict:
    """A dataclass instance, nested ones included, as a `ConfigDict` with the same fields."""
    return ConfigDict(dataclasses.asdict(value))


def from_mapping(cls: type[T], mapping: Mapping[str, Any], path: str = "config") -> T:
    """Builds dataclass `cls` from a mapping such as `to_config_dict` or a JSON file gives.

    Args:
      cls: a dataclass; fields that are dataclasses are built from nested mappings.
      mapping: field name to value; a field with a default may be left out.
      path: where the mapping stands, for messages.

    Raises:
      UserError: a field is unknown, missing, of the wrong type, or refused by the dataclass.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(mapping.keys() - fields.keys())
    if unknown:
        raise UserError(f"{path}.{unknown[0]}: no such field; known: {', '.join(sorted(fields))}")
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(hints[name], mapping[name], f"{path}.{name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{path}.{name}: missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{path}.{error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    if isinstance(value, Mapping) and dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, path)
    origin = typing.get_origin(hint)
    if origin is types.UnionType and value is None:
        return None
    if origin is types.UnionType:
        return _convert(typing.get_args(hint)[0], value, path)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(typing.get_args(hint)[0], v, path) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or hint
    if not isinstance(value, expected) or (expected is not bool and isinstance(value, bool)):
        raise UserError(f"{path}: expected {expected.__name__}, got {value!r}")
    return value
