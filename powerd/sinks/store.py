"""The embedded store: history of every GPU in one SQLite file, always on, no server needed.

House rules: ``append`` never waits and never raises; readers have connections of their own and never scan more than about
100,000 rows; the finest table that answers cheaply is picked by the range, never by the caller.
"""

from __future__ import annotations

import difflib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from powerd.api import HistorySeries, HistoryView, LeaseView
from powerd.clock import Clock
from powerd.config import StoreConfig
from powerd.errors import RequestError, UnavailableError
from powerd.jobs import JobRow, Record
from powerd.model import Event, Snapshot
from powerd.records import HostLoad, JobStepRow, LeaseRow
from powerd.sinks import jobtables
from powerd.sinks.columns import BY_NAME, COLUMNS, TABLES, BitsOr, Column, Kind, select
from powerd.sinks.writer import Writer

MAX_SCAN_ROWS = 100_000
MAX_POINTS = 10_000
DEFAULT_COLUMNS = ("power_mw", "sm_clock_mhz", "energy_mj", "temperature_c", "utilization_percent")
_OPEN_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class StoreStats:
    """How the store is doing."""

    rows: int  # written since start
    dropped: int  # rows, events and leases that were lost to a full queue
    errors: int  # failed rounds of writing
    quarantined: int  # corrupt files put aside
    backlog: int  # snapshots, events and leases that wait for the writer
    size_bytes: int
    problem: str  # empty when all is well


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A column as a caller names it: a model name, or the minimum or maximum of one."""

    name: str
    column: Column
    part: str  # mean, min, max, last


def _wanted(names: Sequence[str]) -> tuple[_Wanted, ...]:
    valid = {c.name: _Wanted(c.name, c, "mean" if c.kind is Kind.MEAN else "last") for c in COLUMNS}
    for column in COLUMNS:
        if column.kind is Kind.MEAN:
            valid.update({f"{column.name}_{p}": _Wanted(f"{column.name}_{p}", column, p) for p in ("min", "max")})
    for name in names:
        if name not in valid:
            near = difflib.get_close_matches(name, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(BY_NAME)}"
            raise RequestError(f"unknown history column {name!r}", code="bad_value", hint=hint)
    return tuple(valid[name] for name in dict.fromkeys(names))


def _value(wanted: _Wanted, stored: dict[str, int | None]) -> float | None:
    column = wanted.column
    if column.kind is not Kind.MEAN:
        value = stored[column.name]
        return None if value is None else float(value * column.scale)
    count = stored[f"{column.name}_n"]
    part = stored[f"{column.name}_{'sum' if wanted.part == 'mean' else wanted.part}"]
    if not count or part is None:
        return None
    return part * column.scale / (count if wanted.part == "mean" else 1)


class Store:
    """One node's history; ``append`` from the daemon's loop, read from any thread."""

    def __init__(self, path: Path, config: StoreConfig, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._writer = Writer(path, config)

    def append(self, snapshot: Snapshot) -> None:
        """Store one snapshot (kept at 1 Hz); never waits, never raises."""
        self._writer.put(snapshot)

    def append_event(self, event: Event) -> None:
        """Store one event; never waits, never raises."""
        self._writer.put(event)

    def append_lease(self, lease: LeaseView) -> None:
        """Store a lease's present state; never waits, never raises."""
        self._writer.put((self._clock.wall_ns(), lease))

    def append_job(self, record: Record) -> None:
        """Store what a job reported; never waits, never raises."""
        self._writer.put(record)

    def append_load(self, load: HostLoad) -> None:
        """Store the host's load; never waits, never raises."""
        self._writer.put(load)

    def loads(self, since_s: float, until_s: float, points: int = 500) -> tuple[HostLoad, ...]:
        """The host's stored load of a range, oldest first, the last of each of at most ``points`` buckets; UnavailableError."""
        since, until = int(since_s), -int(-until_s // 1)
        limits = {"since": since, "until": until, "step": max(1, -(-(until - since) // max(1, points)))}
        sql = "SELECT *, max(ts) FROM node WHERE ts >= :since AND ts < :until GROUP BY ts / :step ORDER BY ts"
        with self._reading() as connection:
            found = connection.execute(sql, limits).fetchall()

        def scaled(value: int | None) -> float | None:
            return None if value is None else value / 1000

        def bytes_of(value: int | None) -> int | None:
            return None if value is None else value << 20

        return tuple(
            HostLoad(ts * 10**9, scaled(cpu), scaled(load), bytes_of(used), bytes_of(size), (), scaled(cpu_mj), scaled(dram_mj))
            for ts, cpu, load, used, size, cpu_mj, dram_mj, _ in found
        )

    def jobs(self) -> tuple[list[JobRow], list[JobStepRow]]:
        """The newest jobs and the newest retained steps of each, oldest first; UnavailableError."""
        with self._reading() as connection:
            return jobtables.load(connection)

    def job_steps(self, job: str, limit: int) -> list[JobStepRow]:
        """The newest retained steps of one job, oldest first; UnavailableError."""
        with self._reading() as connection:
            return jobtables.steps_of(connection, job, limit)

    def leases(self, since_s: float, until_s: float, limit: int = 1000) -> tuple[LeaseRow, ...]:
        """Leases whose last change falls into this time, newest first; UnavailableError."""
        sql = ("SELECT id, wall_ns, state, ending, uid, job, reason, gpus FROM leases WHERE wall_ns >= ? AND wall_ns < ? "
               "ORDER BY wall_ns DESC, id LIMIT ?")  # fmt: skip
        with self._reading() as connection:
            found = connection.execute(sql, (round(since_s * 1e9), round(until_s * 1e9), limit)).fetchall()
        return tuple(
            LeaseRow(name, wall, state, ending, uid, job, reason, tuple(json.loads(gpus)))
            for name, wall, state, ending, uid, job, reason, gpus in found
        )

    def stats(self) -> StoreStats:
        """Counters since start and the size of the file with its log."""
        counts = self._writer.counts
        size = 0
        for suffix in ("", "-wal"):
            try:
                size += Path(f"{self._path}{suffix}").stat().st_size
            except OSError:
                continue
        backlog = self._writer.backlog
        return StoreStats(counts.rows, counts.dropped, counts.errors, counts.quarantined, backlog, size, counts.problem)

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is there and end; what cannot be written in time is lost."""
        self._writer.flush(timeout_s)

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """A connection of the caller's own; whatever SQLite has against it is an UnavailableError."""
        if not self._writer.ready.wait(_OPEN_TIMEOUT_S) or not self._path.exists():
            raise UnavailableError("the store is not open", hint=self._writer.counts.problem or "try again")
        try:
            with closing(sqlite3.connect(f"file:{quote(str(self._path))}?mode=ro", uri=True, timeout=2.0)) as connection:
                connection.create_aggregate("bits_or", 1, BitsOr)  # type: ignore[arg-type]
                yield connection
        except sqlite3.Error as error:
            raise UnavailableError(f"the store cannot be read: {error}", hint="powerctl doctor says more") from error

    def history(
        self,
        gpus: Sequence[str],
        since_s: float,
        until_s: float,
        points: int = 500,
        columns: Sequence[str] = DEFAULT_COLUMNS,
    ) -> HistoryView:
        """At most ``points`` buckets a GPU over a range of Unix seconds; RequestError ``bad_value``, or UnavailableError."""
        wanted = _wanted(columns)
        if not since_s < until_s:
            raise RequestError("since must be before until", code="bad_value")
        if not 1 <= points <= MAX_POINTS:
            raise RequestError(f"points must be 1..{MAX_POINTS}", code="bad_value")
        needed = tuple(dict.fromkeys(w.column for w in wanted))
        since, until = int(since_s), int(-(-until_s // 1))
        with self._reading() as connection:
            numbers = dict(_numbers(connection))
            known = [numbers[uuid] for uuid in gpus if uuid in numbers]
            table, first = _pick(connection, known, since, until)
            step = TABLES[table]
            bucket = max(step, -(-(until - first) // points))
            bucket = -(-bucket // step) * step
            series = [_series(connection, uuid, numbers.get(uuid), table, needed, wanted, first, until, bucket) for uuid in gpus]
        return HistoryView(table, float(since), float(until), tuple(series))

    def rows(
        self, gpus: Sequence[str], since_s: float, until_s: float, columns: Sequence[str] = DEFAULT_COLUMNS, table: str = "raw"
    ) -> Iterator[tuple[float, str, *tuple[float | None, ...]]]:
        """Every stored row for export: (Unix seconds, UUID, one value a column), GPU by GPU; reads as it is asked for."""
        wanted = _wanted(columns)
        if table not in TABLES:
            raise RequestError(f"unknown table {table!r}", code="bad_value", hint=f"one of {', '.join(TABLES)}")
        needed = tuple(dict.fromkeys(w.column for w in wanted))
        names = [name for column in needed for name in column.stored()]
        with self._reading() as connection:
            numbers = dict(_numbers(connection))
            for uuid in gpus:
                if uuid not in numbers:
                    continue
                limits = {"gpu": numbers[uuid], "since": int(since_s), "until": int(-(-until_s // 1)), "step": TABLES[table]}
                for _, ts, *values in connection.execute(select(table, needed, one_gpu=True), limits):
                    stored = dict(zip(names, values, strict=True))
                    yield float(ts), uuid, *(_value(w, stored) for w in wanted)

    def events(self, since_s: float, until_s: float, limit: int = 1000) -> tuple[Event, ...]:
        """Stored events of a range, oldest first; their ``seq`` is the store's own, ``time_ns`` is not kept (0)."""
        sql = "SELECT * FROM events WHERE wall_ns >= ? AND wall_ns < ? ORDER BY wall_ns, id LIMIT ?"
        with self._reading() as connection:
            found = connection.execute(sql, (round(since_s * 1e9), round(until_s * 1e9), limit)).fetchall()
        return tuple(
            Event(n, 0, wall, kind, uuid, subject, detail, json.loads(data))
            for n, wall, kind, uuid, subject, detail, data in found
        )


def _numbers(connection: sqlite3.Connection) -> list[tuple[str, int]]:
    return connection.execute("SELECT uuid, id FROM gpus").fetchall()


def _pick(connection: sqlite3.Connection, gpus: Sequence[int], since: int, until: int) -> tuple[str, int]:
    """The finest table that holds the whole range (or as much of it as any) within MAX_SCAN_ROWS, and where the data begin."""
    oldest: dict[str, int] = {}
    for table in TABLES:
        firsts = [connection.execute(f"SELECT min(ts) FROM {table} WHERE gpu = ?", (g,)).fetchone()[0] for g in gpus]  # noqa: S608
        oldest[table] = min((f for f in firsts if f is not None), default=until)
    begin = max(since, min(oldest.values()))
    for table, step in TABLES.items():
        coarser = [s for t, s in TABLES.items() if oldest[t] < oldest[table] and s > step]
        # A roll-up's first bucket begins before the first row that is in it: that is no older data.
        covers = oldest[table] - begin < (max(coarser) if coarser else 1) or oldest[table] <= since
        if covers and len(gpus) * (until - begin) // step <= MAX_SCAN_ROWS:
            return table, begin
    if len(gpus) * (until - begin) // TABLES["r3600"] > 4 * MAX_SCAN_ROWS:
        raise RequestError("the range is too long for so many GPUs", code="bad_value", hint="ask for fewer GPUs or a later start")
    return "r3600", begin


def _series(
    connection: sqlite3.Connection,
    uuid: str,
    number: int | None,
    table: str,
    needed: Sequence[Column],
    wanted: Sequence[_Wanted],
    since: int,
    until: int,
    bucket: int,
) -> HistorySeries:
    names = [name for column in needed for name in column.stored()]
    limits = {"gpu": number, "since": since // TABLES[table] * TABLES[table], "until": until, "step": bucket}
    found = [] if number is None else connection.execute(select(table, needed, one_gpu=True), limits).fetchall()
    stored = [dict(zip(names, row[2:], strict=True)) for row in found]
    return HistorySeries(
        uuid=uuid,
        step_s=float(bucket),
        time_s=tuple(float(row[1]) for row in found),
        columns={w.name: tuple(_value(w, values) for values in stored) for w in wanted},
    )
