"""The store's tables of jobs and their steps: records of powerd.jobs as SQL, and back.

House rules: one row type each, its columns are its fields; lists are JSON; a lost step keeps its row and says so.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import astuple, fields
from typing import Any

from powerd.jobs import KEEP_STEPS, MAX_JOBS, JobRestored, JobRow, Record
from powerd.records import JobStepRow

_TYPES = {"int": "INTEGER NOT NULL", "float": "REAL NOT NULL", "str": "TEXT NOT NULL", "tuple[str, ...]": "TEXT NOT NULL",
          "int | None": "INTEGER", "float | None": "REAL", "str | None": "TEXT"}  # fmt: skip
TABLES = ("job", "job_step")


def _columns(kind: type) -> str:
    return ", ".join(f"{f.name} {_TYPES[str(f.type)]}" for f in fields(kind))


def schema() -> str:
    """Both tables; harmless when they are there already."""
    return f"""
    CREATE TABLE IF NOT EXISTS job ({_columns(JobRow)}, PRIMARY KEY (job)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS job_step ({_columns(JobStepRow)}, lost INTEGER NOT NULL DEFAULT 0,
        PRIMARY KEY (job, attempt, step)) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS job_step_wall ON job_step (wall_ns);
    """


def _insert(table: str, kind: type) -> str:
    names = [f.name for f in fields(kind)]
    return f"INSERT OR REPLACE INTO {table} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})"  # noqa: S608 (constants)


_JOB, _STEP = _insert("job", JobRow), _insert("job_step", JobStepRow)
_LOST = "UPDATE job_step SET lost = 1 WHERE job = ? AND attempt < ? AND step > ?"


def statement(record: Record) -> tuple[str, tuple[object, ...]]:
    """The SQL that stores a record, and its values."""
    if isinstance(record, JobRestored):
        return _LOST, (record.job, record.attempt, record.step)
    values = tuple(json.dumps(v) if isinstance(v, tuple) else v for v in astuple(record))
    return (_JOB if isinstance(record, JobRow) else _STEP), values


def expire(connection: sqlite3.Connection, steps_before_ns: int, jobs_before_ns: int) -> None:
    """Delete what is too old."""
    connection.execute("DELETE FROM job_step WHERE wall_ns < ?", (steps_before_ns,))
    connection.execute("DELETE FROM job WHERE last_wall_ns < ?", (jobs_before_ns,))


def _read(kind: type, names: list[str], row: tuple[Any, ...]) -> Any:
    types = {f.name: str(f.type) for f in fields(kind)}
    values = {n: tuple(json.loads(v)) if types[n] == "tuple[str, ...]" else v for n, v in zip(names, row, strict=True)}
    return kind(**values)


def steps_of(connection: sqlite3.Connection, job: str, limit: int) -> list[JobStepRow]:
    """The newest retained steps of one job, oldest first."""
    names = [f.name for f in fields(JobStepRow)]
    sql = f"SELECT {', '.join(names)} FROM job_step WHERE job = ? AND lost = 0 ORDER BY wall_ns DESC, step DESC LIMIT ?"  # noqa: S608
    return [_read(JobStepRow, names, row) for row in connection.execute(sql, (job, limit))][::-1]


def load(connection: sqlite3.Connection) -> tuple[list[JobRow], list[JobStepRow]]:
    """The newest jobs and the newest retained steps of each, oldest first."""
    names = [f.name for f in fields(JobRow)]
    sql = f"SELECT {', '.join(names)} FROM job ORDER BY last_wall_ns DESC LIMIT ?"  # noqa: S608 (constants)
    jobs: list[JobRow] = [_read(JobRow, names, row) for row in connection.execute(sql, (MAX_JOBS,))]
    steps: list[JobStepRow] = []
    for job in jobs:
        steps += steps_of(connection, job.job, KEEP_STEPS)
    return jobs, steps
