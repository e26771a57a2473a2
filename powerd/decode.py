"""Bytes of a request -> one of powerd.api's types, refused with the nearest valid name when anything is unknown.

House rules: pure; nothing is guessed; the error names the field.
"""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_type_hints

import msgspec

from powerd.errors import RequestError

T = TypeVar("T")


def nearest(name: str, valid: list[str]) -> str:
    """A hint that names the closest valid name, or all of them."""
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(valid))}"


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _refuse_unknown(content: Any, kind: Any, where: str) -> None:
    if isinstance(kind, type) and is_dataclass(kind):
        if isinstance(content, dict):
            known = [f.name for f in fields(kind)]
            for name, value in content.items():
                if name not in known:
                    raise RequestError(f"unknown field {where}{name}", hint=nearest(str(name), known))
                _refuse_unknown(value, _hints(kind)[name], f"{where}{name}.")
    elif isinstance(content, list):
        for kind_of_item in get_args(kind):
            for item in content:
                _refuse_unknown(item, kind_of_item, where)


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; RequestError when it is anything else."""
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}", hint="send one JSON object") from error
    if not isinstance(content, dict):
        raise RequestError("the body has to be a JSON object")
    return content


def decode(body: bytes, kind: type[T]) -> T:
    """The request in a body. RequestError when it is not JSON, not of this type, or has unknown fields."""
    content = json_object(body)
    _refuse_unknown(content, kind, "")
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise RequestError(str(error), hint=f"fields: {', '.join(f.name for f in fields(kind))}", code="bad_value") from error  # type: ignore[arg-type]
