"""The thread that writes the embedded store: seconds from snapshots, roll-ups, retention.

House rules: nothing here raises into the daemon, it degrades and counts; a second, a minute and its roll-up are each one
transaction, so that SIGKILL leaves a consistent file; a file that SQLite calls corrupt is put aside, never repaired in place.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from powerd.api import LeaseView
from powerd.config import StoreConfig
from powerd.jobs import JobRestored, JobRow, Record
from powerd.model import Event, Reading, Snapshot
from powerd.records import HostLoad, JobStepRow
from powerd.sinks import jobtables, sqlitefile
from powerd.sinks.columns import COLUMNS, BitsOr, Kind, insert_raw, roll_up, schema

_QUEUE = 4096  # snapshots, events and leases on their way: minutes at 10 Hz
_PENDING_ROWS = 50_000  # kept while the disk refuses them
_BATCH = 64  # a fuller queue wakes the writer before its second is over
_DAY = 86_400
RETRY_ROUNDS = 5  # seconds between two tries while the file cannot be written
_FIELDS = attrgetter(*(column.name for column in COLUMNS))
_INSERT = insert_raw()
_EVENT = "INSERT INTO events (wall_ns, kind, uuid, subject, detail, data) VALUES (?, ?, ?, ?, ?, ?)"
_ALL_TABLES = ("raw", "r60", "r3600", "events", "leases", "node", "meta", *jobtables.TABLES)
_LEASE = "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?, ?, ?)"


# Of old rows the last of each minute stays: energy is a counter, and that is the row that a longer step is read from.
_THIN_NODE = """DELETE FROM node WHERE ts < :before
    AND ts NOT IN (SELECT max(ts) FROM node WHERE ts < :before GROUP BY ts / 60)"""
_NODE = "INSERT OR REPLACE INTO node VALUES (?, ?, ?, ?, ?, ?, ?)"
Item = Snapshot | Event | Record | HostLoad | tuple[int, LeaseView]


@dataclass(slots=True)
class Counts:
    """What happened to data; written by the writer thread, ``dropped`` also by those who append."""

    rows: int = 0
    dropped: int = 0
    errors: int = 0
    quarantined: int = 0
    problem: str = ""  # the present one, empty when all is well


def fold(readings: Sequence[Reading]) -> tuple[int | None, ...] | None:
    """One GPU's readings of one second as one stored row, or ``None`` when nothing was known."""
    row: list[int | None] = []
    for column, values in zip(COLUMNS, zip(*map(_FIELDS, readings), strict=True), strict=True):
        known = [v for v in values if v is not None]
        if not known:
            row.append(None)
        elif column.kind is Kind.MEAN:
            row.append(round(sum(known) / len(known) / column.scale))
        elif column.kind is Kind.LAST:
            row.append(round(known[-1] / column.scale) if column.scale > 1 else known[-1])
        else:
            bits = 0
            for value in known:
                bits |= value
            row.append(bits)
    return tuple(row) if any(v is not None and c.name != "epoch" for v, c in zip(row, COLUMNS, strict=True)) else None


