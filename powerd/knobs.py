"""TOML -> a frozen dataclass of sections: every key is a field that says its default, its help and its bounds.

House rules: pure; a text is taken as a whole or refused as a whole, with file, line and the nearest valid name.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from dataclasses import field, fields, is_dataclass, replace
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from powerd.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)


def knob(default: Any, text: str, *, low: float | None = None, high: float | None = None, one_of: tuple[str, ...] = ()) -> Any:
    """A field of a section: its default, what it says in the documentation, and its bounds."""
    return field(default=default, metadata={"help": text, "low": low, "high": high, "one_of": one_of})


def _line_of(text: str, section: str, key: str) -> int:
    """Where a key (or, with key "", a section) stands, which tomllib does not say; 1 when it cannot be told."""
    section_name, key_name = re.escape(section), re.escape(key)
    dotted = re.compile(rf"\s*{section_name}\s*\.\s*{key_name}\s*=" if key else rf"\s*[\"']?{section_name}[\"']?\s*[=.]")
    plain = re.compile(rf"\s*[\"']?{key_name}[\"']?\s*=")
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            here = match[1].strip("\"' ")
            if not key and here == section:
                return number
        elif dotted.match(line) or (key and here == section and plain.match(line)):
            return number
    return 1


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(valid))}"


def _check(where: str, value: Any, kind: Any, metadata: Any) -> Any:
    if get_origin(kind) is UnionType:
        kind = next(k for k in get_args(kind) if k is not type(None))
    if kind is float and type(value) is int:
        value = float(value)
    if get_origin(kind) is tuple and is_dataclass(get_args(kind)[0]):
        row: Any = get_args(kind)[0]
        hints = get_type_hints(row)
        if not isinstance(value, list) or not all(isinstance(each, dict) and each.keys() == hints.keys() for each in value):
            raise ConfigError(f"{where}: expected a list of {{{', '.join(hints)}}}, got {value!r}")
        return tuple(row(**{k: _check(f"{where}.{k}", each[k], hints[k], {}) for k in hints}) for each in value)
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(type(item) is str for item in value):
            raise ConfigError(f"{where}: expected a list of strings, got {value!r}")
        value = tuple(value)
    elif type(value) is not kind:
        raise ConfigError(f"{where}: expected {kind.__name__}, got {value!r}")
    low, high, one_of = metadata.get("low"), metadata.get("high"), metadata.get("one_of")
    if low is not None and not low <= value <= high:
        raise ConfigError(f"{where}: {value} is outside {low:g}..{high:g}")
    if one_of and value not in one_of:
        raise ConfigError(f"{where}: {value!r} is not one of {', '.join(one_of)}")
    return value


def _rows(kind: Any, section: str, rows: list[Any], text: str, file: str, before: tuple[Any, ...]) -> tuple[Any, ...]:
    """The ``[[section]]`` tables of one file after those of earlier ones; nobody's name is taken twice."""
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}
    head = re.compile(rf"\s*\[\[\s*[\"']?{re.escape(section)}[\"']?\s*\]\]")
    starts = [n for n, line in enumerate(text.splitlines(), 1) if head.match(line)]
    found = list(before)
    for number, row in enumerate(rows):
        at = f"{file}:{starts[number] if number < len(starts) else 1}"
        if not isinstance(row, dict):
            raise ConfigError(f"{at}: {section} has to be a table", hint=f"[[{section}]]")
        for key in row:
            if key not in known:
                raise ConfigError(f"{at}: unknown key {section}.{key}", hint=_nearest(key, known))
        if missing := [key for key in kind.NEEDED if not row.get(key)]:
            raise ConfigError(f"{at}: {section} without {', '.join(missing)}")
        made = kind(**{k: _check(f"{at}: {section}.{k}", v, hints[k], known[k].metadata) for k, v in row.items()})
        if any(made.name == other.name for other in found):
            raise ConfigError(f"{at}: {section} {made.name!r} is there twice")
        found.append(made)
    return tuple(found)


def lay(text: str, file: str, base: T) -> T:
    """Check one TOML text and lay it over ``base``, a dataclass of sections whose keys are fields with metadata as here."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from error
    config = base
    known_sections = [f.name for f in fields(base) if "rows" not in f.metadata]
    lists = {f.name: f.metadata["rows"] for f in fields(base) if "rows" in f.metadata}
    for section, content in data.items():
        if section in lists and isinstance(content, list):
            found = _rows(lists[section], section, content, text, file, getattr(config, section))
            config = replace(config, **{section: found})
            continue
        if section not in known_sections or not isinstance(content, dict):
            at = f"{file}:{_line_of(text, section, '')}"
            hint = f"[[{section}]], once for each" if section in lists else _nearest(section, known_sections)
            raise ConfigError(f"{at}: unknown section or key {section!r}", hint=hint)
        current = getattr(config, section)
        hints, known = get_type_hints(type(current)), {f.name: f for f in fields(current)}
        changes = {}
        for key, value in content.items():
            at = f"{file}:{_line_of(text, section, key)}"
            if key not in known:
                raise ConfigError(f"{at}: unknown key {section}.{key}", hint=_nearest(key, known))
            changes[key] = _check(f"{at}: {section}.{key}", value, hints[key], known[key].metadata)
        config = replace(config, **{section: replace(current, **changes)})
    return config
