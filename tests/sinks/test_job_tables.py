"""Jobs in the embedded store: what a daemon finds again after a restart, and what time takes away."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

from powerd.api import JobEvent, JobStep
from powerd.clock import NS, RealClock
from powerd.config import StoreConfig
from powerd.jobs import JobTable
from powerd.model import Health, Reading, Snapshot
from powerd.sinks.store import Store

T0_NS = 1_800_000_000 * NS
GPUS = ("GPU-a", "GPU-b")


def open_store(folder: Path, config: StoreConfig | None = None) -> Store:
    return Store(folder / "store.sqlite", config or StoreConfig(), RealClock())


def report(table: JobTable, kind: str, now_s: float, **more: Any) -> None:
    table.add("train/1", 1000, JobEvent(kind, **more), T0_NS + round(now_s * NS), round(now_s * NS))


def step(table: JobTable, number: int, now_s: float, energy_j: float | None = 100.0, plan: str | None = None) -> None:
    begin = round(now_s * NS)
    for gpu in GPUS:
        half = None if energy_j is None else energy_j / 2
        row = JobStep(number, begin, begin + NS, (gpu,), plan, half, 1200.0)
        report(table, "step", now_s, steps=(row,))


def fill(store: Store) -> JobTable:
    table = JobTable()
    table.listeners.append(store.append_job)
    report(table, "start", 0.5)
    for number in range(1, 11):
        step(table, number, 2.0 * number)
    report(table, "restore", 30.0, step=6)
    for number in range(7, 12):
        step(table, number, 30 + 2.0 * number, 80.0, "p1")
    report(table, "checkpoint_begin", 60.0)
    report(table, "checkpoint_end", 62.0, energy_j=9.0)
    return table


def test_another_daemon_finds_what_the_first_one_knew(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    before = fill(first)
    first.close()
    second = open_store(tmp_path)
    after = JobTable()
    after.listeners.append(second.append_job)
    after.load(*second.jobs(), 62 * NS, T0_NS + 62 * NS)
    assert after.view("train/1", 62 * NS) == before.view("train/1", 62 * NS)
    assert after.owner("train/1") == 1000
    view = after.view("train/1", 62 * NS)
    assert view is not None
    assert (view.steps, view.lost_steps, view.energy_j, view.plan) == (11, 4, 1409.0, "p1")
    # The steps before the restart still tell a repeated report from a step that is run again.
    step(after, 11, 52.0, 80.0, "p1")
    assert after.view("train/1", 62 * NS) == view
    second.close()


def test_lost_steps_stay_in_the_file_and_say_so(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    fill(store)
    store.close()
    with sqlite3.connect(tmp_path / "store.sqlite") as file:
        rows = file.execute("SELECT attempt, step, lost, time_s, energy_j, gpus FROM job_step ORDER BY attempt, step").fetchall()
    assert [row[:3] for row in rows] == [(0, n, int(n > 6)) for n in range(1, 11)] + [(1, n, 0) for n in range(7, 12)]
    assert rows[0][3:] == (1.0, 100.0, '["GPU-a", "GPU-b"]')


def test_steps_go_with_the_minutes_and_jobs_with_the_hours(tmp_path: Path) -> None:
    config = replace(StoreConfig(), minute_days=1.0, hour_days=30.0)
    store = open_store(tmp_path, config)
    fill(store)
    for days, left in ((2, (1, 0)), (40, (0, 0))):
        now_ns = T0_NS + days * 86_400 * NS
        store.append(Snapshot(0, now_ns, now_ns, (Reading(GPUS[0], now_ns, Health.UP, 1, power_mw=1),)))
        store.close()
        with sqlite3.connect(tmp_path / "store.sqlite") as file:
            assert [file.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in ("job", "job_step")] == list(left)
        store = open_store(tmp_path, config)
    store.close()


def test_a_store_of_an_earlier_powerd_gets_the_tables(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.close()
    with sqlite3.connect(tmp_path / "store.sqlite") as file:
        file.execute("DROP TABLE job")
        file.execute("DROP TABLE job_step")
    store = open_store(tmp_path)
    assert store.jobs() == ([], [])
    store.close()
