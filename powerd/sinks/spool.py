"""The spool: what is on its way to InfluxDB, on disk before anything is sent, in order, bounded by bytes and age.

House rules: a batch is one transaction, so that SIGKILL leaves a consistent file; the oldest is dropped first and counted, but
never what is being sent just now; a corrupt file is put aside and a new one begun; any thread may use it; `stats` never waits.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from powerd.clock import NS
from powerd.sinks import sqlitefile

MAX_DEAD = 1000  # refused lines that are kept to be looked at
_ROW_BYTES = 64  # what a row costs beside its data
_SCHEMA = """
CREATE TABLE IF NOT EXISTS batch (id INTEGER PRIMARY KEY AUTOINCREMENT, wall_ns INTEGER NOT NULL, lines INTEGER NOT NULL,
    data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS dead (id INTEGER PRIMARY KEY AUTOINCREMENT, wall_ns INTEGER NOT NULL, line TEXT NOT NULL,
    status INTEGER NOT NULL, message TEXT NOT NULL);
"""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Taken:
    """The oldest lines of the spool, in order; give them back with ``done`` or ``release``."""

    last_id: int
    lines: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Dead:
    """A line that the server refused for good."""

    wall_ns: int
    line: str
    status: int
    message: str


@dataclass(frozen=True, slots=True)
class SpoolStats:
    """How full the spool is."""

    bytes: int
    points: int
    oldest_wall_ns: int | None
    dropped_points: int  # by the bounds, since powerd started
    problem: str  # empty when all is well


class Spool:
    """A queue of line protocol in one SQLite file."""

    def __init__(self, path: Path, max_bytes: int, max_age_ns: int) -> None:
        self.path = path
        self.problem = ""
        self.dropped_points = 0
        self.quarantined = 0
        self._max_bytes, self._max_age_ns = max_bytes, max_age_ns
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._bytes = self._points = 0
        self._oldest_wall_ns: int | None = None
        self._taken = 0  # newest id that is being sent

    # ---- what everybody does under the lock

    def _guarded(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Run one transaction; sqlite3.Error or OSError when it cannot be done, and then nothing of it is."""
        with self._lock:
            for attempt in (1, 2):
                try:
                    connection = self._connect()
                    connection.execute("BEGIN IMMEDIATE")
                    try:
                        result = work(connection)
                        oldest = connection.execute("SELECT wall_ns FROM batch ORDER BY id LIMIT 1").fetchone()
                        connection.execute("COMMIT")
                    except BaseException:
                        if connection.in_transaction:
                            connection.execute("ROLLBACK")
                        raise
                    self.problem = ""
                    self._oldest_wall_ns = None if oldest is None else int(oldest[0])
                    return result
                except (sqlite3.Error, OSError) as error:
                    self.problem = f"{self.path}: {error}"
                    corrupt = sqlitefile.is_corrupt(error)
                    if attempt == 2 or not (corrupt and self._quarantine()):
                        self._count_again()
                        raise
            raise AssertionError("unreachable")

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        connection = sqlite3.connect(self.path, timeout=5.0, isolation_level=None, check_same_thread=False)
        try:
            if fresh:
                os.chmod(self.path, 0o640)
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA wal_autocheckpoint = 500")
            connection.execute("PRAGMA cache_size = -1024")  # KiB: a queue needs no more
            connection.executescript(_SCHEMA)
            connection.execute("SELECT * FROM dead LIMIT 1").fetchall()
            self._count(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    def _count(self, connection: sqlite3.Connection) -> None:
        sql = "SELECT coalesce(sum(length(data) + ?), 0), coalesce(sum(lines), 0) FROM batch"
        self._bytes, self._points = connection.execute(sql, (_ROW_BYTES,)).fetchone()

    def _count_again(self) -> None:
        """After a failure the file alone knows what it holds."""
        if self._connection is not None:
            try:
                self._count(self._connection)
            except sqlite3.Error:
                pass  # the next transaction says so

    def _quarantine(self) -> bool:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if not sqlitefile.set_aside(self.path):
            return False
        self.quarantined += 1
        self._bytes = self._points = 0
        return True

    # ---- in

    def put(self, lines: Sequence[str], wall_ns: int) -> int:
        """Keep a batch of lines; how many older points had to make room. sqlite3.Error or OSError when the disk refuses."""
        data = zlib.compress("\n".join(lines).encode(), 1)

        def work(connection: sqlite3.Connection) -> int:
            connection.execute("INSERT INTO batch (wall_ns, lines, data) VALUES (?, ?, ?)", (wall_ns, len(lines), data))
            self._bytes += len(data) + _ROW_BYTES
            self._points += len(lines)
            return self._make_room(connection, wall_ns)

        dropped = self._guarded(work)
        self.dropped_points += dropped
        if dropped:
            self._shrink(64)
        return dropped

    def _make_room(self, connection: sqlite3.Connection, wall_ns: int) -> int:
        dropped = 0
        while True:
            sql = "SELECT id, wall_ns, lines, length(data) FROM batch WHERE id > ? ORDER BY id LIMIT 1"
            row = connection.execute(sql, (self._taken,)).fetchone()
            if row is None:
                return dropped
            number, then_ns, lines, size = row
            if self._bytes <= self._max_bytes and wall_ns - then_ns <= self._max_age_ns:
                return dropped
            connection.execute("DELETE FROM batch WHERE id = ?", (number,))
            self._bytes -= size + _ROW_BYTES
            self._points -= lines
            dropped += lines

    # ---- out

    def take(self, max_lines: int) -> Taken | None:
        """The oldest batches with together at most ``max_lines`` lines, at least one batch; None: there is nothing."""

        def work(connection: sqlite3.Connection) -> Taken | None:
            lines: list[bytes] = []
            last_id = 0
            for number, count, data in connection.execute("SELECT id, lines, data FROM batch ORDER BY id"):
                if lines and len(lines) + count > max_lines:
                    break
                lines += zlib.decompress(data).split(b"\n")
                last_id = number
                if len(lines) >= max_lines:
                    break
            self._taken = last_id
            return Taken(last_id, tuple(lines)) if lines else None

        return self._guarded(work)

    def release(self) -> None:
        """What was taken could not be sent: it stays, and may be dropped again."""
        self._taken = 0

    def done(self, taken: Taken, dead: Iterable[Dead] = ()) -> None:
        """What was taken has arrived, except for the lines that were refused for good: those are put aside."""

        def work(connection: sqlite3.Connection) -> None:
            sql = "SELECT coalesce(sum(length(data) + ?), 0), coalesce(sum(lines), 0) FROM batch WHERE id <= ?"
            size, lines = connection.execute(sql, (_ROW_BYTES, taken.last_id)).fetchone()
            connection.execute("DELETE FROM batch WHERE id <= ?", (taken.last_id,))
            rows = [(d.wall_ns, d.line, d.status, d.message) for d in dead]
            if rows:
                connection.executemany("INSERT INTO dead (wall_ns, line, status, message) VALUES (?, ?, ?, ?)", rows)
                keep = "DELETE FROM dead WHERE id <= (SELECT max(id) FROM dead) - ?"
                connection.execute(keep, (MAX_DEAD,))
            self._bytes -= size
            self._points -= lines
            self._taken = 0

        self._guarded(work)
        self._shrink(256)

    def _shrink(self, pages: int) -> None:
        """Give freed pages back to the file system; a script, because execute() would stop after the first page."""
        with self._lock:
            if self._connection is not None:
                try:
                    self._connection.executescript(f"PRAGMA incremental_vacuum({pages})")
                except sqlite3.Error:
                    pass  # the file stays larger than it has to be

    # ---- about

    def stats(self) -> SpoolStats:
        """How full it was after the last transaction."""
        return SpoolStats(self._bytes, self._points, self._oldest_wall_ns, self.dropped_points, self.problem)

    def open(self) -> None:
        """Open or make the file, so that ``stats`` knows what an earlier powerd left; errors as of ``put``."""
        self._guarded(lambda connection: None)

    def close(self) -> None:
        """Leave a file without a log beside it."""
        with self._lock:
            if self._connection is not None:
                sqlitefile.close(self._connection)
                self._connection = None


def read_dead(path: Path, limit: int = MAX_DEAD) -> list[Dead]:
    """The refused lines of a spool that may be in use, newest first; OSError when it cannot be read."""
    sql = "SELECT wall_ns, line, status, message FROM dead ORDER BY id DESC LIMIT ?"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=5.0)) as connection:
            return [Dead(*row) for row in connection.execute(sql, (limit,))]
    except sqlite3.Error as error:
        raise OSError(str(error)) from error


def age_s(stats: SpoolStats, wall_ns: int) -> float:
    """How long the oldest point has waited; 0 when none does."""
    return 0.0 if stats.oldest_wall_ns is None else max(0, wall_ns - stats.oldest_wall_ns) / NS
