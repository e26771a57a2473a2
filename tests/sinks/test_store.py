"""The embedded store: what is kept, how it is rolled up, and what a query answers."""

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from powerd.clock import NS
from powerd.errors import RequestError
from powerd.model import Event, Reading
from powerd.sinks import store as module
from powerd.sinks.columns import COLUMNS, TABLES, Column, select
from powerd.sinks.store import MAX_SCAN_ROWS
from tests.sinks.stored import T0, A, B, fill, snapshot, store, wait_until_rows


def test_ten_samples_a_second_become_one_row_of_means_and_last_values(tmp_path: Path) -> None:
    first = store(tmp_path)
    for tenth in range(20):
        first.append(
            snapshot(
                tenth / 10, energy_mj=1000 + tenth, power_mw=100_000 + 1000 * (tenth % 10), temperature_c=None,
                clock_event_reasons=1 << (tenth % 3), memory_used_bytes=3 << 30,
            )
        )  # fmt: skip
    first.close()
    second = store(tmp_path)
    columns = ["power_mw", "energy_mj", "temperature_c", "clock_event_reasons", "memory_used_bytes", "sm_clock_mhz"]
    view = second.history([A], T0, T0 + 10, 100, columns)
    second.close()
    (series,) = view.series
    assert (view.table, series.step_s, series.time_s) == ("raw", 1.0, (T0, T0 + 1))
    assert series.columns["power_mw"] == (104_500.0, 104_500.0)
    assert series.columns["energy_mj"] == (1009.0, 1019.0)
    assert series.columns["clock_event_reasons"] == (7.0, 7.0)
    assert series.columns["memory_used_bytes"] == (3 << 30, 3 << 30)
    assert series.columns["temperature_c"] == series.columns["sm_clock_mhz"] == (None, None)


def test_a_lost_gpu_leaves_a_hole_and_no_zero(tmp_path: Path) -> None:
    first = store(tmp_path)
    first.append(snapshot(0, power_mw=100_000))
    first.append(snapshot(1))
    first.append(snapshot(2, power_mw=100_000))
    first.close()
    again = store(tmp_path)
    assert again.history([A], T0, T0 + 5, 5, ["power_mw"]).series[0].time_s == (T0, T0 + 2)
    again.close()


