"""``powerctl history --export``: every stored row of a time as CSV or Parquet, in the finest table that still holds it.

House rules: rows are written as they come, a file appears only when it is whole; what was not known is an empty field or a null.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from powerd.errors import RequestError

if TYPE_CHECKING:
    from powerd.client import Client

KINDS = (".csv", ".parquet")
FIXED = ("time_s", "step_s", "uuid")
_CHUNK_S = 7200  # whole hours: no row of a roll-up lies in two
_ROWS = 100_000  # that the daemon reads at once

Row = tuple[float, float, str, tuple[float | None, ...]]


def check(path: Path) -> Path:
    """Refuse a name that says no kind of table, or Parquet that cannot be written, before anything is read."""
    if path.suffix.lower() not in KINDS:
        raise RequestError(f"{path}: an export ends in {' or '.join(KINDS)}", code="bad_value")
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise RequestError(
                "Parquet needs pyarrow", hint="pip install 'powerd[parquet]', or name it .csv", code="bad_value"
            ) from None
    return path


class _Sink(Protocol):
    """One kind of file that is being written."""

    def write(self, columns: Sequence[str], rows: Sequence[Row]) -> None: ...
    def close(self) -> None: ...


class _Csv:
    """Comma separated, one header line."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._columns: tuple[str, ...] = ()

    def write(self, columns: Sequence[str], rows: Sequence[Row]) -> None:
        if not self._columns:
            self._columns = tuple(columns)
            self._writer.writerow((*FIXED, *columns))
        self._writer.writerows(
            (_plain(at_s), _plain(step_s), uuid, *("" if v is None else _plain(v) for v in values))
            for at_s, step_s, uuid, values in rows
        )

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """Columns of doubles, the UUID as a dictionary."""

    def __init__(self, path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        self._arrow: Any = pyarrow
        self._parquet: Any = parquet
        self._path = path
        self._writer: Any = None

    def write(self, columns: Sequence[str], rows: Sequence[Row]) -> None:
        arrow = self._arrow
        double = arrow.float64()
        fields = [("time_s", double), ("step_s", double), ("uuid", arrow.dictionary(arrow.int32(), arrow.string()))]
        schema = arrow.schema([*fields, *((name, double) for name in columns)])
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._path, schema, compression="zstd")
        if rows:
            data = [[r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]]
            data += [[r[3][i] for r in rows] for i in range(len(columns))]
            arrays = [arrow.array(values, type=field.type) for values, field in zip(data, schema, strict=True)]
            self._writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value


@contextmanager
def _whole(path: Path) -> Iterator[_Sink]:
    """A file that takes its name when everything is in it."""
    part = path.with_name(f".{path.name}.part")
    sink: _Sink | None = None
    try:
        sink = _Csv(part) if path.suffix.lower() == ".csv" else _Parquet(part)
        yield sink
        sink.close()
        os.replace(part, path)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            if sink is not None:
                sink.close()
            part.unlink(missing_ok=True)


def write(
    client: Client,
    path: Path,
    gpus: Sequence[str],
    since_s: float,
    until_s: float,
    columns: Sequence[str] | None,
    told: Callable[[int, int], None],
) -> int:
    """Export what is stored of these GPUs (UUIDs) between two Unix times; how many rows there were."""
    chunk_s = max(3600, min(_CHUNK_S, _ROWS // max(1, len(gpus))) // 3600 * 3600)
    edges = [since_s, *_edges(since_s, until_s, chunk_s), until_s]
    count = 0
    with _whole(path) as sink:
        for number, (begin_s, end_s) in enumerate(pairwise(edges), 1):
            view = client.history(list(gpus), since=begin_s, until=end_s, points=chunk_s, columns=columns)
            names = list(view.series[0].columns) if view.series else list(columns or ())
            rows = [
                (at_s, series.step_s, series.uuid, tuple(series.columns[name][i] for name in names))
                for series in view.series
                for i, at_s in enumerate(series.time_s)
            ]
            sink.write(names, rows)
            count += len(rows)
            told(number, len(edges) - 1)
    return count


def _edges(since_s: float, until_s: float, chunk_s: int) -> Iterator[float]:
    edge = (since_s // chunk_s + 1) * chunk_s
    while edge < until_s:
        yield edge
        edge += chunk_s
