"""Frozen records to JSON data and back, by their own annotations."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, Literal, TypeVar

from bar_edge.errors import InputError

T = TypeVar("T")


def json_data(value: Any) -> Any:
    """Return a record, or whatever holds records, as what JSON knows: dictionaries and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: json_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [json_data(item) for item in value]
    return {key: json_data(item) for key, item in value.items()} if isinstance(value, dict) else value


def read_record(kind: type[T], data: Any, what: str) -> T:
    """Return the record that JSON data holds; names that it does not know are left out.

    what: is said in the InputError, raised where a value is missing or of another type.
    """
    try:
        return typing.cast(T, _value(kind, data, ""))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            what, got=f"{type(error).__name__}: {error}", remedy="use the version that wrote it"
        ) from error


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _value(hint: Any, data: Any, name: str) -> Any:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(data, dict):
        fields = {field.name for field in dataclasses.fields(hint) if field.init}
        known = {key: _value(_hints(hint)[key], data[key], f"{name}.{key}") for key in fields & data.keys()}
        return typing.cast(Any, hint)(**known)
    if origin is tuple and isinstance(data, list):
        return tuple(_value(inside[0], item, f"{name}[]") for item in data)
    if origin is dict and isinstance(data, dict):
        return {str(key): _value(inside[1], item, f"{name}.{key}") for key, item in data.items()}
    if origin in (types.UnionType, typing.Union):
        one = next((kind for kind in inside if dataclasses.is_dataclass(kind) or typing.get_origin(kind)), None)
        if one is not None and data is not None:
            return _value(one, data, name)
        if any(_is(kind, data) for kind in inside):
            return data
    elif hint is Any or (data in inside if origin is Literal else _is(hint, data)):
        return data
    raise ValueError(f"{name.lstrip('.') or 'the whole'} is {str(data)[:40]!r}")


def _is(kind: Any, data: Any) -> bool:
    if kind is float:
        return isinstance(data, (int, float)) and not isinstance(data, bool)
    return type(data) is kind
