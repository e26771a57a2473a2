"""The spool: order, bounds, dead letters, and what happens when its file does not play along."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from powerd.clock import NS
from powerd.sinks.spool import MAX_DEAD, Dead, Spool, read_dead

HOUR_NS = 3600 * NS


def spool(folder: Path, max_bytes: int = 1 << 20, max_age_ns: int = HOUR_NS) -> Spool:
    return Spool(folder / "spool.sqlite", max_bytes, max_age_ns)


def batch(number: int, lines: int = 10) -> list[str]:
    return [f"m,t=a v={number * lines + n}i {number}" for n in range(lines)]


def test_lines_come_out_in_order_across_a_restart_until_they_are_done(tmp_path: Path) -> None:
    first = spool(tmp_path)
    for number in range(5):
        first.put(batch(number), number)
    taken = first.take(25)
    assert taken is not None
    assert [text.decode() for text in taken.lines] == batch(0) + batch(1)
    first.done(taken)
    first.close()
    second = spool(tmp_path)
    rest = second.take(1000)
    assert rest is not None
    assert [text.decode() for text in rest.lines] == batch(2) + batch(3) + batch(4)
    second.done(rest)
    assert second.take(1000) is None
    assert (second.stats().bytes, second.stats().points, second.stats().oldest_wall_ns) == (0, 0, None)


def test_a_batch_larger_than_the_limit_is_still_taken(tmp_path: Path) -> None:
    one = spool(tmp_path)
    one.put(batch(0, 100), 0)
    taken = one.take(10)
    assert taken is not None
    assert len(taken.lines) == 100


def test_by_bytes_the_oldest_make_room_and_are_counted(tmp_path: Path) -> None:
    one = spool(tmp_path, max_bytes=4000)
    for number in range(200):
        one.put(batch(number), number)
        assert one.stats().bytes <= 4000
    stats = one.stats()
    assert stats.dropped_points + stats.points == 2000
    assert stats.dropped_points > 0
    taken = one.take(10_000)
    assert taken is not None
    assert taken.lines[-1].decode() == batch(199)[-1]
    assert len(taken.lines) == stats.points


def test_by_age_the_oldest_go_too(tmp_path: Path) -> None:
    one = spool(tmp_path, max_age_ns=HOUR_NS)
    for minute in range(120):
        one.put(batch(minute), minute * 60 * NS)
    stats = one.stats()
    assert stats.points == 61 * 10
    assert stats.oldest_wall_ns == 59 * 60 * NS
    assert stats.dropped_points == 59 * 10


def test_what_is_being_sent_is_not_dropped_but_what_comes_after_it(tmp_path: Path) -> None:
    one = spool(tmp_path, max_age_ns=10)
    one.put(batch(0), 0)
    one.put(batch(1), 1)
    taken = one.take(10)
    assert taken is not None
    one.put(batch(2), 100)
    assert one.stats().dropped_points == 10
    one.done(taken)
    rest = one.take(100)
    assert rest is not None
    assert [text.decode() for text in rest.lines] == batch(2)
    one.release()
    one.put(batch(3), 200)
    assert one.stats().dropped_points == 20, "what was given back may go"


def test_refused_lines_are_kept_with_the_reason_and_bounded(tmp_path: Path) -> None:
    one = spool(tmp_path)
    one.put(batch(0), 0)
    taken = one.take(10)
    assert taken is not None
    one.done(taken, [Dead(n, f"line {n}", 422, "type conflict") for n in range(MAX_DEAD + 5)])
    rows = read_dead(one.path)
    assert len(rows) == MAX_DEAD
    assert rows[0] == Dead(MAX_DEAD + 4, f"line {MAX_DEAD + 4}", 422, "type conflict")


def test_a_corrupt_file_is_put_aside_and_a_new_one_begun(tmp_path: Path) -> None:
    path = tmp_path / "spool.sqlite"
    path.write_bytes(b"this is not a database at all, whatever its name says" * 100)
    one = spool(tmp_path)
    one.put(batch(0), 0)
    assert one.quarantined == 1
    assert one.stats().points == 10
    assert [p.name for p in tmp_path.glob("*.corrupt-*")] != []


def test_a_disk_that_refuses_is_an_error_that_changes_nothing(tmp_path: Path) -> None:
    one = spool(tmp_path)
    one.put(batch(0), 0)
    with sqlite3.connect(one.path) as other:
        pages = other.execute("PRAGMA page_count").fetchone()[0]
    assert one._connection is not None
    one._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.Error):
        one.put([f"m v={n}{n * 7919 % 10007}i {n}" for n in range(20_000)], 1)
    assert one.stats().points == 10
    assert "full" in one.stats().problem
    one._connection.execute("PRAGMA max_page_count = 100000")
    one.put(batch(1), 2)
    assert one.stats().points == 20
    assert one.stats().problem == ""


def test_the_file_does_not_keep_the_size_of_an_outage(tmp_path: Path) -> None:
    one = spool(tmp_path, max_bytes=64 << 20)
    for number in range(300):
        one.put([f"m v={(number * 1000 + n) * 2654435761 % 4294967291}i {n}" for n in range(1000)], number)
    while (taken := one.take(5000)) is not None:
        one.done(taken)
    one.close()
    assert one.path.stat().st_size < 200_000
