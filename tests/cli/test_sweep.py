"""powerctl sweep: clocks, resuming, files, and the choice."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerd.errors import EXIT_CONFLICT, EXIT_OVERRIDDEN, EXIT_USAGE, RequestError
from powerd.model import Verdict
from powerd.sweep import Row, Sweep, load, parse_clocks, save
from powerd_policies.energy_optimal import Point, choose, pareto, reference
from tests.cli.conftest import Powerctl
from tests.client.fake_daemon import UUIDS, FakeDaemon

A100 = tuple(range(210, 1411, 15))


@pytest.mark.parametrize(
    ("text", "clocks"),
    [
        ("1410:1365:15", (1410, 1395, 1380, 1365)),
        ("1365:1410:15", (1410, 1395, 1380, 1365)),
        ("900,1410,1200MHz", (1410, 1200, 900)),
        ("1201,1200", (1200,)),
        ("every 40", (1410, 810, 210)),
        ("every 2 from 1410 to 1365", (1410, 1380)),
    ],
)
def test_clocks_as_people_write_them(text: str, clocks: tuple[int, ...]) -> None:
    assert parse_clocks(text, A100) == clocks


@pytest.mark.parametrize("text", ["fast", "1410:855", "1410:855:0", "100", "2000", "every 0", "1410-855"])
def test_clocks_that_make_no_sense(text: str) -> None:
    with pytest.raises(RequestError):
        parse_clocks(text, A100)


@given(
    st.none() | st.from_regex(r"\A(\d{3,4}:\d{3,4}:\d{1,3}|every \d{1,2}|\d{3,4}(,\d{3,4}){0,5})\Z"),
    st.sets(st.integers(100, 3000), min_size=1),
)
def test_whatever_comes_back_is_supported_and_falls(text: str | None, table: set[int]) -> None:
    try:
        clocks = parse_clocks(text, sorted(table))
    except RequestError:
        return
    assert set(clocks) <= table
    assert list(clocks) == sorted(set(clocks), reverse=True)


POINTS = st.lists(
    st.builds(Point, st.integers(200, 2000), st.floats(0.1, 100), st.floats(1, 1e5)), min_size=1, unique_by=lambda p: p.clock_mhz
)  # fmt: skip


@given(POINTS, st.floats(0, 2))
def test_a_choice_keeps_its_promise_and_nothing_better_was_passed_over(points: list[Point], allowed: float) -> None:
    choice = choose(points, allowed)
    base = reference(points)
    limit_s = base.time_s * (1 + allowed)
    assert choice.point.time_s <= limit_s
    assert choice.saving >= 0
    assert not [p for p in points if p.time_s <= limit_s and p.energy_j < choice.point.energy_j]
    assert choose(points, allowed + 0.5).saving >= choice.saving


@given(POINTS)
def test_the_front_holds_exactly_the_points_that_nothing_beats(points: list[Point]) -> None:
    def beats(q: Point, p: Point) -> bool:
        return q.time_s <= p.time_s and q.energy_j <= p.energy_j and (q.time_s, q.energy_j) != (p.time_s, p.energy_j)

    unbeaten = {(p.time_s, p.energy_j) for p in points if not any(beats(q, p) for q in points)}
    assert {(p.time_s, p.energy_j) for p in pareto(points)} == unbeaten


@pytest.mark.parametrize("bad", [(0, 1.0, 1.0), (1, 0.0, 1.0), (1, 1.0, float("nan")), (1, float("inf"), 1.0)])
def test_a_point_without_meaning_is_refused(bad: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match=r"of a point are|finite"):
        Point(*bad)
    with pytest.raises(ValueError, match="no point"):
        choose([], 0.1)


def test_one_lease_many_clocks_and_files_of_the_fields_format(daemon: FakeDaemon, powerctl: Powerctl, tmp_path: Path) -> None:
    out, curve, count = tmp_path / "s.csv", tmp_path / "s.svg", tmp_path / "count"
    answer = powerctl(
        "sweep", "--gpus", "0", "--clocks", "1410,1200,900", "-o", str(out), "--plot", str(curve), "--stage", "3",
        "--instruction", "forward", "--", "sh", "-c", f"echo x >> {count}",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert count.read_text() == "x\n" * 3
    assert out.read_text().splitlines() == [
        "stage,instruction,frequency,time,energy", "3,forward,1410,4,1234.5", "3,forward,1200,4,1234.5", "3,forward,900,4,1234.5",
    ]  # fmt: skip
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert (rows[0]["clock_mhz"], rows[0]["low_j"], rows[0]["high_j"], rows[0]["verdict"]) == (1410, 1230.0, 1239.0, "applied")
    assert curve.stat().st_size > 1000
    assert "within 5% slowdown: " in answer.out
    assert "simulated" in answer.out
    posts = [body for method, path, body, _ in daemon.requests if (method, path) == ("POST", "/v1/leases")]
    assert len(posts) == 1
    assert posts[0]["min_dwell_s"] == 0.0
    wanted = [body["wants"][0]["high"] for method, _, body, _ in daemon.requests if method == "PATCH"]
    assert wanted == [1410, 1200, 900]
    assert daemon.leases == {}


def test_a_sweep_goes_on_where_it_broke_off(daemon: FakeDaemon, powerctl: Powerctl, tmp_path: Path) -> None:
    out, count = tmp_path / "s.csv", tmp_path / "count"
    script = f'echo x >> {count}; test "$(wc -l < {count})" -ne 2'  # fails the second time
    words = ["sweep", "--gpus", "0", "--clocks", "1410,1200,900", "-o", str(out), "--", "sh", "-c", script]
    first = powerctl(*words)
    assert first.code == 1
    assert "failed at 1200 MHz with exit code 1" in first.err
    assert len(out.read_text().splitlines()) == 2
    second = powerctl(*words)
    assert second.code == 0
    assert "1 of 3 clocks are in" in second.err
    assert count.read_text() == "x\n" * 4
    third = powerctl(*words)
    assert third.code == 0
    assert count.read_text() == "x\n" * 4
    other = powerctl(*words[:-1], "true")
    assert other.code == EXIT_USAGE
    assert "holds a sweep of something else" in other.err


def test_a_steady_command_is_timed_by_its_own_iterations(daemon: FakeDaemon, powerctl: Powerctl, tmp_path: Path) -> None:
    out = tmp_path / "s.csv"
    script = (
        "import os, time\n"
        "while True:\n"
        "    time.sleep(0.01)\n"
        "    with open(os.environ['POWERD_SWEEP_PROGRESS'], 'a') as progress: progress.write('step\\n')\n"
    )
    answer = powerctl(
        "sweep", "--steady", "--iterations", "4", "--gpus", "0", "--clocks", "1410,1200", "-o", str(out), "--",
        sys.executable, "-c", script,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    sweep = load(out)
    assert sweep is not None
    assert [r.clock_mhz for r in sweep.rows] == [1410, 1200]
    assert all(r.executions >= 4 and r.time_s == pytest.approx(4.0 / r.executions) for r in sweep.rows)


def test_a_steady_command_that_ends_early_keeps_what_was_measured(daemon: FakeDaemon, powerctl: Powerctl, tmp_path: Path) -> None:
    answer = powerctl("sweep", "--steady", "--gpus", "0", "--clocks", "1410,1200", "-o", str(tmp_path / "s.csv"), "--", "true")
    assert answer.code == 1
    assert "ended before 1410 MHz was measured" in answer.err


def test_a_clock_that_is_overridden_or_refused_is_told(daemon: FakeDaemon, powerctl: Powerctl, tmp_path: Path) -> None:
    words = ["sweep", "--gpus", "0", "--clocks", "1410", "-o", str(tmp_path / "s.csv"), "--", "true"]
    daemon.verdict = Verdict.OVERRIDDEN
    answer = powerctl(*words)
    assert answer.code == EXIT_OVERRIDDEN
    assert "1410 MHz was not in effect (overridden)" in answer.err
    daemon.refuse = True
    assert powerctl(*words[:-2], "--fresh", *words[-2:]).code == EXIT_CONFLICT


def test_files_come_back_as_they_were_and_garbage_is_refused(tmp_path: Path) -> None:
    row = Row(1200, 1.5, 300.0, 290.0, 310.0, 1, "applied")
    missing = Row(900, 2.0, None, None, None, 1, "pending")
    sweep = Sweep(("true",), UUIDS[:1], 0, "command", False, True, "A100", "580").with_row(missing).with_row(row).with_row(row)
    save(sweep, tmp_path / "s.csv")
    assert load(tmp_path / "s.csv") == sweep
    assert (tmp_path / "s.csv").read_text().count("\n") == 2  # a row without energy is in the JSON only
    assert load(tmp_path / "none.csv") is None
    (tmp_path / "s.json").write_text('{"rows": 3}')
    with pytest.raises(RequestError, match="is not a sweep's results"):
        load(tmp_path / "s.csv")
