"""What the embedded store forgets, and what it keeps of it."""

import sqlite3
from pathlib import Path

from powerd.clock import NS
from powerd.config import StoreConfig
from powerd.records import HostLoad
from tests.sinks.stored import T0, A, B, fill, store


def test_old_rows_go_in_small_steps_and_rollups_stay(tmp_path: Path) -> None:
    config = StoreConfig(raw_hours=1.0)
    for begin in range(0, 4 * 3600, 1800):
        one = store(tmp_path, config)
        fill(one, range(begin, begin + 1800, 10))
        one.close()
    for minute in range(40):  # each minute may delete ten minutes' worth
        one = store(tmp_path, config)
        fill(one, range(4 * 3600 + 60 * minute, 4 * 3600 + 60 * minute + 1), gpus=(A,))
        one.close()
    again = store(tmp_path, config)
    for uuid in (A, B):
        oldest = next(again.rows([uuid], 0, T0 + 10**6, ["power_mw"], "raw"), (T0 + 10**6,))[0]
        assert oldest >= T0 + 4 * 3600 + 39 * 60 - 3600
        assert next(again.rows([uuid], 0, T0 + 10**6, ["power_mw"], "r60"))[0] == T0
    again.close()


def test_room_of_old_rows_is_given_back_to_the_file_system(tmp_path: Path) -> None:
    config = StoreConfig(raw_hours=1.0)
    one = store(tmp_path, config)
    fill(one, range(0, 1800))
    one.close()
    for minute in range(8):
        one = store(tmp_path, config)
        fill(one, range(8 * 3600 + 60 * minute, 8 * 3600 + 60 * minute + 1))
        one.close()
    link = sqlite3.connect(tmp_path / "store.sqlite")
    (free,), (pages,) = (link.execute(f"PRAGMA {what}").fetchone() for what in ("freelist_count", "page_count"))
    link.close()
    assert free < pages / 4


def test_the_hosts_old_rows_are_thinned_to_one_a_minute_and_their_energy_stays(tmp_path: Path) -> None:
    one = store(tmp_path, StoreConfig(raw_hours=1.0))
    for second in range(0, 3 * 3600, 5):
        one.append_load(HostLoad((T0 + second) * NS, 0.5, 1.0, 1 << 30, 2 << 30, (), 10.0 * second))
    fill(one, range(3 * 3600, 3 * 3600 + 61))
    one.close()
    again = store(tmp_path)
    rows = again.loads(T0, T0 + 4 * 3600, 5000)
    again.close()
    seconds = [row.wall_ns // NS - T0 for row in rows]
    assert seconds[:3] == [55, 115, 175]
    assert len([s for s in seconds if s < 2 * 3600]) == 120
    assert len([s for s in seconds if s >= 2 * 3600 + 60]) == 3540 / 5
    assert [row.cpu_energy_j for row in rows] == [10.0 * s for s in seconds]
