"""Reads and writes engine models as text: a header of TOML in comment lines, then one CSV row per (tensor parallelism, SM clock).

House rules: ``parse(dump(model)) == model`` to the last bit; a bad cell is an error that names line and column, never skipped;
columns are the names of ``Coefficients``, so that a table is read by its head.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path

from powerd.errors import RequestError
from powerd_policies.dynamollm.engine_model import Coefficients, EngineModel

FIELDS = tuple(field.name for field in dataclasses.fields(Coefficients))
COLUMNS = ("tp", "clock_mhz", *FIELDS)


def load(source: Path | str) -> EngineModel:
    """Return the engine model of a file given as a path or (with a line break in it) as text; RequestError as ``parse``."""
    if isinstance(source, str) and "\n" in source:
        return parse(source)
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot read the engine model {source}: {reason}", code="bad_value") from error
    return parse(text, str(source))


def parse(text: str, name: str = "engine model") -> EngineModel:
    """Return the engine model that ``text`` holds; RequestError naming line and column of what cannot be one."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    head = _head("\n".join(line[1:].strip() for line in lines[:start]), name)
    reader = csv.reader(io.StringIO("\n".join(lines[start:])))
    columns = tuple(word.strip() for word in next(reader, []))
    if columns != COLUMNS:
        raise _bad(f"{name}: line {start + 1}: the columns are {','.join(columns) or 'missing'}", f"write {','.join(COLUMNS)}")
    table: dict[tuple[int, int], Coefficients] = {}
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        place = f"{name}: line {start + reader.line_num}"
        if len(cells) != len(COLUMNS):
            raise _bad(f"{place} has {len(cells)} cells", f"columns are {','.join(COLUMNS)}")
        values = {column: _number(cell, f"{place}: {column}") for column, cell in zip(COLUMNS, cells, strict=True)}
        tp, clock_mhz = values.pop("tp"), values.pop("clock_mhz")
        if tp != int(tp) or clock_mhz != int(clock_mhz) or tp < 1 or clock_mhz < 1:
            raise _bad(f"{place}: tp {tp:g} and clock_mhz {clock_mhz:g} must be whole numbers above zero")
        if (key := (int(tp), int(clock_mhz))) in table:
            raise _bad(f"{place}: TP{key[0]} at {key[1]} MHz is there twice", "keep one row")
        table[key] = Coefficients(**values)
    if not table:
        raise _bad(f"{name} has no rows")
    model = EngineModel(head.name, head.gpu, table, head.kv_tokens, head.weights_bytes, head.off_w, head.origin)
    if missing := [tp for tp in model.tps if tp not in head.kv_tokens]:
        raise _bad(f"{name}: kv_tokens does not hold TP{missing[0]}", "say how many tokens of context fit each parallelism")
    return model


def dump(model: EngineModel) -> str:
    """Return the text of ``model``, which ``parse`` takes; rows by parallelism, the highest clock first."""
    kv_tokens = ", ".join(f"{tp} = {tokens}" for tp, tokens in sorted(model.kv_tokens.items()))
    head = {
        "name": _quoted(model.name),
        "gpu": _quoted(model.gpu),
        "weights_bytes": str(model.weights_bytes),
        "off_w": repr(float(model.off_w)),
        "kv_tokens": f"{{ {kv_tokens} }}",
        "origin": _quoted(model.origin),
    }
    lines = [f"# {key} = {value}" for key, value in head.items()]
    lines.append(",".join(COLUMNS))
    for tp in model.tps:
        for clock_mhz in model.clocks_mhz(tp):
            row = model.table[tp, clock_mhz]
            lines.append(",".join([str(tp), str(clock_mhz), *(repr(float(getattr(row, name))) for name in FIELDS)]))
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True, slots=True)
class _Head:
    name: str
    gpu: str
    weights_bytes: int
    off_w: float
    kv_tokens: Mapping[int, int]
    origin: str


def _head(text: str, name: str) -> _Head:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _bad(f"{name}: the header (its first lines, behind #) is not TOML: {error}") from error
    for field in dataclasses.fields(_Head):
        if field.name not in values:
            raise _bad(f"{name}: the header lacks {field.name}", "powerd_policies.dynamollm build writes it")
    kv_tokens = values["kv_tokens"]
    if not isinstance(kv_tokens, dict) or not all(
        tp.isdigit() and isinstance(n, int) and not isinstance(n, bool) and n >= 0 for tp, n in kv_tokens.items()
    ):
        raise _bad(
            f"{name}: the header's kv_tokens is {kv_tokens}", "write { 2 = 18310, 4 = 457763 }: tensor parallelism = tokens"
        )
    return _Head(
        str(values["name"]),
        str(values["gpu"]),
        int(_number(str(values["weights_bytes"]), f"{name}: weights_bytes")),
        _number(str(values["off_w"]), f"{name}: off_w"),
        {int(tp): n for tp, n in kv_tokens.items()},
        str(values["origin"]),
    )


def _number(cell: str, place: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        raise _bad(f"{place} is {cell.strip()!r}, which is no number") from None
    if not math.isfinite(number) or number < 0:
        raise _bad(f"{place} is {cell.strip()}", "it must be finite and not below zero")
    return number


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # a JSON string is a TOML basic string, but for DEL


def _bad(message: str, hint: str = "") -> RequestError:
    return RequestError(message, hint=hint, code="bad_value")
