"""Request traces: TIMESTAMP, ContextTokens, GeneratedTokens in a CSV -> arrays.

House rules: a row is kept as it is or the file is refused with file, line and column; time is seconds since the trace's origin;
the origin's place in the week is kept, because days and weekends shape load.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from powerd.errors import RequestError

TIME, PROMPT, OUTPUT = COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
WEEK_S: Final = 604_800.0
_CHUNK_ROWS: Final = 200_000
_MONDAY: Final = np.datetime64("1970-01-05", "ns")


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in order of arrival; ``begin_week_s`` is the second of the week (from Monday 00:00 UTC) of time 0."""

    name: str
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    begin_week_s: float = 0.0
    length_s: float = 0.0  # may be longer than the last arrival

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def requests_per_s(self) -> float:
        """Mean rate over its length."""
        return len(self) / self.length_s if self.length_s else 0.0

    def thinned(self, most: int) -> Trace:
        """Every so many-th request, such that there are at most ``most``."""
        step = max(1, -(-len(self) // most))
        return replace(
            self,
            arrival_s=self.arrival_s[::step],
            prompt_tokens=self.prompt_tokens[::step],
            output_tokens=self.output_tokens[::step],
        )

    def between(self, begin_s: float, end_s: float) -> Trace:
        """The requests of [begin_s, end_s), with time 0 at ``begin_s``."""
        first, last = np.searchsorted(self.arrival_s, (begin_s, end_s))
        end_s = min(end_s, self.length_s)
        return replace(
            self, arrival_s=self.arrival_s[first:last] - begin_s, prompt_tokens=self.prompt_tokens[first:last],
            output_tokens=self.output_tokens[first:last], begin_week_s=(self.begin_week_s + begin_s) % WEEK_S,
            length_s=max(0.0, end_s - begin_s),
        )  # fmt: skip


def read(path: Path) -> Trace:
    """Read a CSV (or .csv.gz); RequestError naming file, line and column for whatever is missing, unsorted or no number."""
    try:
        raw = path.read_bytes()
        text = gzip.decompress(raw).decode() if raw[:2] == b"\x1f\x8b" else raw.decode()
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, EOFError) as error:
        raise RequestError(f"{path}: no text, and no gzip of text: {error}", code="bad_value") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Trace:
    """Read a CSV's text; ``name`` is what errors call it. Errors as ``read``."""
    rows = csv.reader(io.StringIO(text))
    header = [cell.strip().removeprefix("\ufeff") for cell in next(rows, [])]
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise RequestError(
            f"{name}:1: no column {', '.join(missing)}", hint=f"the first line has to name {', '.join(COLUMNS)}", code="bad_value"
        )
    places = [header.index(column) for column in COLUMNS]
    parts = [_chunk(name, chunk, places) for chunk in _chunks(rows)]
    if not parts:
        raise RequestError(f"{name}: no requests", hint="it holds a header and nothing else", code="bad_value")
    time = np.concatenate([part[0] for part in parts])
    for number in np.flatnonzero(np.diff(time) < 0)[:1]:
        line = int(np.concatenate([part[3] for part in parts])[number + 1])
        _refuse(name, line, TIME, "earlier than the line above", "sort the file by time")
    arrival_s = (time - time[0]) / np.timedelta64(1, "s")
    begin_week_s = float((time[0] - _MONDAY) / np.timedelta64(1, "s")) % WEEK_S
    prompt, output = (np.concatenate([part[n] for part in parts]) for n in (1, 2))
    # Time ends one mean gap after the last arrival, so that a trace of one request has a length, too.
    span_s = float(arrival_s[-1])
    length_s = span_s + (span_s / (len(time) - 1) if len(time) > 1 and span_s else 1.0)
    return Trace(Path(name).name.split(".")[0], arrival_s, prompt, output, begin_week_s, length_s)


def write(path: Path, trace: Trace) -> None:
    """Write a trace as a CSV that ``read`` reads (gzip when the name ends in .gz); its week begins on Monday 1 January 2024."""
    start = np.datetime64("2024-01-01", "ns") + np.timedelta64(round(trace.begin_week_s * 1e9), "ns")
    stamps = np.datetime_as_string(start + (trace.arrival_s * 1e9).round().astype("timedelta64[ns]"), unit="us")
    lines = [
        ",".join(COLUMNS),
        *(f"{at},{p},{o}" for at, p, o in zip(stamps, trace.prompt_tokens, trace.output_tokens, strict=True)),
    ]
    body = ("\n".join(lines) + "\n").encode()
    try:
        path.write_bytes(gzip.compress(body, mtime=0) if path.suffix == ".gz" else body)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None


def _chunks(rows: Any) -> Iterator[list[tuple[int, list[str]]]]:
    numbered = ((rows.line_num, row) for row in rows if row)
    while chunk := list(islice(numbered, _CHUNK_ROWS)):
        yield chunk


def _chunk(name: str, chunk: list[tuple[int, list[str]]], places: list[int]) -> tuple[Any, Any, Any, Any]:
    for line, row in chunk:
        if len(row) <= max(places):
            _refuse(name, line, next(c for c, n in zip(COLUMNS, places, strict=True) if n >= len(row)), "the row ends before it")
    cells = [[row[n].strip() for _, row in chunk] for n in places]
    lines = [line for line, _ in chunk]
    prompt, output = (_tokens(name, lines, cells[n], COLUMNS[n]) for n in (1, 2))
    return _times(name, lines, cells[0]), prompt, output, np.array(lines)


def _times(name: str, lines: list[int], cells: list[str]) -> NDArray[np.datetime64]:
    try:
        return _stamps(cells)
    except ValueError:
        for line, cell in zip(lines, cells, strict=True):
            try:
                _stamps([cell])
            except ValueError:
                _refuse(name, line, TIME, f"{cell!r} is no time", "UTC such as 2023-11-16 18:15:46.68, or seconds")
        _refuse(name, lines[0], TIME, "dates and plain seconds are mixed")


def _stamps(cells: list[str]) -> NDArray[np.datetime64]:
    """ISO dates (UTC), or plain seconds from Monday 5 January 1970 00:00, to the nanosecond."""
    if cells[0].replace(".", "", 1).replace("e", "", 1).isdigit() and len(cells[0]) != 4:
        seconds = np.array(cells, dtype=np.float64)
        if not np.isfinite(seconds).all() or np.abs(seconds).max(initial=0.0) > 9e9:
            raise ValueError(cells)
        return _MONDAY + (seconds * 1e9).round().astype("timedelta64[ns]")
    found = np.array(
        [cell.removesuffix("Z").removesuffix("+00:00").removesuffix("+00") for cell in cells], dtype="datetime64[ns]"
    )
    if np.isnat(found).any():
        raise ValueError(cells)
    return found


def _tokens(name: str, lines: list[int], cells: list[str], column: str) -> NDArray[np.int32]:
    least = 1  # a request without an answer still answers with one token
    try:
        found = np.array(cells, dtype=np.int64)
    except (ValueError, OverflowError):
        found = None
    if found is None or found.min() < least or found.max() > 2**31 - 1:
        for line, cell in zip(lines, cells, strict=True):
            if not (cell.isascii() and cell.isdigit() and least <= int(cell) < 2**31):
                _refuse(name, line, column, f"{cell!r} is no number of tokens", f"a whole number from {least}")
    assert found is not None
    return found.astype(np.int32)


def _refuse(name: str, line: int, column: str, what: str, hint: str = "") -> NoReturn:
    raise RequestError(f"{name}:{line}: {column}: {what}", hint=hint, code="bad_value")
