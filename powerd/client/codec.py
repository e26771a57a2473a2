"""JSON <-> the dataclasses of powerd.api and powerd.model, with the standard library only.

House rules: unknown fields are ignored and missing ones take their default, so that an older client reads a newer daemon;
a value of a wrong type is a CodecError that names the field; nothing here knows any single type.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum, StrEnum
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")
_Decode = Callable[[Any, str], Any]
_PLAIN: dict[type, tuple[type, ...]] = {str: (str,), bool: (bool,), int: (int,), float: (int, float)}


class CodecError(ValueError):
    """A JSON value that does not fit its type; the message names the field."""


def encode(value: Any) -> Any:
    """The JSON form of a dataclass, enum, tuple, mapping or plain value; NaN becomes null."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(encode(k)): encode(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def decode(kind: type[T], value: Any, where: str = "answer") -> T:
    """The object of a type that a JSON value describes; CodecError when it does not."""
    return cast(T, _decoder(cast(Any, kind))(value, where))


def _plain(kind: type) -> _Decode:
    accepted = _PLAIN[kind]

    def read(value: Any, where: str) -> Any:
        if type(value) not in accepted:
            raise CodecError(f"{where}: expected {kind.__name__}, got {type(value).__name__}")
        return float(value) if kind is float else value

    return read


def _enum(kind: type[Enum]) -> _Decode:
    def read(value: Any, where: str) -> Any:
        try:
            return kind(value)
        except ValueError:
            if issubclass(kind, StrEnum) and isinstance(value, str):
                return value  # a newer daemon may know more names; a StrEnum is a str, so comparisons still work
            raise CodecError(f"{where}: {value!r} is not a {kind.__name__}") from None

    return read


def _union(arms: tuple[Any, ...]) -> _Decode:
    readers = [_decoder(arm) for arm in arms if arm is not type(None)]
    optional = type(None) in arms

    def read(value: Any, where: str) -> Any:
        if value is None and optional:
            return None
        for reader in readers[:-1]:
            try:
                return reader(value, where)
            except CodecError:
                continue
        return readers[-1](value, where)

    return read


def _tuple(item: _Decode) -> _Decode:
    def read(value: Any, where: str) -> Any:
        if not isinstance(value, list):
            raise CodecError(f"{where}: expected a list, got {type(value).__name__}")
        return tuple(item(v, f"{where}[{n}]") for n, v in enumerate(value))

    return read


def _mapping(key: _Decode, item: _Decode) -> _Decode:
    def read(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise CodecError(f"{where}: expected an object, got {type(value).__name__}")
        return {key(k, where): item(v, f"{where}.{k}") for k, v in value.items()}

    return read


def _dataclass(kind: type) -> _Decode:
    hints = get_type_hints(kind)
    members = [(f.name, f.default is MISSING and f.default_factory is MISSING) for f in fields(kind)]
    readers: dict[str, _Decode] = {}  # filled on first use: types may refer to themselves

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise CodecError(f"{where}: expected an object, got {type(value).__name__}")
        if not readers:
            readers.update({name: _decoder(hints[name]) for name, _ in members})
        content = {}
        for name, required in members:
            if name in value:
                content[name] = readers[name](value[name], f"{where}.{name}")
            elif required:
                raise CodecError(f"{where}.{name}: missing")
        return kind(**content)

    return read


@cache
def _decoder(kind: Any) -> _Decode:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value, _where: value
    if origin in (Union, types.UnionType):
        return _union(arguments)
    if origin is tuple:
        return _tuple(_decoder(arguments[0]))
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(_decoder(arguments[0]), _decoder(arguments[1]))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _enum(kind)
    if kind in _PLAIN:
        return _plain(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind)
    raise TypeError(f"no JSON form for {kind!r}")


def neutral(kind: type[T]) -> T:
    """A value of a type that says "nothing is known": empty text and tuples, NaN, ``None`` where allowed."""
    return cast(T, _neutral(kind))


def _neutral(kind: Any) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if type(None) in arguments else _neutral(arguments[0])
    if origin is tuple:
        return ()
    if origin is not None and issubclass(origin, Mapping):
        return {}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return list(kind)[-1]  # ended, failed, suspect: the last member is the one that promises least
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{f.name: False if f.name == "ok" else _neutral(hints[f.name]) for f in fields(kind)})
    return {str: "", bool: False, int: 0, float: math.nan}[kind]
