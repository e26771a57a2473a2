"""The columns of the embedded store as one table, and the SQL that is made from it.

House rules: a column is named as in powerd.model; stored values are scaled integers; means are kept as sum and n so that roll-ups
of roll-ups stay exact; energy is the counter's last value, so that differences telescope.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """How a column is summed up over a bucket of time."""

    MEAN = "mean"
    LAST = "last"  # last known value
    BITS = "bits"  # all bits that were seen


@dataclass(frozen=True, slots=True)
class Column:
    """One stored field of a reading."""

    name: str
    kind: Kind
    scale: int = 1  # stored = value / scale, rounded

    def stored(self) -> tuple[str, ...]:
        """The names of its columns in a roll-up table."""
        return tuple(f"{self.name}_{part}" for part in ("sum", "min", "max", "n")) if self.kind is Kind.MEAN else (self.name,)


COLUMNS: tuple[Column, ...] = (
    Column("power_mw", Kind.MEAN, 100),
    Column("power_average_mw", Kind.MEAN, 100),
    Column("sm_clock_mhz", Kind.MEAN),
    Column("memory_clock_mhz", Kind.MEAN),
    Column("temperature_c", Kind.MEAN),
    Column("utilization_percent", Kind.MEAN),
    Column("memory_used_bytes", Kind.MEAN, 1 << 20),
    Column("energy_mj", Kind.LAST),
    Column("epoch", Kind.LAST),
    Column("power_limit_requested_mw", Kind.LAST, 100),
    Column("power_limit_enforced_mw", Kind.LAST, 100),
    Column("clock_event_reasons", Kind.BITS),
)
BY_NAME = {column.name: column for column in COLUMNS}

#: Table -> seconds of one row, finest first.
TABLES: dict[str, int] = {"raw": 1, "r60": 60, "r3600": 3600}

SCHEMA_VERSION = 1


def schema() -> str:
    """The whole schema; harmless when it is there already."""
    raw = ", ".join(f"{c.name} INTEGER" for c in COLUMNS)
    rolled = ", ".join(f"{name} INTEGER" for c in COLUMNS for name in c.stored())
    key = "gpu INTEGER NOT NULL, ts INTEGER NOT NULL"
    return f"""
    CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS gpus (id INTEGER PRIMARY KEY, uuid TEXT NOT NULL UNIQUE);
    CREATE TABLE IF NOT EXISTS raw ({key}, {raw}, PRIMARY KEY (gpu, ts)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS r60 ({key}, {rolled}, PRIMARY KEY (gpu, ts)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS r3600 ({key}, {rolled}, PRIMARY KEY (gpu, ts)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS events (id INTEGER PRIMARY KEY, wall_ns INTEGER NOT NULL, kind TEXT NOT NULL, uuid TEXT,
        subject TEXT, detail TEXT NOT NULL, data TEXT NOT NULL);
    CREATE INDEX IF NOT EXISTS events_wall ON events (wall_ns);
    CREATE TABLE IF NOT EXISTS leases (id TEXT PRIMARY KEY, wall_ns INTEGER NOT NULL, state TEXT NOT NULL, ending TEXT,
        uid INTEGER NOT NULL, job TEXT, reason TEXT NOT NULL, gpus TEXT NOT NULL) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS leases_wall ON leases (wall_ns);
    CREATE TABLE IF NOT EXISTS node (ts INTEGER PRIMARY KEY, cpu_permille INTEGER, load_milli INTEGER, memory_used_mib INTEGER,
        memory_size_mib INTEGER, cpu_energy_mj INTEGER, dram_energy_mj INTEGER);
    PRAGMA user_version = {SCHEMA_VERSION};
    """


def _parts(column: Column, table: str) -> tuple[str, str, str, str]:
    """SQL of sum, min, max and n of a mean column over rows of ``table``."""
    name = column.name
    if table == "raw":
        return f"sum({name})", f"min({name})", f"max({name})", f"count({name})"
    return f"sum({name}_sum)", f"min({name}_min)", f"max({name}_max)", f"sum({name}_n)"


def select(table: str, columns: Iterable[Column], *, one_gpu: bool) -> str:
    """Buckets of :step seconds over :since <= ts < :until of ``table``: gpu, bucket, then each column's stored parts."""
    inner, outer, joins = [], ["a.gpu", "a.bucket"], []
    for number, column in enumerate(columns):
        if column.kind is Kind.MEAN:
            for part, sql in zip(column.stored(), _parts(column, table), strict=True):
                inner.append(f"{sql} AS {part}")
                outer.append(f"a.{part}")
        elif column.kind is Kind.BITS:
            inner.append(f"bits_or({column.name}) AS {column.name}")
            outer.append(f"a.{column.name}")
        else:
            inner.append(f"max(CASE WHEN {column.name} IS NOT NULL THEN ts END) AS last{number}")
            joins.append(f"LEFT JOIN {table} AS t{number} ON t{number}.gpu = a.gpu AND t{number}.ts = a.last{number}")
            outer.append(f"t{number}.{column.name}")
    where = "gpu = :gpu AND" if one_gpu else ""
    extra = "".join(f", {sql}" for sql in inner)
    return (  # every name comes from COLUMNS and TABLES, never from a request
        f"WITH a AS (SELECT gpu, ts / :step * :step AS bucket{extra} FROM {table} WHERE {where} ts >= :since AND ts < :until "  # noqa: S608
        f"GROUP BY gpu, bucket) SELECT {', '.join(outer)} FROM a {' '.join(joins)} ORDER BY a.gpu, a.bucket"
    )


def roll_up(source: str, target: str) -> str:
    """Fill the target's buckets from the source; run again it gives the same rows."""
    names = ", ".join(name for column in COLUMNS for name in column.stored())
    return f"INSERT OR REPLACE INTO {target} (gpu, ts, {names}) {select(source, COLUMNS, one_gpu=False)}"


def insert_raw() -> str:
    """One raw row."""
    return f"INSERT OR REPLACE INTO raw VALUES (?, ?{', ?' * len(COLUMNS)})"  # noqa: S608 (a constant)


class BitsOr:
    """SQL aggregate: bitwise or of all known values."""

    def __init__(self) -> None:
        self.bits: int | None = None

    def step(self, value: int | None) -> None:
        if value is not None:
            self.bits = value | (self.bits or 0)

    def finalize(self) -> int | None:
        return self.bits