class Writer:
    """Owns the writing connection and its thread."""

    def __init__(self, path: Path, config: StoreConfig) -> None:
        self.path = path
        self.counts = Counts()
        self.ready = threading.Event()  # set once the file is open, or has failed to
        self._config = config
        self._queue: deque[Item] = deque()
        self._wake = threading.Event()
        self._wake.set()  # open the file at once
        self._stopping = False
        self._connection: sqlite3.Connection | None = None
        self._gpus: dict[str, int] = {}
        self._second = -1
        self._open: dict[str, list[Reading]] = {}
        self._rows: deque[tuple[str, int, tuple[int | None, ...]]] = deque()
        self._records: deque[tuple[str, tuple[object, ...]]] = deque()
        self._retry_in = 0
        self._minute = 0
        self._newest = 0
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def put(self, item: Item) -> None:
        """Hand over without waiting; when the writer is far behind the item is dropped and counted."""
        if self._stopping or len(self._queue) >= _QUEUE:
            self.counts.dropped += 1
            return
        self._queue.append(item)
        if len(self._queue) >= _BATCH:
            self._wake.set()

    @property
    def backlog(self) -> int:
        """How many items wait for the thread."""
        return len(self._queue)

    def flush(self, timeout_s: float) -> None:
        """Write what is there, the unfinished second too, and end the thread."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            self._wake.wait(1.0)
            self._wake.clear()
            stopping = self._stopping
            self._drain()
            if stopping:
                self._close_second()
            if self._retry_in > 0 and not stopping:
                self._retry_in -= 1
            else:
                self._guarded()
            self.ready.set()
            if stopping:
                self._shut()
                return

    def _drain(self) -> None:
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, Snapshot):
                second = item.wall_ns // 1_000_000_000
                if second != self._second:
                    self._close_second()
                    self._second = second
                for reading in item.readings:
                    self._open.setdefault(reading.uuid, []).append(reading)
            elif isinstance(item, Event):
                data = json.dumps(dict(item.data), separators=(",", ":"))
                self._record(_EVENT, (item.wall_ns, item.kind, item.uuid, item.subject, item.detail, data))
            elif isinstance(item, (JobStepRow, JobRestored, JobRow)):
                self._record(*jobtables.statement(item))
            elif isinstance(item, HostLoad):
                self._record(_NODE, _node_row(item))
            else:
                wall_ns, lease = item
                gpus = json.dumps(lease.gpus, separators=(",", ":"))
                ending = None if lease.end is None else str(lease.end)
                self._record(_LEASE, (lease.id, wall_ns, str(lease.state), ending, lease.uid, lease.job, lease.reason, gpus))

    def _record(self, sql: str, values: tuple[object, ...]) -> None:
        self._records.append((sql, values))
        if len(self._records) > _QUEUE:
            self._records.popleft()
            self.counts.dropped += 1

    def _close_second(self) -> None:
        for uuid, readings in self._open.items():
            if (row := fold(readings)) is not None:
                self._rows.append((uuid, self._second, row))
        self._open.clear()
        while len(self._rows) > _PENDING_ROWS:
            self._rows.popleft()
            self.counts.dropped += 1

    def _guarded(self) -> None:
        """One round of writing; trouble is noted and tried again later."""
        try:
            connection = self._connect()
            self._write(connection)
            self._maintain(connection)
            self.counts.problem = ""
        except (sqlite3.Error, OSError) as error:
            self.counts.errors += 1
            self.counts.problem = f"{self.path}: {error}"
            self._retry_in = RETRY_ROUNDS
            if sqlitefile.is_corrupt(error) and self._quarantine():
                self._guarded()  # into the new file; a second corruption at once means that there is none

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        connection = sqlite3.connect(self.path, timeout=2.0, isolation_level=None)
        try:
            if fresh:
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                os.chmod(self.path, 0o640)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA wal_autocheckpoint = 500")
            connection.create_aggregate("bits_or", 1, BitsOr)  # type: ignore[arg-type]
            connection.executescript(schema() + jobtables.schema())
            self._gpus = {uuid: number for number, uuid in connection.execute("SELECT id, uuid FROM gpus")}
            for table in _ALL_TABLES:  # a torn file shows here rather than an hour later
                connection.execute(f"SELECT * FROM {table} LIMIT 1").fetchall()  # noqa: S608 (constants)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _quarantine(self) -> bool:
        """Put a corrupt file aside under a name that tells when, so that a new one can be begun."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        try:
            if not sqlitefile.set_aside(self.path):
                return False
        except OSError as error:
            self.counts.problem = f"{error.filename}: {error.strerror}"
            return False
        self.counts.quarantined += 1
        return True

    def _gpu(self, connection: sqlite3.Connection, uuid: str) -> int:
        number = self._gpus.get(uuid)
        if number is None:
            connection.execute("INSERT OR IGNORE INTO gpus (uuid) VALUES (?)", (uuid,))
            number = int(connection.execute("SELECT id FROM gpus WHERE uuid = ?", (uuid,)).fetchone()[0])
        return number

    def _write(self, connection: sqlite3.Connection) -> None:
        if not self._rows and not self._records:
            return
        rows, records = list(self._rows), list(self._records)
        connection.execute("BEGIN IMMEDIATE")
        try:
            numbers = {uuid: self._gpu(connection, uuid) for uuid, _, _ in rows}
            connection.executemany(_INSERT, [(numbers[uuid], second, *values) for uuid, second, values in rows])
            for sql, values in records:
                connection.execute(sql, values)
            if rows:
                self._newest = max(second for _, second, _ in rows)
                earliest = min(second for _, second, _ in rows)
                # A wall clock that stepped back: what was rolled up from there on is rolled up again.
                connection.execute(
                    "UPDATE meta SET value = min(value, CASE key WHEN 'r60' THEN ? / 60 * 60 ELSE ? / 3600 * 3600 END) "
                    "WHERE key IN ('r60', 'r3600')",
                    (earliest, earliest),
                )
            connection.execute("COMMIT")
        except BaseException:
            _rollback(connection)
            raise
        self._gpus.update(numbers)
        for _ in rows:
            self._rows.popleft()
        for _ in records:
            self._records.popleft()
        self.counts.rows += len(rows)

    def _maintain(self, connection: sqlite3.Connection) -> None:
        minute = self._newest // 60
        if minute == self._minute:
            return
        self._roll(connection, "raw", "r60", 60)
        self._roll(connection, "r60", "r3600", 3600)
        config = self._config
        for table, keep_s in (
            ("raw", config.raw_hours * 3600),
            ("r60", config.minute_days * _DAY),
            ("r3600", config.hour_days * _DAY),
        ):
            self._expire(connection, table, int(self._newest - keep_s))
        for table in ("events", "leases"):
            before_ns = (self._newest - int(config.hour_days * _DAY)) * 1_000_000_000
            connection.execute(f"DELETE FROM {table} WHERE wall_ns < ?", (before_ns,))  # noqa: S608 (constants)
        connection.execute("DELETE FROM node WHERE ts < ?", (int(self._newest - config.minute_days * _DAY),))
        connection.execute(_THIN_NODE, {"before": int(self._newest - config.raw_hours * 3600) // 60 * 60})
        steps_s, jobs_s = (self._newest - int(days * _DAY) for days in (config.minute_days, config.hour_days))
        jobtables.expire(connection, steps_s * 1_000_000_000, jobs_s * 1_000_000_000)
        connection.executescript("PRAGMA incremental_vacuum(64)")  # execute() would stop after the first page
        self._minute = minute

    def _roll(self, connection: sqlite3.Connection, source: str, target: str, step: int) -> None:
        """Sum up all whole buckets since the last roll-up, at most a day of rows a transaction."""
        row = connection.execute("SELECT value FROM meta WHERE key = ?", (target,)).fetchone()
        if row is None:
            row = connection.execute(f"SELECT min(ts) FROM {source}").fetchone()  # noqa: S608 (constants)
        if row[0] is None:
            return
        since, end = row[0] // step * step, self._newest // step * step
        while since < end:
            until = min(end, since + max(_DAY, step))
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.execute(roll_up(source, target), {"step": step, "since": since, "until": until})
                connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (target, until))
                connection.execute("COMMIT")
            except BaseException:
                _rollback(connection)
                raise
            since = until

    def _expire(self, connection: sqlite3.Connection, table: str, before: int) -> None:
        """Delete what is too old, at most a few minutes' worth of rows a GPU and step."""
        for number in self._gpus.values():
            (oldest,) = connection.execute(f"SELECT min(ts) FROM {table} WHERE gpu = ?", (number,)).fetchone()  # noqa: S608
            if oldest is not None and oldest < before:
                step = {"raw": 600, "r60": _DAY, "r3600": 30 * _DAY}[table]
                sql = f"DELETE FROM {table} WHERE gpu = ? AND ts < ?"  # noqa: S608 (constants)
                connection.execute(sql, (number, min(before, oldest + step)))

    def _shut(self) -> None:
        if self._connection is not None:
            sqlitefile.close(self._connection)


def _node_row(load: HostLoad) -> tuple[object, ...]:
    """The host's load as stored: scaled integers, as the GPUs' columns."""
    pairs = (
        (load.cpu_ratio, 1000.0),
        (load.load_1min, 1000.0),
        (load.memory_used_bytes, 2.0**-20),
        (load.memory_size_bytes, 2.0**-20),
        (load.cpu_energy_j, 1000.0),
        (load.dram_energy_j, 1000.0),
    )
    return (load.wall_ns // 1_000_000_000, *(None if value is None else round(value * factor) for value, factor in pairs))


def _rollback(connection: sqlite3.Connection) -> None:
    """Undo an open transaction; after some errors SQLite has done so itself."""
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    except sqlite3.Error:
        pass