def test_rollups_agree_with_raw_rows_and_energy_differences_telescope(tmp_path: Path) -> None:
    first = store(tmp_path)
    fill(first, range(0, 2 * 3600 + 65))
    first.close()
    again = store(tmp_path)
    tables: dict[str, list[tuple[Any, ...]]] = {}
    for table, step in TABLES.items():
        columns = ["power_mw", "power_mw_max", "power_mw_min", "energy_mj"]
        rows: list[tuple[Any, ...]] = list(again.rows([A], T0, T0 + 7200, columns, table))
        assert len(rows) == 7200 // step
        assert [r[0] for r in rows] == [T0 + step * n for n in range(7200 // step)]
        tables[table] = rows
    again.close()
    for table in ("r60", "r3600"):
        assert {r[2:5] for r in tables[table]} == {(450_000.0, 900_000.0, 0.0)}
        step = TABLES[table]
        energies = [r[5] for r in tables[table]]
        assert energies == [300_000.0 * (step * (n + 1) - 1) for n in range(7200 // step)]
        assert energies[-1] == tables["raw"][-1][5]


def test_the_last_known_counter_is_kept_when_the_newest_sample_has_none(tmp_path: Path) -> None:
    first = store(tmp_path)
    fill(first, range(0, 50))
    for second in range(50, 125):
        first.append(snapshot(second, power_mw=50_000))
    first.close()
    again = store(tmp_path)
    rows: list[tuple[Any, ...]] = list(again.rows([A], T0, T0 + 120, ["energy_mj"], "r60"))
    again.close()
    assert [r[2] for r in rows] == [300_000.0 * 49, None]


def test_rollups_go_on_where_an_earlier_run_ended(tmp_path: Path) -> None:
    for part in (range(0, 90), range(90, 200)):
        one = store(tmp_path)
        fill(one, part)
        one.close()
    again = store(tmp_path)
    rows: list[tuple[Any, ...]] = list(again.rows([A], T0, T0 + 180, ["power_mw", "energy_mj"], "r60"))
    again.close()
    assert [r[3] for r in rows] == [300_000.0 * 59, 300_000.0 * 119, 300_000.0 * 179]
    assert {r[2] for r in rows} == {450_000.0}


def test_a_wall_clock_that_steps_back_is_rolled_up_anew(tmp_path: Path) -> None:
    one = store(tmp_path)
    fill(one, range(0, 200))
    wait_until_rows(one, 199 * 2)
    for second in range(60, 120):
        one.append(snapshot(second, energy_mj=5, power_mw=900_000))
    fill(one, range(200, 310))
    one.close()
    again = store(tmp_path)
    rows: list[tuple[Any, ...]] = list(again.rows([A], T0, T0 + 300, ["power_mw"], "r60"))
    again.close()
    assert {r[0] - T0: r[2] for r in rows} == {0: 450_000, 60: 900_000, 120: 450_000, 180: 450_000, 240: 450_000}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 hours of 1 Hz rows of two GPUs."""
    path = tmp_path_factory.mktemp("big")
    one = store(path)
    one.append(snapshot(0, power_mw=1))
    one.close()
    with sqlite3.connect(path / "store.sqlite") as connection:
        names = [c.name for c in COLUMNS]
        power = names.index("power_mw")
        values = [0] * len(names)
        values[power] = 3000
        rows = ((gpu, T0 + second, *values) for gpu in (1, 2) for second in range(40 * 3600))
        connection.executemany(f"INSERT OR REPLACE INTO raw VALUES (?, ?{', ?' * len(names)})", rows)
    one = store(path)
    one.append(snapshot(40 * 3600, power_mw=1))
    one.append(snapshot(40 * 3600 + 1, power_mw=1))
    one.close()
    return path


@pytest.mark.parametrize(
    ("hours", "points", "table", "step_s"),
    [(1, 100, "raw", 36), (10, 3600, "raw", 10), (40, 1000, "r60", 180), (40, 100, "r60", 1440)],
)
def test_the_range_picks_the_table_and_points_bound_the_answer(
    big: Path, hours: int, points: int, table: str, step_s: int
) -> None:
    one = store(big)
    view = one.history([A, B], T0, T0 + hours * 3600, points, ["power_mw"])
    one.close()
    assert view.table == table
    for series in view.series:
        assert series.step_s == step_s
        assert 0 < len(series.time_s) <= points + 1
        assert set(series.columns["power_mw"]) <= {300_000.0} | set(series.columns["power_mw"][-1:])


def test_no_query_scans_more_rows_than_promised(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(table: str, columns: Iterable[Column], *, one_gpu: bool) -> str:
        asked.append(table)
        return select(table, columns, one_gpu=one_gpu)

    monkeypatch.setattr(module, "select", counted)
    one = store(big)
    for hours in (0.1, 1, 5, 13, 14, 30, 40, 24 * 365):
        view = one.history([A, B], T0, T0 + hours * 3600, 500, ["power_mw"])
        assert 2 * min(hours, 40) * 3600 / TABLES[view.table] <= MAX_SCAN_ROWS
        assert set(asked) == {view.table}
        asked.clear()
    one.close()


def test_a_long_range_over_young_data_is_answered_from_the_finest_rows(tmp_path: Path) -> None:
    one = store(tmp_path)
    fill(one, range(0, 300))
    one.close()
    again = store(tmp_path)
    view = again.history([A], T0 - 30 * 86_400, T0 + 300, 500, ["energy_mj"])
    again.close()
    assert view.table == "raw"
    assert len(view.series[0].time_s) == 300


def test_unknown_columns_ranges_and_gpus(tmp_path: Path) -> None:
    one = store(tmp_path)
    fill(one, range(0, 3))
    one.close()
    again = store(tmp_path)
    with pytest.raises(RequestError, match="power_mw"):
        again.history([A], T0, T0 + 10, 5, ["powr_mw"])
    with pytest.raises(RequestError):
        again.history([A], T0 + 10, T0, 5)
    with pytest.raises(RequestError):
        again.history([A], T0, T0 + 10, 0)
    nobody = "GPU-00000000-0000-0000-0000-0000000000ff"
    assert again.history([nobody], T0, T0 + 10, 5).series[0].time_s == ()
    again.close()


def test_events_come_back_as_they_went_in(tmp_path: Path) -> None:
    one = store(tmp_path)
    event = Event(7, 5, T0 * NS, "drift", A, "sm_clock", "changed by pid 9", {"to_mhz": 1200, "held": None})
    one.append_event(event)
    one.close()
    again = store(tmp_path)
    (stored,) = again.events(T0 - 1, T0 + 1)
    again.close()
    assert (stored.kind, stored.uuid, stored.subject, stored.detail, dict(stored.data)) == (
        "drift", A, "sm_clock", "changed by pid 9", {"to_mhz": 1200, "held": None},
    )  # fmt: skip
    assert stored.wall_ns == T0 * NS


def test_columns_are_fields_of_a_reading() -> None:
    assert {c.name for c in COLUMNS} <= set(Reading.__dataclass_fields__)
