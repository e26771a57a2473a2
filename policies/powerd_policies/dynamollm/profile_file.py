"""Reads and writes profiles as CSV: one row per (class, tensor parallelism, clock, load).

House rules: a bad cell is an error that names file, line and column, never skipped; rows may come in any order; what was written
is read back to the last bit.
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import get_args

from powerd.errors import RequestError
from powerd_policies.dynamollm.classes import NAMES
from powerd_policies.dynamollm.profile import Profile, ProfilePoint, Source

COLUMNS = (
    "class", "tp", "clock_mhz", "requests_per_s", "energy_per_request_j", "ttft_p99_s", "tbt_p99_s", "power_w",
    "feasible", "source",
)  # fmt: skip
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def load(source: Path | str) -> Profile:
    """Return the profile of a file given as a path or (with a line break in it) as text; RequestError as ``parse``."""
    if isinstance(source, str) and "\n" in source:
        return parse(source)
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot read the profile {source}: {reason}", code="bad_value") from error
    return parse(text, str(source))


def parse(text: str, name: str = "profile") -> Profile:
    """Return the profile that ``text`` holds; columns in any order, ``source`` may be left out (then: measured).

    RequestError naming line and column of what is missing, no number, not finite, negative, or there twice.
    """
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    header = [word.strip() for word in next(reader, [])]
    if missing := [column for column in COLUMNS if column not in header and column != "source"]:
        raise _bad(f"{name}: line 1 lacks the column {missing[0]}", f"it needs {','.join(COLUMNS)}")
    if unknown := [column for column in header if column not in COLUMNS]:
        raise _bad(f"{name}: line 1 has an unknown column {unknown[0]!r}", f"columns are {','.join(COLUMNS)}")
    points: list[ProfilePoint] = []
    lines: dict[tuple[str, int, int, float], int] = {}
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                place = f"{name}: line {reader.line_num}"
                if len(cells) != len(header):
                    raise _bad(f"{place} has {len(cells)} cells, the first line {len(header)}")
                point = _point(dict(zip(header, (cell.strip() for cell in cells), strict=True)), place)
                key = (point.request_class, point.tp, point.clock_mhz, point.requests_per_s)
                if key in lines:
                    raise _bad(f"{place} is there already, in line {lines[key]}", "keep one row per load, or their median")
                lines[key] = reader.line_num
                points.append(point)
    except csv.Error as error:
        raise _bad(f"{name}: line {reader.line_num}: {error}") from error
    if not points:
        raise _bad(f"{name} has no rows")
    return Profile(points)


def dump(profile: Profile) -> str:
    """Return the text of ``profile``, which ``parse`` takes."""
    lines = [",".join(COLUMNS)]
    for p in profile.points:
        numbers = (p.requests_per_s, p.energy_per_request_j, p.ttft_p99_s, p.tbt_p99_s, p.power_w)
        cells = [p.request_class, str(p.tp), str(p.clock_mhz), *map(repr, numbers), "true" if p.feasible else "false", p.source]
        lines.append(",".join(cells))
    return "\n".join(lines) + "\n"


def _point(cells: dict[str, str], place: str) -> ProfilePoint:
    if cells["class"] not in NAMES:
        raise _bad(f"{place}: class is {cells['class']!r}", f"classes are {', '.join(NAMES)}")
    if cells["feasible"].lower() not in _WORDS:
        raise _bad(f"{place}: feasible is {cells['feasible']!r}", "write true or false")
    source = cells.get("source", "measured")
    if source not in get_args(Source):
        raise _bad(f"{place}: source is {source!r}", f"write {', '.join(get_args(Source))}")
    numbers = {column: _number(cells[column], f"{place}: {column}") for column in COLUMNS[1:-2]}
    for column in ("tp", "clock_mhz"):
        if numbers[column] != int(numbers[column]):
            raise _bad(f"{place}: {column} is {cells[column]}", "it must be a whole number")
    typed: Source = "measured" if source == "measured" else "modelled" if source == "modelled" else "interpolated"
    return ProfilePoint(
        cells["class"],
        int(numbers["tp"]),
        int(numbers["clock_mhz"]),
        numbers["requests_per_s"],
        numbers["energy_per_request_j"],
        numbers["ttft_p99_s"],
        numbers["tbt_p99_s"],
        numbers["power_w"],
        _WORDS[cells["feasible"].lower()],
        typed,
    )


def _number(text: str, place: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise _bad(f"{place} is {text!r}, which is no number") from None
    if not math.isfinite(number):
        raise _bad(f"{place} is {text}", "measure it again or leave the row out")
    if number <= 0:
        raise _bad(f"{place} is {text}", "it must be above zero")
    return number


def _bad(message: str, hint: str = "") -> RequestError:
    return RequestError(message, hint=hint, code="bad_value")
